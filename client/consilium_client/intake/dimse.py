"""An archive asked by DICOM's network services: C-FIND for what there is, C-GET or C-MOVE for the instances."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE, build_context, build_role
from pynetdicom._globals import ALL_TRANSFER_SYNTAXES
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from consilium_client.intake import association
from consilium_client.intake.inbox import Inbox
from consilium_client.intake.pull import Found
from consilium_client.intake.settings import DimseArchive
from consilium_client.intake.worklist import Wanted
from consilium_shared.errors import DataError, TransportError
from consilium_shared.transport import storage_scp

_PENDING, _SUCCESS = (0xFF00, 0xFF01), 0x0000
_NOT_ALL = (0xA702, 0xB000)
"""Status codes by which an archive says that it could not send all instances."""
_ANSWERS = 1_000_000
"""Largest number of answers to one query; an archive that gives more is cut off."""
_CONTEXTS = 127
"""An association has at most 128 presentation contexts; one is for the question."""
_LONGEST = 65
"""Characters that are kept of an answer's value: one more than a UID has, so that a longer one stays none."""
_NAMED_AT_ONCE = 100
"""Instances named in one question."""


class DimseSource:
    """An archive in the hospital's DICOM network; see ``pull.Source``."""

    def __init__(self, archive: DimseArchive, inbox: Inbox, destination: str) -> None:
        """Speaks to nobody yet.

        Args:
            archive: where it is, and how to ask.
            inbox: takes what C-GET brings.
            destination: title to which C-MOVE sends: that of this site's receiver, which must be running.

        Raises:
            ConfigurationError: the TLS files cannot be used.
        """
        storage_scp.prepare(inbox.arriving)
        self._archive, self._inbox, self._destination = archive, inbox, destination
        self._tls = None if archive.tls is None else (association.client_context(archive.tls), archive.host)

    @contextmanager
    def _associated(
        self, contexts: Sequence[tuple[str, list[str]]], roles: Sequence[Any] = (), wanted: Container[str] = ()
    ) -> Iterator[Any]:
        entity = AE(ae_title=self._archive.calling)
        entity.maximum_pdu_size = storage_scp.PDU_BYTES
        timeout = self._archive.timeout
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = timeout
        entity.requested_contexts = [build_context(abstract, transfer) for abstract, transfer in contexts]
        made = entity.associate(
            self._archive.host,
            self._archive.port,
            ae_title=self._archive.ae_title,
            max_pdu=storage_scp.PDU_BYTES,
            ext_neg=list(roles),
            tls_args=self._tls,
            evt_handlers=association.handlers(self._inbox, timeout, "C-GET from", wanted),
        )
        where = f"{self._archive.ae_title} at {self._archive.host}:{self._archive.port}"
        if not made.is_established:
            why = (
                f"rejects the title {self._archive.calling}, or its own"
                if made.is_rejected
                else "cannot be reached, or breaks off"
            )
            raise TransportError(f"{where} {why}")
        try:
            yield made
        finally:
            made.release()

    def _find(self, level: str, **keys: str) -> list[dict[str, str]]:
        """The values of these keys in every answer. Nothing else of an answer is kept."""
        query = Dataset()
        query.QueryRetrieveLevel = level
        for keyword, value in keys.items():
            setattr(query, keyword, value)
        found = []
        model = StudyRootQueryRetrieveInformationModelFind
        with self._associated([(model, ALL_TRANSFER_SYNTAXES[:2])]) as made:
            for status, answer in made.send_c_find(query, model):
                code = getattr(status, "Status", None)
                if code in _PENDING and answer is not None:
                    found.append({each: str(answer.get(each) or "").strip()[:_LONGEST] for each in keys})
                    if len(found) > _ANSWERS:
                        raise DataError("the archive gives more answers than anybody can have asked for")
                elif code != _SUCCESS:
                    raise TransportError(_said("C-FIND", code))
        return found

    def studies(self, wanted: Wanted) -> list[str]:
        """Study instance UIDs of a study of the list."""
        keys = {"AccessionNumber": wanted.accession, "StudyInstanceUID": wanted.study}
        # An archive may answer with more than was asked for: what it does not say itself to be the study is none.
        return [
            each["StudyInstanceUID"]
            for each in self._find("STUDY", **keys)
            if (wanted.study and each["StudyInstanceUID"] == wanted.study)
            or (wanted.accession and each["AccessionNumber"] == wanted.accession)
        ]

    def instances(self, study: str) -> list[Found]:
        """Every instance of a study, series by series: the standard asks for the series' UID at this level."""
        found = []
        for series in self._find("SERIES", StudyInstanceUID=study, SeriesInstanceUID=""):
            uid = series["SeriesInstanceUID"]
            found += [
                Found(study, uid, each["SOPInstanceUID"], each["SOPClassUID"])
                for each in self._find(
                    "IMAGE", StudyInstanceUID=study, SeriesInstanceUID=uid, SOPInstanceUID="", SOPClassUID=""
                )
                if each["SOPInstanceUID"]
            ]
        return found

    def fetch(self, study: str, missing: Sequence[Found], whole: bool) -> None:
        """Bring instances into the inbox: the study in one question, or just those that are missing."""
        if whole:
            self._retrieve("STUDY", missing, StudyInstanceUID=study)
            return
        for series in dict.fromkeys(found.series for found in missing):
            here = [found for found in missing if found.series == series]
            for start in range(0, len(here), _NAMED_AT_ONCE):
                named = here[start : start + _NAMED_AT_ONCE]
                uids = [found.instance for found in named]
                self._retrieve("IMAGE", named, StudyInstanceUID=study, SeriesInstanceUID=series, SOPInstanceUID=uids)

    def _retrieve(self, level: str, coming: Sequence[Found], **keys: Any) -> None:
        query = Dataset()
        query.QueryRetrieveLevel = level
        for keyword, value in keys.items():
            setattr(query, keyword, value)
        plain = ALL_TRANSFER_SYNTAXES[:2]
        if self._archive.retrieve == "move":
            model = StudyRootQueryRetrieveInformationModelMove
            with self._associated([(model, plain)]) as made:
                _heed("C-MOVE", made.send_c_move(query, self._destination, model))
            return
        model = StudyRootQueryRetrieveInformationModelGet
        for part in _offers(found.sop_class for found in coming):
            roles = [build_role(each, scp_role=True) for each in dict.fromkeys(abstract for abstract, _ in part)]
            with self._associated([(model, plain), *part], roles, {found.instance for found in coming}) as made:
                _heed("C-GET", made.send_c_get(query, model))


