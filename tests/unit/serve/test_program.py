"""consilium-predict as a process: from a bundle to an answer over TLS, through kill -9, to a verified record."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tests.unit.serve.conftest import Bundles

GOOD = {"record": {"age": 61, "pain": "2", "chol": 250.5}, "patient": "Schmidt-4711"}
PREDICT = "/v1/models/a-logistic/predict"


def run(*words: str | Path, fails: int = 0) -> str:
    command = [sys.executable, "-m", "consilium_serve.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == fails, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if fails else done.stdout


def environment() -> dict[str, str]:
    """That of this process, with the package's folder for an install that is older than it."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "serve"), "COLUMNS": "200"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(home: Path, port: int, **tls: Any) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    log = (home / "log").open("a")
    command = [sys.executable, "-m", "consilium_serve.cli", "serve", "--home", str(home)]
    process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment())
    try:
        address = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        with httpx.Client(base_url=address, timeout=10, **tls) as client:
            for _ in range(300):
                assert process.poll() is None, (home / "log").read_text()
                try:
                    if client.get("/health/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield process, client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        log.close()


@pytest.fixture
def home(bundles: Bundles, tmp_path: Path) -> Path:
    folder = tmp_path / "service"
    run("init", "--fingerprint", bundles.fingerprint, "--home", folder)
    run("add", bundles["table"], "--home", folder)
    return folder


def listen(home: Path, **more: Any) -> int:
    port = free_port()
    file = home / "predict.yaml"
    lines = "".join(f"  {key}: {value}\n" for key, value in more.items())
    file.write_text(re.sub(r"(?m)^  port: \d+\n", f"  port: {port}\n{lines}", file.read_text()))
    return port


def test_from_a_bundle_to_answers_that_outlive_a_kill(home: Path, bundles: Bundles) -> None:
    port, token = listen(home), run("token", "ward", "--home", home).strip()
    headers = {"authorization": f"Bearer {token}"}
    with serving(home, port) as (process, client):
        assert client.post(PREDICT, json=GOOD).status_code == 401
        first = client.post(PREDICT, json=GOOD, headers=headers).json()
        process.kill()
        process.wait()
    with serving(home, port) as (_, client):
        assert client.post(PREDICT, json=GOOD, headers=headers).json() == first
        version = run("add", bundles["table-2"], "--home", home).split()[1]
        run("activate", "a-logistic", version, "--home", home)
        for _ in range(100):
            told = client.post(PREDICT, json=GOOD, headers=headers).json()
            if told["model"]["version"] == version:
                break
            time.sleep(0.1)
        assert told["model"]["version"] == version != first["model"]["version"]
        run("token", "ward", "--revoke", "--home", home)
        assert client.post(PREDICT, json=GOOD, headers=headers).status_code == 401
    roles = {each["version"]: each["role"] for each in json.loads(run("models", "--json", "--home", home))}
    assert roles == {version: "answers", first["model"]["version"]: "answered before"}
    counted = json.loads(run("record", "--json", "--home", home))
    assert sum(each["predictions"] for each in counted["models"]) >= 3
    kept = [path for path in home.rglob("*") if path.is_file() and b"Schmidt-4711" in path.read_bytes()]
    assert kept == []


def authority(folder: Path) -> dict[str, Path]:
    """A CA, and certificates of a server and of a client under it."""
    now, keys = (
        datetime.now(UTC),
        {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "server", "client")},
    )
    files = {}
    for name, key in keys.items():
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder().subject_name(subject).public_key(key.public_key())
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")]))
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
        )  # fmt: skip
        if name == "server":
            names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
            builder = builder.add_extension(names, critical=False)
        pem = builder.sign(keys["ca"], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        files[name], files[f"{name}-key"] = folder / f"{name}.pem", folder / f"{name}.key"
        files[name].write_bytes(pem)
        files[f"{name}-key"].write_bytes(secret)
    return files


def test_a_client_with_a_certificate_needs_no_token_and_one_without_is_not_heard(home: Path) -> None:
    files = authority(home)
    port = listen(home, certificate="server.pem", key="server.key", client_ca="ca.pem")
    context = ssl.create_default_context(cafile=str(files["ca"]))
    context.load_cert_chain(str(files["client"]), str(files["client-key"]))
    with serving(home, port, verify=context) as (_, client):
        assert client.post(PREDICT, json=GOOD).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"https://127.0.0.1:{port}/v1/models", verify=ssl.create_default_context(cafile=str(files["ca"])))
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health/live")


def test_check_says_what_holds_and_what_does_not(bundles: Bundles, home: Path, tmp_path: Path) -> None:
    assert "answers its example" in run("check", bundles["image"], "--fingerprint", bundles.fingerprint)
    other = "0000 " * 8
    assert "not the one given" in run("check", bundles["image"], "--fingerprint", other, fails=3)
    (tmp_path / "cut.zip").write_bytes(bundles["image"].read_bytes()[:5000])
    assert "zip" in run("check", tmp_path / "cut.zip", "--fingerprint", bundles.fingerprint, fails=3)
    assert "cannot read" in run("check", tmp_path / "none", "--fingerprint", bundles.fingerprint, fails=2)


def test_a_service_that_nobody_may_ask_or_that_has_no_model_does_not_start(home: Path, bundles: Bundles) -> None:
    assert "consilium-predict token" in run("serve", "--home", home, fails=2)
    assert "consilium-predict init" in run("serve", "--home", home / "none", fails=2)
    empty = home / "empty"
    run("init", "--fingerprint", bundles.fingerprint, "--home", empty)
    run("token", "ward", "--home", empty)
    assert "consilium-predict add" in run("serve", "--home", empty, fails=2)
    listen(empty, certificate="none.pem", key="none.key")
    run("add", bundles["table"], "--home", empty)
    assert "certificate, key or client_ca" in run("serve", "--home", empty, fails=2)


def test_a_port_that_is_taken_is_said(home: Path) -> None:
    run("token", "ward", "--home", home)
    port = listen(home)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert "cannot listen" in run("serve", "--home", home, fails=2)
