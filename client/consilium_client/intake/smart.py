"""A bulk export is asked of a FHIR server and fetched (SMART Backend Services, Bulk Data Access 2).

A pull that broke off is simply run again: it asks for the job that it had, and for the files that had not come.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from consilium_client.intake import export_folder
from consilium_client.intake.association import client_context
from consilium_client.intake.fhir_server import FhirServer
from consilium_client.intake.settings import Limits
from consilium_shared.errors import ConfigurationError, DataError, TransportError
from consilium_shared.files import write_atomically
from consilium_shared.printable import printable

KINDS = ("Patient", "Observation", "Condition", "MedicationStatement", "DiagnosticReport")
"""Resources that ``import-fhir`` reads; others are not asked for."""
ASSERTION_SECONDS = 240
"""Validity of an assertion; servers take at most five minutes."""
TOKEN_MARGIN = 60.0
"""Seconds before its end at which a token is no longer used."""
PAUSE, LONGEST_PAUSE = 5.0, 300.0
"""Seconds between two looks at a job: where the server names none, and at most."""
_MOST_FILES = 100_000
_JSON_BYTES = 64 * 2**20
_PIECE = 256 * 2**10
_DETAIL = 200

Say = Callable[[str], None]


@dataclass(frozen=True)
class Pulled:
    """Outcome of a pull: number of files and their bytes, and how many of them were here already."""

    files: int
    size: int
    here_before: int


def pull(server: FhirServer, folder: Path, limits: Limits, say: Say = lambda _: None) -> Pulled:
    """Fetch a new export of the server's into ``folder``, in the place of the one before.

    Args:
        server: whom to ask; its paths are absolute.
        folder: of the export; what else lies in it is never deleted.
        limits: ``inbox_gib`` bounds an export, ``keep_free_gib`` the disk.
        say: told what happens, a line each.

    Raises:
        ConfigurationError: a key or TLS file cannot be used, or the folder holds files of others.
        TransportError: the server does not answer, refuses, or takes too long; run it again.
        DataError: an answer or a file is not as the standard has it.
    """
    arriving = export_folder.arriving(folder)
    job = _Job(arriving / export_folder.JOB)
    with _Client(server) as client:
        outputs = _outputs(client, server, job, say)
        here = size = 0
        names = _names(outputs)
        for number, (name, output) in enumerate(zip(names, outputs, strict=True), start=1):
            if name in job.done:
                here, size = here + 1, size + (arriving / name).stat().st_size
                continue
            size += client.fetch(output, arriving / name, int(limits.inbox_gib * 2**30) - size, limits)
            job.came(name)
            say(f"{name}, {number} of {len(outputs)}")
        export_folder.complete(folder, names)
        client.forget(job.address)
    return Pulled(len(names), size, here)


class _Job:
    """The export under way, on the disk: the address of its state at the server, and the files that have come."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.address, self.done = "", set[str]()
        try:
            found = json.loads(file.read_bytes())
            self.address, self.done = str(found["address"]), set(map(str, found["done"]))
        except (OSError, ValueError, TypeError, KeyError):
            pass

    def begin(self, address: str) -> None:
        export_folder.begin_anew(self._file.parent)
        self.address, self.done = address, set()
        self._write()

    def came(self, name: str) -> None:
        self.done.add(name)
        self._write()

    def _write(self) -> None:
        write_atomically(self._file, json.dumps({"address": self.address, "done": sorted(self.done)}).encode())


