"""What the programs show at the terminal: never a peer's escapes, never a traceback."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import typer

from consilium_shared import console
from consilium_shared.config import load_yaml
from consilium_shared.errors import ConfigurationError, IntegrityError, PeerError, PolicyRefusal
from consilium_shared.printable import printable
from consilium_shared.study import Study

HOSTILE = "a\x1b]8;;http://example.org\x07b\x9b2J\u202ec[bold]d[/bold]"


def _failing(error: Exception) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise error

    return app


def test_what_can_be_printed_stays_and_what_moves_a_terminal_goes() -> None:
    assert printable("ε ≤ 2, “Dr Müller”") == "ε ≤ 2, “Dr Müller”"
    assert printable(HOSTILE).isprintable()
    assert printable("a\nb\tc\x1b", keep="\n\t") == "a\nb\tc\ufffd"
    assert printable("\ud800") == "\ufffd"


def test_no_escape_of_a_peer_reaches_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    screen = console.Screen(file=out, force_terminal=True, width=200, highlight=False, color_system=None)
    monkeypatch.setattr(console, "console", screen)
    console.table(HOSTILE, ["name"], [[HOSTILE], [None]])
    screen.print(HOSTILE, markup=False)
    shown = out.getvalue()
    assert not {"\x07", "\x9b", "\u202e", "\x1b"} & set(shown)
    assert shown.count("c[bold]d[/bold]") == 2, "a cell is no markup either"


def test_json_escapes_what_cannot_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(True, {"name": HOSTILE}, "", [], list)
    shown = capsys.readouterr().out
    assert printable(shown, keep="\n") == shown
    assert json.loads(shown) == {"name": HOSTILE}


def test_an_error_is_one_clean_message(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(console, "errors", console.Screen(file=out, width=200, highlight=False))
    with pytest.raises(SystemExit) as stop:
        _run(_failing(PeerError(HOSTILE)), monkeypatch)
    assert stop.value.code == 3
    assert "\x1b" not in out.getvalue()


FORGED = "no study 'a'\nconsilium-test: study 'a' is approved\r\u2028everything is well"


@pytest.mark.parametrize(
    "kind", [PeerError, ConfigurationError, IntegrityError, lambda text: PolicyRefusal("sum", text)]
)
def test_a_peers_text_adds_no_line_to_an_error(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    out = io.StringIO()
    monkeypatch.setattr(console, "errors", console.Screen(file=out, width=200, highlight=False))
    with pytest.raises(SystemExit):
        _run(_failing(kind(f"the coordinator says: {FORGED}")), monkeypatch)
    assert len(out.getvalue().splitlines()) == 1


def test_each_finding_of_a_file_is_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = io.StringIO()
    monkeypatch.setattr(console, "errors", console.Screen(file=out, width=200, highlight=False))
    file = tmp_path / "study.yaml"
    file.write_text('study: a\n"x\\nconsilium-test: all is well": 1\n')
    with pytest.raises(ConfigurationError) as error:
        load_yaml(file, Study)
    with pytest.raises(SystemExit):
        _run(_failing(error.value), monkeypatch)
    lines = out.getvalue().splitlines()
    assert len(lines) == len(error.value.findings) > 1
    assert all(str(file) in line for line in lines), "also where a key quotes a line break"


@pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null"])
def test_a_defect_is_said_also_where_no_trace_can_be_kept(monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    out = io.StringIO()
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(console, "errors", console.Screen(file=out, width=500, highlight=False))
    with pytest.raises(SystemExit) as stop:
        _run(_failing(ZeroDivisionError("a patient's value")), monkeypatch)
    assert stop.value.code == console.INTERNAL
    assert "cannot be kept" in out.getvalue()
    assert "a patient's value" not in out.getvalue()


def test_the_trace_of_a_defect_is_kept_without_the_exceptions_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        _run(_failing(ZeroDivisionError("a patient's value")), monkeypatch)
    text = (tmp_path / ".consilium-test-defect.txt").read_text()
    assert "ZeroDivisionError" in text
    assert "a patient's value" not in text


def _run(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["consilium-test"])
    monkeypatch.setattr("os.umask", lambda mode: mode)
    console.run(app, "consilium-test")


def test_a_table_that_does_not_fit_breaks_no_word_and_an_empty_one_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(console, "console", console.Screen(file=shown, width=80, highlight=False))
    digest, columns = "d" * 64, ["study", "digest", "state", "sites", "note"]
    console.table("studies", columns, [["heart-disease-dp", digest, "pending", None, "two words " * 12]])
    text = shown.getvalue()
    assert digest in text and "heart-disease-dp" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert [line.split()[0] for line in text.splitlines()[2:5]] == ["digest", "state", "sites"]
    console.table("studies", columns, [])
    assert shown.getvalue().endswith("studies: none\n")
    console.table("studies", columns, [["a", "b", "c", "d", "e"]])
    assert "│ a" in shown.getvalue()
