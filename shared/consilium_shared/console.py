"""Terminal behaviour that the three programs share: exit statuses, one message for an error, tables or JSON."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from consilium_shared.errors import (
    ConfigurationError,
    ConsiliumError,
    DataError,
    IntegrityError,
    PeerError,
    PolicyRefusal,
    TransportError,
)
from consilium_shared.printable import printable

EXIT_STATUS: tuple[tuple[type[ConsiliumError], int], ...] = (
    (ConfigurationError, 2),
    (PeerError, 3),
    (TransportError, 4),
    (PolicyRefusal, 5),
    (IntegrityError, 6),
    (DataError, 7),
    (ConsiliumError, 1),
)
"""Scripts can tell whose turn it is: 2 the operator's, 3 the other side's, 4 try again, 5 policy, 6 damage, 7 data."""

INTERNAL = 70
"""A defect of ours (EX_SOFTWARE of sysexits.h)."""


class Screen(Console):
    """Shows text of others without its terminal escapes: sentences, names and cells may come from a peer's file."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Text as rich renders it, of the printable characters, line breaks and tabs alone."""
        return super().render_str(printable(text, keep="\n\t"), **options)


console = Screen(highlight=False)
errors = Screen(stderr=True, highlight=False)


def run(app: typer.Typer, name: str) -> None:
    """Run a Typer application; every error becomes one message and an exit status, never a traceback."""
    os.umask(0o077)
    command = typer.main.get_command(app)
    try:
        status = command(prog_name=name, standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except click.ClickException as error:
        # It quotes arguments: names of files, perhaps by a glob.
        error.message = printable(error.message)  # type: ignore[misc]
        error.show()
        sys.exit(error.exit_code)
    except ConsiliumError as error:
        errors.print(f"[bold red]{name}:[/] ", end="")
        for line in error.findings if isinstance(error, ConfigurationError) else (str(error),):
            errors.print(printable(line), markup=False)  # a peer that it quotes adds no line of its own
        sys.exit(next(status for kind, status in EXIT_STATUS if isinstance(error, kind)))
    except BrokenPipeError:
        sys.exit(0)
    except Exception:
        kept = _keep_traceback(name)
        errors.print(f"[bold red]{name}:[/] this is a defect of Consilium, not of your files. ", end="")
        errors.print(kept, markup=False)
        sys.exit(INTERNAL)
    sys.exit(status if isinstance(status, int) else 0)


def _keep_traceback(name: str) -> str:
    """Keeps the stack alone (an exception's text may quote data, file and line numbers do not); says where it is."""
    kind, _, trace = sys.exc_info()
    stack = "".join(traceback.format_tb(trace))
    when = datetime.now().astimezone().isoformat(timespec="seconds")
    try:
        file = Path.home() / f".{name}-defect.txt"
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8") as out:
            out.write(f"{when} {kind.__name__ if kind else ''}\n{stack}\n")
    except (OSError, RuntimeError) as error:  # no home, or one that cannot be written
        return f"Its trace cannot be kept in the home folder ({type(error).__name__}); it ends at {stack.strip()}"
    return f"Its trace is in {file}"


def show(
    as_json: bool, value: Any, title: str, columns: Sequence[str], rows: Callable[[], Sequence[Sequence[Any]]]
) -> None:
    """Print ``value`` as JSON, or ``rows`` as a table for people."""
    if as_json:
        print(json.dumps(value, indent=2, sort_keys=True))  # ASCII alone: what is no letter is escaped
        return
    table(title, columns, rows())


_FEW = 3
"""Most columns of a table that is always one: a path in it may be broken, but it stays readable."""


def _blocks(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print each row as lines: its first cell, then name and text of every other, words whole."""
    if title:
        console.print(title, style="bold", markup=False)
    wide = max(len(column) for column in columns[1:])
    for first, *cells in rows:
        console.print("–" if first is None else str(first), style="bold", markup=False, soft_wrap=True)
        for column, cell in zip(columns[1:], cells, strict=True):
            for i, line in enumerate(str("–" if cell is None else cell).splitlines() or [""]):
                head = f"  {column:{wide}}  " if i == 0 else " " * (wide + 4)
                found = textwrap.wrap(
                    line,
                    max(console.width, wide + 24),
                    initial_indent=head,
                    subsequent_indent=" " * (wide + 4),
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                for each in found or [head]:
                    console.print(each, markup=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows as a table for people; None becomes a dash.

    Where the terminal is too narrow for the longest words of all columns, which would be broken, each row is printed as
    lines of its own.
    """
    if not rows:
        console.print(f"{title or 'rows'}: none", markup=False)
        return
    words = [
        [len(word) for row in (columns, *rows) for word in [*str(row[i]).split(), ""]] for i in range(len(columns))
    ]
    if len(columns) > _FEW and sum(max(each) + 3 for each in words) + 1 > console.width:
        _blocks(title, columns, rows)
        return
    drawn = Table(title=title or None, title_justify="left", title_style="bold")
    for column in columns:
        drawn.add_column(column, overflow="fold")  # a path or digest that is cut is of no use
    for row in rows:
        drawn.add_row(*("–" if cell is None else console.render_str(str(cell), markup=False) for cell in row))
    console.print(drawn)
