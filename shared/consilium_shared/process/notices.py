"""Notices to people: what happened goes to a command, a web address or a mailbox of IT's choice.

A notice says kind, names of sites and studies, and one sentence; nothing of a patient. It is sent beside the work: a
mail server that does not answer holds nothing up, and is said in the log.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from consilium_shared.config import Strict
from consilium_shared.files import write_atomically
from consilium_shared.printable import printable

SECONDS = 30.0
"""Longest time that a command, a web server or a mail server may take, from the beginning to the end."""

Address = Annotated[str, Field(pattern=r"^[^@\s<>\"]+@[^@\s<>\"]+$", max_length=254)]


class Mail(Strict):
    """A mailbox, and the server that takes mail for it."""

    to: Annotated[list[Address], Field(min_length=1, max_length=50)]
    sender: Address
    server: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9.:\-_]+$")]
    port: Annotated[int, Field(ge=1, le=65535)] = 25
    starttls: bool = False
    """Encryption before anything else is said."""


class Notify(Strict):
    """Receivers of notices; several may be given."""

    command: Annotated[list[str], Field(min_length=1)] | None = None
    """A program with its arguments, without a shell; it reads the notice as a line of JSON."""
    webhook: Annotated[str, Field(pattern=r"^https?://\S+$", max_length=2000)] | None = None
    """An address that the notice is posted to, as JSON with a field ``text``."""
    mail: Mail | None = None

    @model_validator(mode="after")
    def _somebody(self) -> Notify:
        if self.command is None and self.webhook is None and self.mail is None:
            raise ValueError("name command, webhook or mail")
        return self


@dataclass(frozen=True)
class Notice:
    """One thing that people should know.

    Attributes:
        kind: ``site-away``, ``site-back``, ``study-waits``, ``study-ended``, ``proposal``, ``out``, ``certificate`` …
        who: the federation, and at a hospital its site.
        text: one sentence with what to do.
    """

    kind: str
    who: str
    text: str


def send(notice: Notice, to: Notify, say: Callable[[str], None]) -> None:
    """Send a notice to every receiver, one after the other; what fails is said, and nothing raised."""
    ways: list[tuple[str, Callable[[], object]]] = []
    if to.command is not None:
        ways.append(("command", lambda: _run(notice, to.command or [])))
    if to.webhook is not None:
        ways.append(("webhook", lambda: _post(notice, to.webhook or "")))
    if (mail := to.mail) is not None:
        ways.append(("mail", lambda: _mail(notice, mail)))
    for name, way in ways:
        if reason := _within(SECONDS, name, way):
            say(f"a notice ({notice.kind}) was not sent by notify.{name}: {reason}")


_UNDER_WAY: dict[str, threading.Thread] = {}
"""The last thread of each way: one that a slow server keeps busy is waited for by no second one."""


def _within(seconds: float, name: str, way: Callable[[], object]) -> str:
    """The reason for which a way was not gone to its end in time; empty where it was."""
    before = _UNDER_WAY.get(name)
    if before is not None and before.is_alive():
        return "an earlier notice still waits for its end"
    failed: list[str] = []

    def go() -> None:
        try:
            way()
        except Exception as error:  # urllib and smtplib raise what their parts raise
            failed.append(_reason(error))

    thread = _UNDER_WAY[name] = threading.Thread(target=go, daemon=True)
    thread.start()
    thread.join(seconds)
    return f"no end within {seconds:g} s" if thread.is_alive() else "".join(failed)


def _reason(error: Exception) -> str:
    """The cause in words of ours and the system's: an address or an argument may have a token in it, and what the other
    side says may be anything."""
    import urllib.error

    if isinstance(error, urllib.error.HTTPError):
        return f"it answers with status {error.code}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        return _reason(error.reason)
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no end within {error.timeout:g} s"
    if isinstance(error, _Ended):
        return str(error)
    said = error.strerror if isinstance(error, OSError) else None
    return type(error).__name__ + (f": {printable(said)}" if isinstance(said, str) else "")


class _Ended(Exception):
    """A command ended with another status than zero."""


def _run(notice: Notice, command: list[str]) -> None:
    done = subprocess.run(
        command,
        input=json.dumps(asdict(notice)).encode() + b"\n",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode:
        raise _Ended(f"{command[0]} ended with status {done.returncode}")


def _post(notice: Notice, address: str) -> None:
    import urllib.request  # slow to load, as is smtplib

    body = json.dumps({**asdict(notice), "text": f"{notice.who}: {notice.text}"}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})  # noqa: S310  (http or https)
    with urllib.request.urlopen(request, timeout=SECONDS):  # noqa: S310
        pass


def _mail(notice: Notice, mail: Mail) -> None:
    import smtplib
    from email.message import EmailMessage

    message = EmailMessage()
    message["Subject"] = f"Consilium, {notice.who}: {notice.kind}"
    message["From"], message["To"] = mail.sender, ", ".join(mail.to)
    message.set_content(notice.text)
    with smtplib.SMTP(mail.server, mail.port, timeout=SECONDS) as server:
        if mail.starttls:
            server.starttls()
        server.send_message(message)


@dataclass(frozen=True)
class Condition:
    """Something that is so now.

    Attributes:
        kind, text: of the notice.
        after: seconds for which it has to be so before anybody is told.
        over: kind and text of a notice when it is not so any more; None for none.
    """

    kind: str
    text: str
    after: float = 0.0
    over: tuple[str, str] | None = None


class Watch:
    """Conditions that come and go; each is told once, also over a restart."""

    def __init__(self, file: Path) -> None:
        """``file``: keeps what was told; without one, what is so at the first look is not told."""
        self._file = file
        self._known: dict[str, list[object]] | None = None
        try:
            content = json.loads(file.read_bytes())
            self._known = {str(key): list(value) for key, value in content.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            pass

    def look(self, now: Mapping[str, Condition], at: float | None = None) -> list[Condition]:
        """Conditions to be told now.

        Args:
            now: everything that is so, by a name of its own.
            at: the time, seconds since 1970.
        """
        at = time.time() if at is None else at
        first, before = self._known is None, dict(self._known or {})
        known: dict[str, list[object]] = {}
        told: list[Condition] = []
        for name, condition in now.items():
            since, said = before.get(name, [at, False])[:2]
            if not said and (first or at - float(str(since)) >= condition.after):
                said = True
                if not first:
                    told.append(condition)
            known[name] = [since, said, *(condition.over or ())]
        for name, entry in before.items():
            if name not in now and entry[1] and len(entry) == 4:
                told.append(Condition(str(entry[2]), str(entry[3])))
        if known != self._known:
            self._known = known
            write_atomically(self._file, json.dumps(known).encode())
        return told


class Watcher(threading.Thread):
    """Looks every so many seconds, and sends what is to be told; a thread beside the supervisor."""

    def __init__(
        self,
        who: str,
        to: Notify,
        watch: Watch,
        conditions: Callable[[], Mapping[str, Condition]],
        say: Callable[[str], None],
        seconds: float = 30.0,
    ) -> None:
        super().__init__(daemon=True)
        self._who, self._to, self._watch, self._conditions = who, to, watch, conditions
        self._say, self._seconds = say, seconds

    def once(self) -> None:
        """Look once."""
        for condition in self._watch.look(self._conditions()):
            send(Notice(condition.kind, self._who, condition.text), self._to, self._say)

    def run(self) -> None:
        """Look for ever. What a look meets is said and not fatal: the next one may do better."""
        while True:
            time.sleep(self._seconds)
            try:
                self.once()
            except Exception as error:
                self._say(f"the look for notices failed ({type(error).__name__}: {error})")
