"""Pseudonyms of patients, new UIDs, and the days by which a patient's dates move.

All follow from one key of the site's by HMAC-SHA-256, so that they are the same at every run and in every source, and
without the key nobody can link them to people, not even with a list of the hospital's identifiers. The table back from
pseudonyms to people is for hospital IT alone.
"""

from __future__ import annotations

import base64
import datetime
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives import hashes, hmac
from pydicom._uid_dict import UID_dictionary

from consilium_client.data.identity import canonical, unusable
from consilium_shared.errors import ConfigurationError, DataError, IntegrityError
from consilium_shared.identity import write_secret

_KEY_BYTES = 32
_TABLE = """
CREATE TABLE IF NOT EXISTS people (
    pseudonym TEXT PRIMARY KEY, patient TEXT NOT NULL, issuer TEXT NOT NULL
);
"""


class Pseudonyms:
    """New names under a site's key."""

    def __init__(self, folder: Path, shift_days: int) -> None:
        """Opens key and table, and makes them where there are none.

        Args:
            folder: ``intake`` in the home folder.
            shift_days: most days by which dates move.

        Raises:
            ConfigurationError: the folder cannot be written, or there is a table and no key.
            IntegrityError: the key or the table is damaged.
        """
        self._shift_days = shift_days
        key, table = folder / "pseudonym.key", folder / "people.sqlite3"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not key.exists():
                if table.exists():
                    raise ConfigurationError(
                        f"{key} is missing, but {table} is there: a new key would give everybody a second name. "
                        "Restore the key from the backup"
                    )
                write_secret(key, secrets.token_bytes(_KEY_BYTES).hex().encode())
            self._key = bytes.fromhex(key.read_text("ascii").strip())
            self._people = sqlite3.connect(table, timeout=60, isolation_level=None)
            table.chmod(0o600)
            self._people.execute("PRAGMA synchronous=FULL")
            self._people.executescript(_TABLE)
        except OSError as error:
            raise ConfigurationError(f"cannot use {folder} for pseudonyms: {error.strerror}") from error
        except ValueError as error:
            raise IntegrityError(f"{key} is damaged; restore it from the backup") from error
        except sqlite3.DatabaseError as error:
            raise IntegrityError(f"{table} is damaged: {error}; restore it from the backup") from error
        if len(self._key) != _KEY_BYTES:
            raise IntegrityError(f"{key} is damaged; restore it from the backup")

    def _derive(self, domain: str, value: str) -> bytes:
        made = hmac.HMAC(self._key, hashes.SHA256())
        made.update(f"consilium intake {domain}\0{value}".encode())
        return made.finalize()

    def patient(self, identifier: str, issuer: str = "") -> str:
        """The pseudonym of a person, which goes into the table back.

        Args:
            identifier: as a source has it; one spelling is made of it (``data.identity``).
            issuer: who gave the identifier, where the source says that.

        Raises:
            DataError: no identifier, one that names nobody, or one that another issuer has given, too.
        """
        one, by = canonical(identifier), canonical(issuer).casefold()
        if not one:
            raise DataError("no identifier of the patient")
        why = unusable(one)
        if why is not None:
            raise DataError(f"the patient's identifier is {why}")
        name = "P" + base64.b32encode(self._derive("patient", one))[:20].decode("ascii")
        found = self._people.execute("SELECT issuer FROM people WHERE pseudonym = ?", (name,)).fetchone()
        if found is None:
            self._people.execute("INSERT INTO people VALUES (?, ?, ?)", (name, one, by))
            return name
        (known,) = found
        if by and known and by != known:
            raise DataError("a patient's identifier that several issuers gave: two people may have it")
        if by and not known:
            self._people.execute("UPDATE people SET issuer = ? WHERE pseudonym = ?", (by, name))
        return name

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context in which many people go into the table at once: they are on the disk when it ends, or none is."""
        self._people.execute("BEGIN IMMEDIATE")
        with self._people:  # commits at its end, or rolls back
            yield

    def person(self, pseudonym: str) -> tuple[str, str]:
        """Identifier and issuer of a pseudonym; raises DataError where there is none."""
        found = self._people.execute("SELECT patient, issuer FROM people WHERE pseudonym = ?", (pseudonym,)).fetchone()
        if found is None:
            raise DataError(f"{pseudonym} is no pseudonym of this site")
        return str(found[0]), str(found[1])

    def uid(self, uid: str) -> str:
        """The new UID of one. Those that DICOM itself gives stay: classes, well-known frames of reference."""
        if uid in UID_dictionary:
            return uid
        made = bytearray(self._derive("uid", uid)[:16])
        made[6] = made[6] & 0x0F | 0x80  # a UUID of version 8, as the root 2.25 asks for one
        made[8] = made[8] & 0x3F | 0x80
        return f"2.25.{int.from_bytes(made, 'big')}"

    def record(self, identifier: str) -> str:
        """The new name of a record, such as a stay; nothing leads back from it."""
        return "R" + base64.b32encode(self._derive("record", identifier))[:20].decode("ascii")

    def days(self, pseudonym: str) -> int:
        """Days by which a patient's dates move back: 1 … ``shift_days``."""
        return 1 + int.from_bytes(self._derive("days", pseudonym)[:8], "big") % self._shift_days

    def date(self, pseudonym: str, date: str) -> str:
        """A date (``YYYYMMDD`` or ``YYYY-MM-DD``) moved back, in the same form; raises DataError for anything else."""
        form = "%Y-%m-%d" if "-" in date else "%Y%m%d"
        try:
            if len(date) != (10 if "-" in date else 8):
                raise ValueError
            moved = datetime.datetime.strptime(date, form).date() - datetime.timedelta(days=self.days(pseudonym))
        except (ValueError, OverflowError):
            raise DataError("a date that is none") from None
        return f"{moved.year:04}{moved.strftime('-%m-%d' if '-' in date else '%m%d')}"