class _Client:
    """The server, asked with tokens of its own."""

    def __init__(self, server: FhirServer) -> None:
        self._server = server
        self._key, self._algorithm = _key(server.key)
        self._token, self._until = "", 0.0
        self._origin = _host(server.url)
        self._http = httpx.Client(
            verify=client_context(server.tls),
            timeout=server.timeout,
            follow_redirects=False,  # a token goes to the addresses in site.yaml and nowhere else
            trust_env=False,
        )

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def token(self) -> str:
        """An access token that still holds for a while."""
        if time.monotonic() < self._until:
            return self._token
        now, url = int(time.time()), self._server.token_url
        claims = {
            **dict.fromkeys(("iss", "sub"), self._server.client_id),
            "aud": url,
            "jti": str(uuid.uuid4()),
            "iat": now,
            "exp": now + ASSERTION_SECONDS,
        }
        assertion = jwt.encode(claims, self._key, algorithm=self._algorithm, headers={"kid": self._server.key_id})
        form = {
            "grant_type": "client_credentials",
            "scope": self._server.scope,
            "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
            "client_assertion": assertion,
        }
        with self._asked("POST", url, data=form) as answer:
            found = _json(answer, "the token")
            if answer.status_code != 200:
                why = printable(str(found.get("error_description") or found.get("error") or ""))[:_DETAIL]
                raise TransportError(
                    f"{url} gives no token (HTTP {answer.status_code}{f': {why}' if why else ''}): see that client_id, "
                    "key_id and scope are those that were registered, and that this machine's clock is right"
                )
        token, seconds = found.get("access_token"), found.get("expires_in")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise DataError(f"{url} answers without a token")
        lasts = float(seconds) if isinstance(seconds, int | float) else 300.0
        self._token, self._until = token, time.monotonic() + max(lasts - TOKEN_MARGIN, 0.0)
        return token

    @contextmanager
    def asked(
        self, method: str, url: str, accept: str = "application/fhir+json", **more: Any
    ) -> Iterator[httpx.Response]:
        """An answer of the server's own host, with a token."""
        if _host(url) != self._origin:
            raise DataError(f"the server names an address at another host ({printable(_host(url))[:_DETAIL]})")
        headers = {"Accept": accept, "Authorization": f"Bearer {self.token()}", **more.pop("headers", {})}
        with self._asked(method, url, headers=headers, **more) as answer:
            yield answer

    @contextmanager
    def _asked(self, method: str, url: str, **more: Any) -> Iterator[httpx.Response]:
        try:
            with self._http.stream(method, url, **more) as answer:
                yield answer
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise TransportError(f"{_host(url)} cannot be asked: {str(error) or type(error).__name__}") from None

    def fetch(self, output: dict[str, Any], to: Path, most: int, limits: Limits) -> int:
        """Bring one file; its bytes. It is there whole, or not at all."""
        url, host = output["url"], _host(output["url"])
        accept = "application/fhir+ndjson"
        if host == self._origin:
            opened = self.asked("GET", url, accept)
        elif host in self._server.files_from:
            opened = self._asked("GET", url, headers={"Accept": accept})
        else:
            raise DataError(
                f"the server's files lie at {printable(host)[:_DETAIL]}: add that host to files_from in site.yaml if "
                "this site may ask there"
            )
        part = to.with_suffix(".part")
        try:
            with opened as answer, part.open("wb") as file:
                if answer.status_code != 200:
                    raise _refused(answer, f"the file {to.name}")
                size = lines = 0
                last = b"\n"
                for piece in answer.iter_bytes(_PIECE):
                    size += len(piece)
                    if size > most:
                        raise DataError(f"the export is larger than {limits.inbox_gib} GiB (intake.limits.inbox_gib)")
                    if shutil.disk_usage(to.parent).free < limits.keep_free_gib * 2**30 + len(piece):
                        raise ConfigurationError(f"the disk of {to.parent} is full: make room and pull again")
                    file.write(piece)
                    lines, last = lines + piece.count(b"\n"), piece[-1:] or last
                file.flush()
                os.fsync(file.fileno())
            lines += last != b"\n"
            count = output.get("count")
            if isinstance(count, int) and not isinstance(count, bool) and count != lines:
                raise DataError(f"{to.name} has {lines} lines where the server says {count}: it is asked for again")
            part.replace(to)
            return size
        except OSError as error:
            raise ConfigurationError(f"cannot write {to}: {error.strerror}") from None
        finally:
            part.unlink(missing_ok=True)

    def forget(self, address: str) -> None:
        """Tell the server that its files are no longer needed; whether it hears it does not matter."""
        try:
            with self.asked("DELETE", address):
                pass
        except (TransportError, DataError):
            return


