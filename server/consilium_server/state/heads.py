"""Heads of the sites' ledgers from their answers, kept for ever, so that a home that runs twice or was set back shows.

Each answer says the number and the digest of the last entry of its site's ledger when it was made. A ledger only grows,
so of one site there is one digest for each number, in all studies. And what a site says is in its ledger before it is
sent: so an answer to a question that was never put before, after another answer had come, has a later head than that,
and no two answers have the same (but one that is kept before it is in the ledger, and given after a crash).
Of two copies of a home the one that is behind or level, and a home that was restored from an old backup, breaks the
last two rules with its first answers, and the first rule soon after. An honest site breaks none: its answers may come
late, twice, in any order, from another machine, or after a torn last line, whose entry nobody was told of.

But a server that lost its last lines, or has none yet (a loss of power, an older backup, ``readmit``, a release that
kept no heads), may take a question for new that the site answered long ago. So an answer with an older head than a new
question's is only a doubt. It is settled by a question that certainly is new, since chance made it (``StudyContext``).

heads/<site>.jsonl      one line each, as they came: ["head", number, digest]; ["asked", digest of the question, least
                        number of its answer's head]; ["short", number, digest of the question that was answered at this
                        head]; ["excused", digest of a question that was put before]; ["halted", what was found]
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from consilium_shared.errors import PeerError
from consilium_shared.protocol.messages import Head

CURE = (
    "two copies of this site's home run, or an older one was put back: stop all but one, keep every ledger "
    "(deploy/runbooks/two-homes.md); then consilium-server readmit SITE"
)


class TwoLedgers(PeerError):
    """The site's answers come from two ledgers. ``str`` names the proof and the cure."""


class Doubt(PeerError):
    """The answer is older than it can be, if its question is new. A question that certainly is new tells."""


class _Seen:
    """Reader of one site's file, as far as it was written."""

    def __init__(self, file: Path) -> None:
        self.file, self.offset, self.inode = file, 0, 0
        self.digests: dict[int, str] = {}
        self.asked: dict[str, int] = {}
        self.short: dict[int, str] = {}
        self.furthest = -1
        self.halted: str | None = None

    def read_on(self, data: bytes) -> None:
        """Read complete lines; pass over one that a crash tore."""
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                return
            self.offset += len(line)
            try:
                kind, *values = json.loads(line)
                if kind == "head":
                    number, sha256 = values
                    self.digests.setdefault(int(number), str(sha256))
                    self.furthest = max(self.furthest, int(number))
                elif kind == "asked":
                    self.asked.setdefault(str(values[0]), int(values[1]))
                elif kind == "short":
                    self.short.setdefault(int(values[0]), str(values[1]))
                elif kind == "excused":
                    self.asked[str(values[0])] = 0
                elif kind == "halted":
                    self.halted = str(values[0])
            except (ValueError, TypeError, IndexError):
                continue


class _Write:
    """Appends a line to the file that is open, and takes it in; ends a torn one first."""

    def __init__(self, fd: int, seen: _Seen) -> None:
        self._fd, self._seen = fd, seen

    def __call__(self, *line: str | int) -> None:
        size = os.fstat(self._fd).st_size
        torn = b"\n" if size and os.pread(self._fd, 1, size - 1) != b"\n" else b""
        os.write(self._fd, torn + json.dumps(line).encode() + b"\n")
        self._seen.read_on(os.pread(self._fd, os.fstat(self._fd).st_size - self._seen.offset, self._seen.offset))


class Heads:
    """Heads of all sites' ledgers, as every study's process of this server knows them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[str, _Seen] = {}

    def ask(self, site: str, question: str) -> None:
        """Note that ``site`` is about to be asked the question of this digest; only the first time counts."""
        with self._open(site) as (seen, write):
            if question not in seen.asked:
                write("asked", question, seen.furthest + 1)

    def check(self, site: str, question: str, head: Head, *, short: bool = False, new: bool = False) -> None:
        """Keep the head of a verified answer to a question.

        Args:
            short: the answer was in the ledger before anything else could be answered.
            new: the question was certainly never put before this process put it.

        Raises:
            TwoLedgers: it cannot be of the ledger that the site's answers were of before; now or earlier, until
                ``readmit``.
            Doubt: it cannot be, unless the question was put before.
        """
        with self._open(site) as (seen, write):
            known, least = seen.digests.get(head.seq), seen.asked.get(question, 0)
            found = None
            if known is not None and known != head.sha256:
                found = (
                    f"entry {head.seq} of its ledger is {known[:12]} in one answer and {head.sha256[:12]} in another"
                )
            elif short and seen.short.get(head.seq, question) != question:
                found = f"two answers were made when its ledger ended with entry {head.seq}, and the first was entered"
            elif head.seq < least and new:
                found = f"its ledger had {least} entries or more before it was asked, and {head.seq} when it answered"
            if known is None:
                write("head", head.seq, head.sha256)
            if short and head.seq not in seen.short:
                write("short", head.seq, question)
            if found is not None and seen.halted is None:
                write("halted", found)
            if seen.halted is not None:
                raise TwoLedgers(f"{seen.halted}: {CURE}")
            if head.seq < least:
                raise Doubt(f"its ledger had {least} entries or more, and {head.seq} when it answered: asked anew")

    def excuse(self, site: str, question: str) -> None:
        """Clear the doubt about ``site``, whose ledger goes on: it may have answered this question the time before."""
        with self._open(site) as (_, write):
            write("excused", question)

    def halted(self, site: str) -> str | None:
        """Finding against a site whose answers are not taken any more, or None."""
        if not (self.folder / f"{site}.jsonl").exists():
            return None
        with self._open(site) as (seen, _):
            return seen.halted

    def readmit(self, site: str) -> Path | None:
        """Take the site's next answer as it comes. The file stays, under another name, for the auditor: its path."""
        with self._open(site) as (seen, _):
            if seen.halted is None:
                return None
            kept = next(name for n in range(1, 10**6) if not (name := seen.file.with_suffix(f".{n}.jsonl")).exists())
            seen.file.rename(kept)
            del self._seen[site]
            return kept

    @contextmanager
    def _open(self, site: str) -> Iterator[tuple[_Seen, _Write]]:
        """The file's content as it is now, with all other processes kept out. Lines are written in order: what a loss
        of power takes away is an end of the file, and a shorter file accuses nobody."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        while True:
            file = self.folder / f"{site}.jsonl"
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                here = os.fstat(fd)
                if not file.exists() or file.stat().st_ino != here.st_ino:
                    continue  # it was put aside in this moment
                seen = self._seen.get(site)
                if seen is None or seen.inode != here.st_ino or seen.offset > here.st_size:
                    seen = self._seen[site] = _Seen(file)
                    seen.inode = here.st_ino
                seen.read_on(os.pread(fd, here.st_size - seen.offset, seen.offset))
                yield seen, _Write(fd, seen)
                return
            finally:
                os.close(fd)
