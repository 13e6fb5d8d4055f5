"""A database that is only read: PostgreSQL in one transaction that cannot write, or a folder of exported tables.

Both give the rows of a statement in batches, so that memory holds one, however many there are. What goes wrong is said
in words that quote neither a row nor a password.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from consilium_client.data import bounds
from consilium_client.data.columns import header, is_parquet
from consilium_client.data.lines import read_lines
from consilium_client.intake.selects import Source
from consilium_client.intake.sql_settings import Folder, PostgreSql
from consilium_shared.errors import ConfigurationError, DataError, TransportError
from consilium_shared.printable import printable

BATCH = 2**16
"""Rows of a batch."""
_SPELT = {"utf-8": "utf-8", "iso8859-1": "latin-1", "utf-16": "utf-16"}
_OURS = {
    "42P01": "no such table",
    "42703": "no such column",
    "42501": "this account may not read it; give it SELECT",
    "42883": "a column of another type than site.yaml compares it with; quote numbers that are text there",
    "57014": "the statement took longer than timeout",
    "53100": "the server's disk is full",
}
"""SQLSTATE -> what it means here. Of the first three the server's own words name tables and columns alone."""

Rows = Callable[[sa.Select[Any]], Iterator[pd.DataFrame]]
"""Batches of a statement's rows, all of them text."""


@contextmanager
def opened(source: PostgreSql | Folder) -> Iterator[tuple[Rows, Source]]:
    """A source while it is read; paths are absolute.

    Raises:
        ConfigurationError: what site.yaml names is not there, or may not be read.
        TransportError: the server does not answer, or ended the connection.
        DataError: a file or a row that cannot be read.
    """
    with _postgresql(source) if isinstance(source, PostgreSql) else _folder(source) as found:
        yield found


# -- PostgreSQL


@contextmanager
def _postgresql(source: PostgreSql) -> Iterator[tuple[Rows, Source]]:
    engine = sa.create_engine(
        sa.URL.create("postgresql+psycopg", source.user, None, None, source.port, source.database),
        connect_args=_arguments(source),
        poolclass=sa.NullPool,
        hide_parameters=True,
    )
    at = f"{source.host}:{source.port}"
    try:
        connection = engine.connect()
    except sa.exc.DBAPIError as error:
        # The driver's words about a connection: host, port, account, no password and no row.
        raise TransportError(f"cannot connect to {at}: {printable(' '.join(str(error.orig).split()))}") from None
    try:
        # One snapshot for all statements, and no statement can write.
        connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

        def rows(statement: sa.Select[Any]) -> Iterator[pd.DataFrame]:
            try:
                result = connection.execution_options(stream_results=True, yield_per=BATCH).execute(statement)
                for some in result.partitions():
                    yield pd.DataFrame(some, columns=list(result.keys()), dtype=object)
            except sa.exc.DBAPIError as error:
                raise _complaint(error, at) from None

        yield rows, Source(source.db_schema, untyped=False)
    finally:
        connection.close()
        engine.dispose()


def _arguments(source: PostgreSql) -> dict[str, Any]:
    """Arguments of the driver, which no message shows."""
    arguments: dict[str, Any] = {
        "host": source.host,
        "connect_timeout": 30,
        "application_name": "consilium-site",
        # Before any statement of ours, and whatever the account's own defaults are.
        "options": f"-c default_transaction_read_only=on -c statement_timeout={source.timeout * 1000} "
        "-c lock_timeout=30000 -c datestyle=ISO -c intervalstyle=iso_8601 -c extra_float_digits=1",
    }
    if source.tls is not None:
        arguments |= {"sslmode": "verify-full", "sslrootcert": str(source.tls.ca)}
        if source.tls.certificate is not None:
            arguments |= {"sslcert": str(source.tls.certificate), "sslkey": str(source.tls.key)}
    if (password := _password(source)) is not None:
        arguments["password"] = password
    return arguments


