"""Archives for tests: a real Orthanc where it is installed, and a stand-in made of pynetdicom and http.server.

Both are processes of their own, with the same few orders: hold these files, send them there, end.
"""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx

ORTHANC = shutil.which("Orthanc")
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
KINDS = ["stand-in", *(["orthanc"] if ORTHANC and PLUGIN.exists() else [])]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def trusted(tls: Path) -> ssl.SSLContext:
    """TLS of somebody whom the archive lets in."""
    context = ssl.create_default_context(cafile=tls / "ca.crt")
    context.load_cert_chain(tls / "site.crt", tls / "site.key")
    return context


class Archive:
    """An archive in a process of its own, on this machine."""

    title = "ARCHIVE"

    def __init__(self, kind: str, folder: Path, site_port: int, tls: Path | None = None) -> None:
        self.kind, self.folder = kind, folder
        self.port, self.web_port = free_port(), free_port()
        folder.mkdir()
        if kind == "orthanc":
            settings = {
                "Name": "test",
                "StorageDirectory": str(folder),
                "IndexDirectory": str(folder),
                "DicomAet": self.title,
                "DicomPort": self.port,
                "DicomCheckCalledAet": True,
                "HttpPort": self.web_port,
                "AuthenticationEnabled": False,
                "DicomAlwaysAllowEcho": True,
                "DicomAlwaysAllowGet": True,
                "DicomAlwaysAllowFind": True,
                "DicomAlwaysAllowMove": True,
                "DicomModalities": {"site": ["CONSILIUM", "127.0.0.1", site_port]},
                "Plugins": [str(PLUGIN)],
                "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            }
            file = folder / "orthanc.json"
            file.write_text(json.dumps(settings))
            command = [str(ORTHANC), str(file)]
        else:
            command = [
                sys.executable,
                str(Path(__file__).with_name("stand_in.py")),
                *(str(each) for each in (self.title, self.port, self.web_port, site_port)),
                *([str(tls)] if tls else []),
            ]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self.web_port}"
        self._wait(trusted(tls) if tls else True)

    def _wait(self, verify: Any) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()
            try:
                httpx.get(f"{self.url}/system", timeout=5, verify=verify)
                return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    @property
    def dicomweb(self) -> str:
        return f"{self.url}/dicom-web"

    def hold(self, files: Iterable[Path], **how: Any) -> None:
        """Put files into the archive."""
        with httpx.Client(timeout=60, **how) as client:
            for file in files:
                client.post(f"{self.url}/instances", content=file.read_bytes()).raise_for_status()

    def send(self) -> None:
        """Send everything to the site by C-STORE, and come back when the archive says it has."""
        with httpx.Client(timeout=120) as client:
            if self.kind == "orthanc":
                every = client.get(f"{self.url}/instances").json()
                client.post(f"{self.url}/modalities/site/store", json=every).raise_for_status()
            else:
                client.post(f"{self.url}/send").raise_for_status()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
