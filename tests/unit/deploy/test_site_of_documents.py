"""The documents build as one site: every link holds, every page is in it, and reading it needs no network."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """``make docs`` with another target folder."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_of_the_repository_is_in_the_site(site: Path) -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy" / "runbooks").glob("*.md")]:
        name = "index" if page.name == "README.md" else page.stem
        made = site / page.relative_to(ROOT).with_name(f"{name}.html")
        assert made.exists(), page


def test_every_page_can_be_reached_from_the_first(site: Path) -> None:
    first = (site / "index.html").read_text(encoding="utf-8")
    linked = {target.split("#")[0] for target in re.findall(r'href="([^":]+)"', first)}
    pages = {page.relative_to(site).as_posix() for page in site.rglob("*.html")} - {"404.html", "search.html"}
    assert pages - linked - {"index.html"} == set()


def test_reading_loads_nothing_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts and pictures; a link that a reader may follow is no load."""
    loads = re.compile(r"""(?:\bsrc=|<link[^>]*\bhref=|\burl\(|@import )["']?(?:https?:)?//[^"')\s]+""")
    for file in (file for kind in ("html", "css") for file in site.rglob(f"*.{kind}")):
        text = file.read_text(encoding="utf-8")
        assert [load for load in loads.findall(text) if 'rel="canonical"' not in load] == [], file
    assert "cdnjs" not in (site / "index.html").read_text(encoding="utf-8")


def test_a_link_to_nowhere_stops_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("build_site.py", "site.css"):
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs")
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text(
        config[: config.index("nav:  ")] + 'nav: [{Pages: [README.md, "docs/*.md"]}]\n', encoding="utf-8"
    )
    (tmp_path / "README.md").write_text("# Here\n\n[there](docs/there.md)\n", encoding="utf-8")
    done = build(tmp_path, tmp_path / "broken")
    assert done.returncode != 0
    assert "docs/there.md" in done.stderr
    (tmp_path / "docs" / "there.md").write_text("# There\n", encoding="utf-8")
    done = build(tmp_path, tmp_path / "whole")
    assert done.returncode == 0, done.stdout + done.stderr