def _offers(classes: Iterable[str]) -> Iterator[list[tuple[str, list[str]]]]:
    """Presentation contexts to offer, in parts that fit into an association.

    One context for each class and transfer syntax: of a context with several the archive picks one, and many cannot
    then send what they have in another.
    """
    known = sorted(set(classes) - {""})
    if known:
        offered = [(each, [syntax]) for each in known for syntax in ALL_TRANSFER_SYNTAXES]
    else:
        offered = [(str(each.abstract_syntax), ALL_TRANSFER_SYNTAXES) for each in association.storage_contexts()]
    for start in range(0, len(offered), _CONTEXTS):
        yield offered[start : start + _CONTEXTS]


def _heed(service: str, answers: Any) -> None:
    """Wait for the last answer. The inbox shows what did not come, whatever the archive counts."""
    code = None
    for status, _ in answers:
        code = getattr(status, "Status", None)
        if code is None:
            break
    if code not in (_SUCCESS, *_NOT_ALL):
        raise TransportError(_said(service, code))


def _said(service: str, code: int | None) -> str:
    if code is None:
        return f"the archive broke off in the middle of a {service}"
    if code == 0xA801:
        return f"the archive does not know this site's title as a destination of {service} (status A801)"
    return f"the archive refuses a {service} with status {code:04X}"
