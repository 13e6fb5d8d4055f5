"""The documents do not lie: commands, options, files, tests and links that they name exist, and none is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click
import pytest
import typer

import consilium_audit.cli
import consilium_client.commands.cli
import consilium_serve.cli
import consilium_server.commands.cli
from consilium_audit.evidence import STEPS
from consilium_shared.protocol.reasons import Reason

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(page for folder in ("docs", "deploy", "engine", "examples") for page in (ROOT / folder).rglob("*.md")),
    ]
)
PROGRAMS: dict[str, click.Command] = {
    "consilium-server": typer.main.get_command(consilium_server.commands.cli.app),
    "consilium-site": typer.main.get_command(consilium_client.commands.cli.app),
    "consilium-audit": typer.main.get_command(consilium_audit.cli.app),
    "consilium-predict": typer.main.get_command(consilium_serve.cli.app),
}
PERSON = {
    "consilium-server": "coordinator.md",
    "consilium-site": "hospital-it.md",
    "consilium-audit": "auditor.md",
    "consilium-predict": "predict.md",
}
EVIDENCE_TO_COME = "tests/vectors/evidence-VERSION/"
"""Path in RELEASE.md that the next release makes."""
ROOTS = ("engine/dpsgd", "server/consilium_server", "client/consilium_client", "shared/consilium_shared",
         "shared/consilium_audit", "shared/consilium_tasks", "serve/consilium_serve",
         "deploy/consilium_deploy")  # fmt: skip
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def shell_lines(text: str) -> Iterator[str]:
    """Commands in blocks marked ``sh``, without their comments."""
    for language, block in FENCE.findall(text):
        if language == "sh":
            yield from (line.split(" #")[0].strip() for line in block.splitlines() if line.strip())


def code(text: str) -> Iterator[str]:
    """Every command line that a reader may type: lines of shell blocks, and code within sentences."""
    yield from shell_lines(text)
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def leaves(name: str, command: click.Command) -> Iterator[str]:
    """Full names of all commands below one."""
    if isinstance(command, click.Group):
        for word, child in command.commands.items():
            yield from leaves(f"{name} {word}", child)
    else:
        yield name


def follow(words: list[str]) -> tuple[str, click.Command, list[str]]:
    """The command that a line names, and its remaining words; AssertionError when there is none."""
    name, command = words[0], PROGRAMS[words[0]]
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"no command {rest[0]!r} in {name}"
        name, command, rest = f"{name} {rest[0]}", command.commands[rest[0]], rest[1:]
    return name, command, rest


def mentions(text: str) -> Iterator[list[str]]:
    """The words of each mention of one of the programs, from the program's name on."""
    for line in code(text):
        found = re.search(r"(?:^|/bin/)(consilium-(?:server|site|audit|predict)(?: .*)?)$", line)
        if found:
            yield found.group(1).split()


ALL = [name for program, command in PROGRAMS.items() for name in leaves(program, command)]


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_every_command_and_option_in_a_page_exists(page: Path) -> None:
    for words in mentions(page.read_text(encoding="utf-8")):
        _, command, rest = follow(words)
        options = {word for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts)}
        for word in rest:
            if word.startswith("-"):
                assert word.split("=")[0] in options, f"{page.name}: {' '.join(words)}: no option {word}"


@pytest.mark.parametrize("name", ALL)
def test_every_command_stands_on_the_page_of_the_person_who_needs_it(name: str) -> None:
    page = ROOT / "docs" / PERSON[name.split()[0]]
    documented = {follow(words)[0] for words in mentions(page.read_text(encoding="utf-8"))}
    assert name in documented


def test_a_command_that_does_not_exist_would_be_found() -> None:
    text = "Run `consilium-site fly --home va`."
    with pytest.raises(AssertionError, match="fly"):
        follow(next(mentions(text)))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "RELEASE.md"])
def test_every_target_of_make_in_a_page_exists(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = [line.split()[1:] for line in code((ROOT / page).read_text(encoding="utf-8")) if line.startswith("make ")]
    assert named
    for words in named:
        assert {word for word in words if "=" not in word} <= targets, words


def test_the_readme_starts_with_a_picture_and_the_demonstration() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.index("](docs/pictures/overview.svg)") < text.index("```sh")
    assert next(shell_lines(text)) == "make demo"
    assert "make test" in shell_lines(text)


def test_the_architecture_lists_every_decision_by_its_title() -> None:
    """In their order, and each decision says what it is a decision about."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    listed = re.findall(r"^(\d+)\. \[(.+)\]\((docs/decisions/.+\.md)\)$", text, re.MULTILINE)
    pages = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    assert [path for _, _, path in listed] == [label(page) for page in pages]
    for number, title, path in listed:
        page = (ROOT / path).read_text(encoding="utf-8")
        assert page.startswith(f"# {number}. {title}\n"), path
        assert Path(path).name.startswith(f"{int(number):04}-")
        assert {"## Context", "## Decision", "## Consequences"} <= set(page.splitlines()), path


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_links_the_page_of_each_person() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"(docs/{page})" in text for page in PERSON.values())


def test_the_tree_in_the_architecture_names_every_file_once_and_no_other() -> None:
    blocks = FENCE.findall((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    tree = next(block for _, block in blocks if "consilium_server/ " in block)
    folder, named = "", []
    for line in tree.splitlines():
        word = line.split()[0]
        if not line.startswith(" "):
            folder = word
        else:
            named.append(folder + word)
    there = [
        file.relative_to(ROOT).as_posix()
        for root in ROOTS
        for file in (ROOT / root).rglob("*.py")
        if file.name != "__init__.py"
    ]
    assert sorted(named) == sorted(there)


def test_each_place_to_look_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text[text.index("## Where to look") : text.index("## Joining")]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 20
    for row in rows:
        places = [place for place in re.findall(r"`([^`]+)`", row.split("|")[2]) if not place.startswith("make ")]
        whole = [place for place in places if "/" in place or place in ("Makefile", "CHANGELOG.md")]
        assert whole, row
        assert [place for place in whole if not (ROOT / place).exists()] == [], row


def test_every_reason_of_a_refusal_is_explained_to_the_coordinator() -> None:
    text = (ROOT / "docs" / "coordinator.md").read_text(encoding="utf-8")
    assert [reason for reason in get_args(Reason) if f"`{reason}`" not in text] == []


def test_the_auditors_steps_are_those_of_the_program() -> None:
    text = (ROOT / "docs" / "auditor.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) ([a-z ]+?) \|", text, re.MULTILINE))
    assert rows == {str(number): name for number, name in STEPS.items()}


@pytest.mark.parametrize("page", ["SECURITY.md", "CONTRIBUTING.md", "RELEASE.md"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = set(re.findall(r"`(tests/[^`]+)`", (ROOT / page).read_text(encoding="utf-8"))) - {EVIDENCE_TO_COME}
    assert named
    assert [name for name in sorted(named) if not list(ROOT.glob(name))] == []


def test_every_runbook_stands_in_the_list() -> None:
    folder = ROOT / "deploy" / "runbooks"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\S+)\)", text)) == {file.name for file in folder.glob("*.md")} - {"README.md"}
