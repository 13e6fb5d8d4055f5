"""A bulk export is fetched from a FHIR server whole or not at all; only the site's key opens it, and a kill goes on.

The server is a recorded one: it answers over real HTTPS as the standard's examples do, and makes nothing itself.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.intake.tls import certificates

from consilium_client.intake import smart
from consilium_client.intake.certificates import Certificates
from consilium_client.intake.fhir_server import FhirServer
from consilium_client.intake.settings import Limits
from consilium_shared.errors import ConfigurationError, ConsiliumError, DataError, TransportError

PATIENTS = "".join(json.dumps({"resourceType": "Patient", "id": f"p{n}", "gender": "female"}) + "\n" for n in range(3))
VALUE = {
    "resourceType": "Observation",
    "status": "final",
    "code": {"coding": [{"system": "http://loinc.org", "code": "2345-7"}]},
    "subject": {"reference": "Patient/p0"},
    "effectiveDateTime": "2026-01-02T03:04:05Z",
    "valueQuantity": {"value": 5.5, "system": "http://unitsofmeasure.org", "code": "mmol/L"},
}
FREELY = Limits(keep_free_gib=0)


class Recorded:
    """The server, and what it was asked."""

    def __init__(self, tls: dict[str, Path], public: Any) -> None:
        self.files = {"Patient.1": PATIENTS, "Observation.1": json.dumps(VALUE) + "\n"}
        self.counts = {"Patient.1": 3, "Observation.1": 1}
        self.asked: list[str] = []
        self.looks = 2
        """Answers that an export is not ready."""
        self.known = True
        self.held = threading.Event()
        """Where it is set, files are sent at once; else the second one never ends."""
        self.held.set()
        self.elsewhere = ""
        recorded = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def say(self, status: int, body: Any = None, **headers: str) -> None:
                content = body.encode() if isinstance(body, str) else json.dumps(body or {}).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(content)

            def do_POST(self) -> None:
                form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                recorded.asked.append("token")
                try:
                    assertion = form["client_assertion"][0]
                    claims = jwt.decode(assertion, public, algorithms=["ES384"], audience=recorded.url + "/token")
                    assert claims["iss"] == claims["sub"] == "consilium" and claims["exp"] - claims["iat"] <= 300
                    assert jwt.get_unverified_header(assertion)["kid"] == "consilium-1"
                    assert form["scope"] == ["system/*.rs"]
                except (jwt.InvalidTokenError, AssertionError):
                    return self.say(400, {"error": "invalid_client"})
                return self.say(200, {"access_token": "opened", "expires_in": 300, "token_type": "bearer"})

            def do_DELETE(self) -> None:
                recorded.asked.append("forget")
                self.say(202)

            def do_GET(self) -> None:
                path = urlsplit(self.path)
                recorded.asked.append(path.path)
                if self.headers["Authorization"] != "Bearer opened":
                    return self.say(401)
                if path.path == "/r4/Patient/$export":
                    assert self.headers["Prefer"] == "respond-async"
                    assert "Patient,Observation" in parse_qs(path.query)["_type"][0]
                    recorded.known = True
                    return self.say(202, None, Content_Location=recorded.url + "/job/1")
                if path.path == "/job/1":
                    if not recorded.known:
                        return self.say(404)
                    recorded.looks -= 1
                    if recorded.looks >= 0:
                        return self.say(202, None, Retry_After="0.1", X_Progress="half of it")
                    return self.say(200, recorded.list())
                name = path.path.removeprefix("/files/")
                if not recorded.held.is_set() and name.startswith("Observation"):
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b"{")
                    self.wfile.flush()
                    recorded.held.wait(60)
                    return None
                return self.say(200, recorded.files[name])

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls["archive"], tls["archive.key"])
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def list(self) -> dict[str, Any]:
        base = self.elsewhere or self.url
        return {
            "transactionTime": "2026-01-03T00:00:00Z",
            "requiresAccessToken": True,
            "output": [
                {"type": name.split(".")[0], "url": f"{base}/files/{name}", "count": self.counts[name]}
                for name in self.files
            ],
            "error": [],
        }


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return certificates(tmp_path_factory.mktemp("smart") / "tls")


@pytest.fixture
def recorded(tls: dict[str, Path], tmp_path: Path) -> Iterator[Recorded]:
    key = ec.generate_private_key(ec.SECP384R1())
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (tmp_path / "fhir.pem").write_bytes(key.private_bytes(*pem))
    made = Recorded(tls, key.public_key())
    yield made
    made.held.set()
    made.server.shutdown()
    made.server.server_close()


def settings(recorded: Recorded, files: dict[str, Path], tmp_path: Path, **more: Any) -> FhirServer:
    given = {
        "url": recorded.url + "/r4",
        "token_url": recorded.url + "/token",
        "client_id": "consilium",
        "key": tmp_path / "fhir.pem",
        "key_id": "consilium-1",
        "tls": Certificates(ca=files["ca"]),
        "timeout": 5,
    }
    return FhirServer(**{**given, **more})


def test_an_export_is_made_waited_for_and_fetched_and_a_new_one_takes_its_place(
    recorded: Recorded, tls: dict[str, Path], tmp_path: Path
) -> None:
    server, folder, said = settings(recorded, tls, tmp_path), tmp_path / "export", list[str]()
    done = smart.pull(server, folder, FREELY, said.append)
    assert (done.files, done.here_before) == (2, 0) and "half of it" in said
    assert (folder / "Patient.000.ndjson").read_text() == PATIENTS
    assert sorted(each.name for each in folder.iterdir()) == [
        "Observation.000.ndjson",
        "Patient.000.ndjson",
        "export.json",
    ]
    assert recorded.asked.count("token") == 1 and recorded.asked[-1] == "forget"
    del recorded.files["Observation.1"]
    recorded.looks = 0
    smart.pull(server, folder, FREELY)
    assert sorted(each.name for each in folder.iterdir()) == ["Patient.000.ndjson", "export.json"]
    assert {each.name for each in tmp_path.iterdir()} == {"export", "fhir.pem"}


def test_a_killed_pull_goes_on_with_what_had_not_come_and_the_tables_are_made_of_it(
    recorded: Recorded, tls: dict[str, Path], tmp_path: Path, site: Any
) -> None:
    server = settings(recorded, tls, tmp_path).model_dump(mode="json", exclude_none=True)
    tables = {"patients": str(tmp_path / "patients.csv"), "samples": str(tmp_path / "samples.csv")}
    glucose = {"codes": ["http://loinc.org|2345-7"], "unit": "mg/dL", "molar_mass": 180.156}
    ward = {"folder": str(tmp_path / "export"), **tables, "variables": {"glucose": glucose}, "server": server}
    site.settings["fhir"] = {"ward": ward}
    recorded.looks = 0
    recorded.held.clear()
    pulling = site.start("pull-fhir")
    until = time.monotonic() + 60
    while "/files/Observation.1" not in recorded.asked and time.monotonic() < until:
        time.sleep(0.05)
    pulling.kill()
    pulling.wait()
    recorded.held.set()
    assert not (tmp_path / "export").exists()
    fetched = recorded.asked.count("/files/Patient.1")
    done = site.run("pull-fhir", "ward", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["here_before"] == 1
    assert recorded.asked.count("/files/Patient.1") == fetched == 1
    assert recorded.asked.count("/r4/Patient/$export") == 1
    assert site.run("import-fhir", "ward").returncode == 0
    assert len((tmp_path / "patients.csv").read_text().splitlines()) == 4
    assert "glucose,99.08" in (tmp_path / "samples.csv").read_text()


def test_a_job_that_the_server_no_longer_knows_begins_anew_and_nothing_of_it_stays(
    recorded: Recorded, tls: dict[str, Path], tmp_path: Path
) -> None:
    arriving = tmp_path / ".export.arriving"
    arriving.mkdir()
    (arriving / "Observation.007.ndjson").write_text("{}\n")
    (arriving / "job.json").write_text(json.dumps({"address": recorded.url + "/job/1", "done": ["Patient.000.ndjson"]}))
    recorded.known, recorded.looks = False, 0
    assert smart.pull(settings(recorded, tls, tmp_path), tmp_path / "export", FREELY).here_before == 0
    assert not (tmp_path / "export" / "Observation.007.ndjson").exists()


@pytest.mark.parametrize("after", ["manifest", "away"])
def test_a_pull_that_is_killed_while_the_folders_change_places_is_finished_by_the_next(
    recorded: Recorded, tls: dict[str, Path], tmp_path: Path, after: str
) -> None:
    server, folder = settings(recorded, tls, tmp_path), tmp_path / "export"
    smart.pull(server, folder, FREELY)
    arriving = tmp_path / ".export.arriving"
    arriving.mkdir()
    (arriving / "Patient.000.ndjson").write_text("newer")
    (arriving / "export.json").write_text('{"files": ["Patient.000.ndjson"]}')
    (arriving / "job.json").write_text("{}")
    if after == "away":
        folder.rename(tmp_path / ".export.before")
    recorded.server.shutdown()
    recorded.server.server_close()
    with pytest.raises(TransportError):
        smart.pull(settings(recorded, tls, tmp_path, timeout=0.5), folder, FREELY)
    assert (folder / "Patient.000.ndjson").read_text() == "newer"
    assert sorted(each.name for each in folder.iterdir()) == ["Patient.000.ndjson", "export.json"]


def test_files_of_others_are_never_deleted(recorded: Recorded, tls: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "Patient.ndjson").write_text(PATIENTS)
    with pytest.raises(ConfigurationError, match=r"no pull has written, Patient\.ndjson"):
        smart.pull(settings(recorded, tls, tmp_path), folder, FREELY)
    assert recorded.asked == [] and (folder / "Patient.ndjson").read_text() == PATIENTS


def test_what_is_not_as_it_should_be_is_said_and_no_export_appears(
    recorded: Recorded, tls: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "export"

    def refused(kind: type[ConsiliumError], said: str, **more: Any) -> None:
        limits = more.pop("limits", FREELY)
        with pytest.raises(kind, match=said):
            smart.pull(settings(recorded, tls, tmp_path, **more), folder, limits)
        assert not folder.exists()

    refused(TransportError, "invalid_client", key_id="another")
    refused(TransportError, "cannot be asked", url="https://127.0.0.1:1/r4")
    refused(TransportError, "certificate", tls=Certificates(ca=tls["site"]))
    recorded.looks, recorded.counts["Patient.1"] = 0, 4
    refused(DataError, "has 3 lines where the server says 4")
    recorded.counts["Patient.1"] = 3
    recorded.elsewhere = "https://other.example"
    refused(DataError, "files lie at other.example")
    recorded.elsewhere = recorded.url.replace("127.0.0.1", "localhost")
    refused(DataError, "files lie at localhost")
    recorded.elsewhere = ""
    refused(ConfigurationError, "disk", limits=Limits(keep_free_gib=10**9))
    refused(ConfigurationError, "P-384", key=tls["site.key"])
    assert smart.pull(settings(recorded, tls, tmp_path), folder, FREELY).files == 2
