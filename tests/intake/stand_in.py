"""A small archive: C-ECHO, C-FIND, C-GET, C-MOVE, C-STORE to the site, and DICOMweb. Keeps everything in memory.

Started as ``python stand_in.py TITLE PORT WEB_PORT SITE_PORT [TLS]``; with the folder TLS its web service wants a
certificate of ``ca.crt`` and the token ``secret-7``.
"""

from __future__ import annotations

import json
import ssl
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE, AllStoragePresentationContexts, build_context, evt
from pynetdicom._globals import ALL_TRANSFER_SYNTAXES
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

TITLE, PORT, WEB_PORT, SITE_PORT = sys.argv[1], *map(int, sys.argv[2:5])
TLS = sys.argv[5:]
held: dict[str, Dataset] = {}
KEYS = {"STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}
ENTITY = AE(ae_title=TITLE)
ENTITY.acse_timeout = ENTITY.dimse_timeout = ENTITY.network_timeout = 5


def matches(dataset: Dataset, query: Dataset) -> bool:
    for element in query:
        if element.keyword in {"QueryRetrieveLevel", "SpecificCharacterSet"} or element.value in ("", None, []):
            continue
        values = [element.value] if isinstance(element.value, str) else list(element.value)
        if str(dataset.get(element.keyword, "")) not in [str(each) for each in values]:
            return False
    return True


def on_find(event):
    query, seen = event.identifier, set()
    for dataset in list(held.values()):
        key = str(dataset[KEYS[query.QueryRetrieveLevel]].value)
        if key in seen or not matches(dataset, query):
            continue
        seen.add(key)
        answer = Dataset()
        for element in query:
            if element.keyword != "QueryRetrieveLevel":
                setattr(answer, element.keyword, dataset.get(element.keyword, ""))
        yield 0xFF00, answer
    yield 0x0000, None


def on_get(event):
    found = [dataset for dataset in list(held.values()) if matches(dataset, event.identifier)]
    yield len(found)
    for dataset in found:
        yield 0xFF00, dataset


def on_move(event):
    yield "127.0.0.1", SITE_PORT, {"contexts": contexts()}
    yield from on_get(event)


def contexts():
    pairs = {(each.SOPClassUID, each.file_meta.TransferSyntaxUID) for each in held.values()}
    return [build_context(*pair) for pair in sorted(pairs)]


def send() -> int:
    association = ENTITY.associate("127.0.0.1", SITE_PORT, contexts(), "CONSILIUM")
    if not association.is_established:
        return 503
    bad = sum(getattr(association.send_c_store(each), "Status", 1) != 0 for each in list(held.values()))
    association.release()
    return 500 if bad else 200


class Web(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", kind: str = "application/dicom+json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        if self.path == "/send":
            return self.answer(send())
        dataset = dcmread(BytesIO(self.rfile.read(int(self.headers["Content-Length"]))))
        held[dataset.SOPInstanceUID] = dataset
        return self.answer(200)

    def do_GET(self) -> None:
        if TLS and self.headers["Authorization"] != "Bearer secret-7":
            return self.answer(401)
        parts = urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        path = parts.path.strip("/").split("/")
        if path[0] == "system":
            return self.answer(200)
        path = path[1:]
        query = Dataset()
        for name, value in zip(["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"], path[1::2], strict=False):
            setattr(query, name, value)
        if len(path) % 2:
            level = {"studies": "STUDY", "series": "SERIES", "instances": "IMAGE"}[path[-1]]
            for name, value in asked.items():
                if name not in {"limit", "offset", "includefield"}:
                    setattr(query, name, value)
            found = {str(each[KEYS[level]].value): each for each in list(held.values()) if matches(each, query)}
            first, most = int(asked.get("offset", 0)), int(asked.get("limit", 1000))
            page = list(found.values())[first : first + most]
            names = ["StudyInstanceUID", "AccessionNumber"]
            names += ["SeriesInstanceUID"] if level != "STUDY" else []
            names += ["SOPInstanceUID", "SOPClassUID"] if level == "IMAGE" else []
            answers = []
            for each in page:
                answer = Dataset()
                for name in names:
                    setattr(answer, name, each.get(name, ""))
                answers.append(answer.to_json_dict())
            return self.answer(200, json.dumps(answers).encode())
        found = [each for each in list(held.values()) if matches(each, query)]
        if not found:
            return self.answer(404)
        body = b""
        for each in found:
            stream = BytesIO()
            each.save_as(stream)
            body += b"--frontier\r\nContent-Type: application/dicom\r\n\r\n" + stream.getvalue() + b"\r\n"
        return self.answer(200, body + b"--frontier--\r\n", 'multipart/related; boundary="frontier"')


for model in (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
):
    ENTITY.add_supported_context(model)
ENTITY.add_supported_context(Verification)
for each in AllStoragePresentationContexts:
    ENTITY.add_supported_context(each.abstract_syntax, ALL_TRANSFER_SYNTAXES, scu_role=True, scp_role=True)
ENTITY.start_server(
    ("127.0.0.1", PORT),
    block=False,
    evt_handlers=[(evt.EVT_C_FIND, on_find), (evt.EVT_C_GET, on_get), (evt.EVT_C_MOVE, on_move)],
)
web = ThreadingHTTPServer(("127.0.0.1", WEB_PORT), Web)
if TLS:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(Path(TLS[0], "ca.crt"))
    context.load_cert_chain(Path(TLS[0], "archive.crt"), Path(TLS[0], "archive.key"))
    web.socket = context.wrap_socket(web.socket, server_side=True, do_handshake_on_connect=False)
web.serve_forever()
