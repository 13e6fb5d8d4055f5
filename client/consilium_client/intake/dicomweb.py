"""An archive asked by DICOMweb: QIDO-RS for what there is, WADO-RS for the instances, over HTTPS."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from consilium_client.intake.association import client_context
from consilium_client.intake.inbox import Inbox
from consilium_client.intake.multipart import boundary_of, parts
from consilium_client.intake.pull import Found
from consilium_client.intake.settings import WebArchive
from consilium_client.intake.worklist import Wanted
from consilium_shared.config import read_text
from consilium_shared.errors import ConfigurationError, DataError, TransportError

_PAGE = 500
"""Results per page of a query."""
_MOST = 1_000_000
_LONGEST = 65
"""Characters that are kept of a value: one more than a UID has, so that a longer one stays none."""
_JSON_BYTES = 64 * 2**20
_PIECE = 256 * 2**10
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")
_DICOM = 'multipart/related; type="application/dicom"; transfer-syntax=*'
"""Transfer syntaxes as the archive stores them: it need not decode anything."""
_TAGS = {"study": "0020000D", "series": "0020000E", "instance": "00080018", "accession": "00080050"}


class WebSource:
    """An archive with a DICOMweb service; see ``pull.Source``."""

    def __init__(self, archive: WebArchive, inbox: Inbox) -> None:
        """Speaks to nobody yet.

        Raises:
            ConfigurationError: a token, password or TLS file cannot be used.
        """
        self._archive, self._inbox = archive, inbox
        headers, auth = {}, None
        if archive.token is not None:
            headers["Authorization"] = f"Bearer {_secret(archive.token)}"
        if archive.password is not None:
            user, colon, password = _secret(archive.password).partition(":")
            if not colon:
                raise ConfigurationError(f"{archive.password}: one line is needed, user:password")
            auth = httpx.BasicAuth(user, password)
        self._client = httpx.Client(
            headers=headers,
            auth=auth,
            verify=client_context(archive.tls) if archive.tls is not None else False,  # http on this machine alone
            timeout=archive.timeout,
            follow_redirects=False,  # a token goes to the address in site.yaml and nowhere else
            trust_env=False,
        )

    @contextmanager
    def _asked(self, path: str, accept: str, **query: Any) -> Iterator[httpx.Response]:
        try:
            with self._client.stream(
                "GET", f"{self._archive.url.rstrip('/')}/{path}", params=query, headers={"Accept": accept}
            ) as answer:
                if answer.status_code not in (200, 204, 206):
                    raise TransportError(
                        f"the archive answers HTTP {answer.status_code}{_HINTS.get(answer.status_code, '')}"
                    )
                yield answer
        except httpx.HTTPError as error:
            raise TransportError(f"{self._archive.url} cannot be asked: {_cause(error)}") from error

    def _search(self, path: str, **query: Any) -> list[dict[str, str]]:
        """UIDs and accession numbers of all answers, page by page: a service may give fewer than were asked for."""
        found: list[dict[str, str]] = []
        while True:
            with self._asked(path, "application/dicom+json", limit=_PAGE, offset=len(found), **query) as answer:
                body = b"" if answer.status_code == 204 else _bounded(answer)
            page = [{what: _value(each, what) for what in _TAGS} for each in _answers(body)]
            if not page or page[-1] in found[-len(page) :]:  # a service that knows no offset gives the same again
                return found
            found += page
            if len(found) > _MOST:
                raise DataError("the archive gives more answers than anybody can have asked for")

    def studies(self, wanted: Wanted) -> list[str]:
        """Study instance UIDs of a study of the list."""
        key = {"StudyInstanceUID": wanted.study} if wanted.study else {"AccessionNumber": wanted.accession}
        return [
            uid
            for each in self._search("studies", includefield="00080050", **key)
            if (uid := each["study"])
            and (uid == wanted.study if wanted.study else each["accession"] == wanted.accession)
        ]

    def instances(self, study: str) -> list[Found]:
        """Every instance of a study."""
        found = []
        for each in self._search(f"studies/{_path(study)}/instances"):
            series, instance = each["series"], each["instance"]
            if series and instance:
                found.append(Found(study, series, instance))
        return found

    def fetch(self, study: str, missing: Sequence[Found], whole: bool) -> None:
        """Bring instances into the inbox, one request each: what has come need not come again."""
        for found in missing:
            path = f"studies/{_path(study)}/series/{_path(found.series)}/instances/{_path(found.instance)}"
            with self._asked(path, _DICOM) as answer:
                self._inbox.require_room()
                boundary = boundary_of(answer.headers.get("Content-Type", ""))
                for number, content in enumerate(parts(answer.iter_bytes(_PIECE), boundary)):
                    if number:
                        raise DataError("the archive sends several instances where one was asked for")
                    self._keep(found.instance, content)

    def _keep(self, instance: str, content: Iterator[bytes]) -> None:
        most, size = self._inbox.limits.object_mib * 2**20, 0
        fd, name = tempfile.mkstemp(dir=self._inbox.arriving, suffix=".dcm")
        try:
            with os.fdopen(fd, "wb") as file:
                for piece in content:
                    size += len(piece)
                    if size > most:
                        raise DataError(f"an instance larger than {self._inbox.limits.object_mib} MiB")
                    file.write(piece)
            with Path(name).open("rb") as file:
                if file.read(132)[128:] != b"DICM":
                    raise DataError("the archive sent something that is no DICOM file")
            self._inbox.keep(instance, Path(name), f"DICOMweb from {self._archive.url}")
        finally:
            Path(name).unlink(missing_ok=True)


_HINTS = {
    401: ": token or password are not accepted",
    403: ": this site may not ask for that",
    404: ": no such study or service",
    429: ": too many questions; try again later",
    503: ": busy; try again later",
}


def _secret(path: Path) -> str:
    text = read_text(path).strip()
    if not text or not text.isprintable() or not text.isascii():
        raise ConfigurationError(f"{path}: one line of printable ASCII is needed")
    return text


def _cause(error: Exception) -> str:
    return str(error) or type(error).__name__


def _bounded(answer: httpx.Response) -> bytes:
    body = bytearray()
    for piece in answer.iter_bytes(_PIECE):
        body += piece
        if len(body) > _JSON_BYTES:
            raise DataError("the archive's answer to a search is larger than any")
    return bytes(body)


def _answers(body: bytes) -> list[dict[str, Any]]:
    if not body.strip():
        return []
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise TransportError("the archive's answer to a search is no JSON") from error
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise TransportError("the archive's answer to a search is no list of studies or instances")
    return found


def _value(answer: dict[str, Any], what: str) -> str:
    try:
        return str(answer[_TAGS[what]]["Value"][0]).strip()[:_LONGEST]
    except (KeyError, IndexError, TypeError):
        return ""


def _path(uid: str) -> str:
    if len(uid) > 64 or not _UID.fullmatch(uid):
        raise DataError("the archive names something by a UID that is none")
    return uid
