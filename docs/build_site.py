"""MkDocs hook of the documents' site: takes pages from the whole repository, each at the path that it has there."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/**/*.md", "deploy/**/*.md", "engine/**/*.md", "examples/**/*.md", "shared/consilium_tasks/*.md")
"""Patterns of all pages, seen from the repository's root."""
LINK = re.compile(r"(?<!!)\[([^\]\n]*)\]\(([^)#\s]+)(#[^)]*)?\)")
"""A link's words, target and anchor; pictures are no links."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace each pattern in the navigation by the pages that it matches and that the navigation does not name."""
    named = set(_named(config.nav))
    config.nav = [entry for entry in (_expanded(each, named) for each in config.nav or []) if entry]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take all pages and the files that they link to, in place of the folder that MkDocs has read."""
    theme = [file for file in files if Path(file.src_dir or ROOT) != ROOT / "docs"]
    pages = {page for pattern in PAGES for page in ROOT.glob(pattern)}
    linked = {target for page in pages for target in _targets(page) if target.is_file()}
    style = {ROOT / str(file) for file in config.extra_css}
    names = sorted(file.relative_to(ROOT).as_posix() for file in pages | linked | style)
    return Files([*theme, *(File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in names)])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point a link to a folder at the folder's README; of a link to a folder without one leave the words."""
    here = ROOT / posixpath.dirname(page.file.src_uri)

    def mend(link: re.Match[str]) -> str:
        words, target, anchor = link[1], link[2], link[3] or ""
        if ":" in target or not (here / target).is_dir():
            return link[0]
        return f"[{words}]({posixpath.join(target, 'README.md')}{anchor})" if _readme(here / target) else words

    return LINK.sub(mend, markdown)


def _named(entry: Any) -> Iterator[str]:
    """Every path and pattern in a part of the navigation."""
    if isinstance(entry, str):
        yield entry
    elif entry is not None:
        for each in entry.values() if isinstance(entry, dict) else entry:
            yield from _named(each)


def _expanded(entry: Any, named: set[str]) -> Any:
    """One entry of the navigation with paths in place of patterns, READMEs first; None where nothing matches."""
    if isinstance(entry, str):
        return entry if "*" not in entry else _pages(entry, named)
    ((title, target),) = entry.items()
    if isinstance(target, str):
        found = _expanded(target, named)
    else:
        parts = [_expanded(each, named) for each in target]
        found = [page for part in parts for page in (part if isinstance(part, list) else [part]) if page]
    return {title: found} if found else None


def _pages(pattern: str, named: set[str]) -> list[str]:
    pages = sorted(ROOT.glob(pattern), key=lambda page: (page.name != "README.md", page.as_posix()))
    return [path for page in pages if (path := page.relative_to(ROOT).as_posix()) not in named]


def _readme(folder: Path) -> bool:
    return (folder / "README.md").exists()


def _targets(page: Path) -> set[Path]:
    """Paths in the repository to which a page links, or that it shows as a picture."""
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    return {Path(posixpath.normpath(page.parent / target)) for target in targets if ":" not in target}
