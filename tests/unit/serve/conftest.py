"""A coordinator that published three models, and a hospital's prediction service for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support import published
from tests.support.published import IMAGE, SERIES, TABLE, study

from consilium_serve.home import Home
from consilium_serve.record import Record
from consilium_serve.service import Service
from consilium_serve.versions import add
from consilium_server.federation import Home as Coordinator
from consilium_shared.protocol.bundle import zipped


@dataclass
class Bundles:
    """Zip files of bundles, by name; ``fingerprint`` of the coordinator who signed them."""

    coordinator: Coordinator
    folder: Path

    @property
    def fingerprint(self) -> str:
        return self.coordinator.coordinator().public.fingerprint

    def __getitem__(self, name: str) -> Path:
        return self.folder / f"{name}.zip"


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    folder = tmp_path_factory.mktemp("bundles")
    made = Bundles(published.coordinator(folder / "coordinator"), folder)
    for name, given, seed in (
        ("table", study("logistic", TABLE), 0),
        ("table-2", study("logistic", TABLE), 1),
        ("table-3", study("logistic", TABLE), 2),
        ("series", study("gru", SERIES, missing="center"), 0),
        ("image", study("small-cnn", IMAGE), 0),
    ):
        made[name].write_bytes(zipped(published.files(made.coordinator, given, seed)))
    return made


@pytest.fixture
def home(bundles: Bundles, tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.begin(bundles.fingerprint)
    for name in ("table", "series", "image"):
        add(made, bundles[name])
    return made


@pytest.fixture
def service(home: Home) -> Iterator[Service]:
    made = Service(home, Record(home.records, home.identity(), 365))
    yield made
    made.close()