def _password(source: PostgreSql) -> str | None:
    if source.password_env is not None:
        found = os.environ.get(source.password_env)
        if not found:
            raise ConfigurationError(f"site.yaml: password_env: the environment has no {source.password_env}")
        return found
    if source.password is None:
        return None
    try:
        return source.password.read_text("utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise ConfigurationError(f"cannot read the password in {source.password}: {why}") from None


def _complaint(error: sa.exc.DBAPIError, at: str) -> Exception:
    """Our words for an error of the server's, whose own may quote a row."""
    state = getattr(error.orig, "sqlstate", None) or ""
    if state in ("42P01", "42703", "42501"):
        words = printable(str(getattr(getattr(error.orig, "diag", None), "message_primary", "")))
        return ConfigurationError(f"{at}: {words}: {_OURS[state]}")
    if state == "42883":
        return ConfigurationError(f"{at}: {_OURS[state]}")
    if not state or state[:2] in ("08", "57") or error.connection_invalidated:
        return TransportError(f"{at}: {_OURS.get(state, 'the server ended the connection')}")
    return DataError(f"{at}: {_OURS.get(state, f'the statement failed with SQLSTATE {state}')}")


# -- a folder


@contextmanager
def _folder(source: Folder) -> Iterator[tuple[Rows, Source]]:
    files = _files(source.path)
    connection = duckdb.connect(
        ":memory:",
        config={
            "memory_limit": f"{source.memory_mib}MiB",
            "temp_directory": "",  # nothing of a patient's goes to a disk by itself
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "python_enable_replacements": False,
        },
    )
    seen: set[str] = set()
    try:
        connection.execute(f"SET allowed_directories = [{_literal(str(source.path.resolve()))}]")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")

        def rows(statement: sa.Select[Any]) -> Iterator[pd.DataFrame]:
            for table in _tables(statement):
                if table.name not in seen:
                    _view(connection, source, table.name, files)
                    seen.add(table.name)
            compiled = statement.compile(
                dialect=postgresql.dialect(paramstyle="named"),  # type: ignore[no-untyped-call]
                compile_kwargs={"literal_binds": True},
            )
            try:
                for batch in connection.sql(str(compiled)).to_arrow_reader(BATCH):
                    yield batch.to_pandas().astype(object)
            except duckdb.BinderException as error:
                raise ConfigurationError(f"{source.path}: {_first(error)}") from None
            except duckdb.OutOfMemoryException:
                raise DataError(
                    f"{source.path}: a join takes more than memory_mib ({source.memory_mib}); give it more"
                ) from None
            except duckdb.Error as error:  # its words may quote a row
                raise DataError(f"{source.path}: a table cannot be read ({type(error).__name__})") from None

        yield rows, Source(None, untyped=True)
    finally:
        connection.close()


def _first(error: Exception) -> str:
    """The first line of a binder's words: it has seen names, and no row yet."""
    return printable(str(error).splitlines()[0])


def _tables(statement: sa.Select[Any]) -> Iterator[sa.TableClause]:
    found: dict[str, sa.TableClause] = {}
    for each in sa.sql.visitors.iterate(statement):
        if isinstance(each, sa.TableClause):
            found[each.name] = each
    yield from found.values()


def _files(folder: Path) -> dict[str, list[Path]]:
    """Tables of a folder: name in small letters -> its files."""
    if not folder.is_dir():
        raise ConfigurationError(f"{folder} is no folder")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.name.lower()
        for ending in (".csv", ".csv.gz", ".parquet"):
            if name.endswith(ending) and not name.startswith("."):
                found.setdefault(name.removesuffix(ending), []).append(path)
    return found


def _view(connection: Any, source: Folder, name: str, files: dict[str, list[Path]]) -> None:
    """Make a table's file known; a CSV file has as many rows as our own reader finds, which no stray mark deceives."""
    here = files.get(name.lower(), [])
    if len(here) != 1:
        what = f"no file {name}.csv, {name}.csv.gz or {name}.parquet" if not here else "several files of the table"
        raise ConfigurationError(f"{source.path} has {what}{'' if not here else f' {name}'}")
    path = here[0]
    bounds.require_file(path, "a table")
    if is_parquet(path):
        connection.read_parquet(str(path.resolve())).create_view(name)
        return
    lines = read_lines(path, None, source.csv)
    columns = ", ".join(f"{_literal(column)}: 'VARCHAR'" for column in header(path, source.csv))
    made = (  # names alone, each quoted
        f"SELECT * FROM read_csv({_literal(str(path.resolve()))}, auto_detect=false, header=true, "  # noqa: S608
        f"columns={{{columns}}}, delim={_literal(source.csv.delimiter)}, quote='\"', escape='\"', strict_mode=true, "
        f"encoding={_literal(_SPELT[source.csv.encoding])}, max_line_size={max(2**20, 2 * lines.longest)})"
    )
    try:
        connection.execute(f"CREATE VIEW {_quoted(name)} AS {made}")
        ((count,),) = connection.execute(f"SELECT count(*) FROM {_quoted(name)}").fetchall()  # noqa: S608
    except duckdb.Error as error:
        raise DataError(f"{path}: not a readable table ({type(error).__name__})") from None
    if count != lines.rows:
        raise DataError(f"{path}: {lines.rows} rows were meant, and {count} were read; it is damaged")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(word: str) -> str:
    return "'" + word.replace("'", "''") + "'"