def _outputs(client: _Client, server: FhirServer, job: _Job, say: Say) -> list[dict[str, Any]]:
    """Files of an export that is done: of the job that was under way, or of a new one."""
    if job.address:
        try:
            return _waited(client, server, job.address, say)
        except _Gone:
            say("the server no longer knows the export that was under way; a new one begins")
    where = "/Patient/$export" if server.group is None else f"/Group/{server.group}/$export"
    asked = {"_type": ",".join(KINDS), **({} if server.since is None else {"_since": server.since})}
    with client.asked(
        "GET", server.url.rstrip("/") + where, params=asked, headers={"Prefer": "respond-async"}
    ) as answer:
        address = answer.headers.get("Content-Location", "")
        if answer.status_code != 202 or not address:
            raise _refused(answer, "an export")
    job.begin(str(httpx.URL(server.url).join(address)))
    say("the server makes an export")
    try:
        return _waited(client, server, job.address, say)
    except _Gone:
        raise TransportError("the server does not know the export that it has just begun") from None


class _Gone(Exception):
    """The server no longer knows a job."""


def _waited(client: _Client, server: FhirServer, address: str, say: Say) -> list[dict[str, Any]]:
    until, told = time.monotonic() + server.patience_hours * 3600, ""
    while True:
        with client.asked("GET", address, "application/json") as answer:
            if answer.status_code == 200:
                return _listed(_json(answer, "the list of files"))
            if answer.status_code in (404, 410):
                raise _Gone
            if answer.status_code not in (202, 429, 503):
                raise _refused(answer, "the export")
            progress = printable(answer.headers.get("X-Progress", ""))[:_DETAIL]
            pause = _seconds(answer.headers.get("Retry-After"))
        if progress and progress != told:
            say(progress)
            told = progress
        if time.monotonic() + pause > until:
            raise TransportError(
                f"the export is not ready after {server.patience_hours:g} hours (patience_hours); pull again to go on"
            )
        time.sleep(pause)


def _seconds(text: str | None) -> float:
    """Pause that ``Retry-After`` asks for; dates there, which few servers send, count as none."""
    try:
        return min(max(float(text or ""), 0.1), LONGEST_PAUSE)
    except ValueError:
        return PAUSE


def _listed(found: dict[str, Any]) -> list[dict[str, Any]]:
    outputs, errors = found.get("output"), found.get("error")
    if not isinstance(outputs, list) or len(outputs) > _MOST_FILES:
        raise DataError("the server's list of files has no output")
    if errors:
        raise DataError("the server could not export everything: its list names errors; ask whoever runs it")
    for each in outputs:
        kind, url = (each.get("type"), each.get("url")) if isinstance(each, dict) else (None, None)
        if kind not in KINDS or not isinstance(url, str) or not url.startswith("https://"):
            raise DataError("the server's list of files names a resource that was not asked for, or no https address")
    return outputs


def _names(outputs: list[dict[str, Any]]) -> list[str]:
    counts: dict[str, int] = {}
    names = []
    for each in outputs:
        number = counts[each["type"]] = counts.get(each["type"], -1) + 1
        names.append(f"{each['type']}.{number:03d}.ndjson")
    return names


def _json(answer: httpx.Response, what: str) -> dict[str, Any]:
    body = bytearray()
    for piece in answer.iter_bytes(_PIECE):
        body += piece
        if len(body) > _JSON_BYTES:
            raise DataError(f"the server's answer for {what} is larger than any")
    try:
        found = json.loads(bytes(body) or b"{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"the server's answer for {what} is no JSON object (HTTP {answer.status_code})")
    return found


_HINTS = {
    401: "the token is not accepted",
    403: "this site may not ask for that: see scope and group",
    404: "it knows no such address, or gives no bulk exports",
    429: "too many questions; pull again later",
    503: "it is busy; pull again later",
}


def _refused(answer: httpx.Response, what: str) -> TransportError:
    hint = _HINTS.get(answer.status_code)
    return TransportError(f"the server refuses {what}: HTTP {answer.status_code}{f', {hint}' if hint else ''}")


def _key(path: Path) -> tuple[Any, str]:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise ConfigurationError(f"{path} is no PEM file with a private key without a password") from None
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
        return key, "RS384"
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP384R1):
        return key, "ES384"
    raise ConfigurationError(f"{path}: SMART takes an RSA key of 2048 bits or more, or one on the curve P-384")


def _host(url: str) -> str:
    """``host`` or ``host:port`` of an https address, in lower case."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    return (parts.hostname or "") + ("" if port in (None, 443) else f":{port}")
