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
import consilium_server.commands.cli
from consilium_audit.evidence import STEPS
from consilium_shared.protocol.messages import Reason

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/**/*.md")])
PROGRAMS: dict[str, click.Command] = {
    "consilium-server": typer.main.get_command(consilium_server.commands.cli.app),
    "consilium-site": typer.main.get_command(consilium_client.commands.cli.app),
    "consilium-audit": typer.main.get_command(consilium_audit.cli.app),
}
PERSON = {"consilium-server": "coordinator.md", "consilium-site": "hospital-it.md", "consilium-audit": "auditor.md"}
ROOTS = ("engine/dpsgd", "server/consilium_server", "client/consilium_client", "shared/consilium_shared",
         "shared/consilium_audit", "deploy/consilium_deploy")  # fmt: skip
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
        found = re.search(r"(?:^|/bin/)(consilium-(?:server|site|audit)(?: .*)?)$", line)
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


def test_the_readmes_shell_blocks_use_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    lines = list(shell_lines((ROOT / "README.md").read_text(encoding="utf-8")))
    assert lines
    for line in lines:
        words = line.split()
        assert words[0] == "make"
        assert set(words[1:]) <= targets
    assert {"make demo", "make test"} <= set(lines)


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


def test_every_reason_of_a_refusal_is_explained_to_the_coordinator() -> None:
    text = (ROOT / "docs" / "coordinator.md").read_text(encoding="utf-8")
    assert [reason for reason in get_args(Reason) if f"`{reason}`" not in text] == []


def test_the_auditors_steps_are_those_of_the_program() -> None:
    text = (ROOT / "docs" / "auditor.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) ([a-z ]+?) \|", text, re.MULTILINE))
    assert rows == {str(number): name for number, name in STEPS.items()}


def test_every_test_that_the_threat_model_names_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[^`]+)`", text))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_runbook_stands_in_the_list() -> None:
    folder = ROOT / "deploy" / "runbooks"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\S+)\)", text)) == {file.name for file in folder.glob("*.md")} - {"README.md"}
