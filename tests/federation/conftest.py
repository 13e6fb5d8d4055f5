"""Hospitals for the tests of this folder: generated tables, quick studies, and a federation of real programs.

Every patient is generated. What stands in the tables and must never leave a site is unmistakable: ``PLANTED``.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tests.support.cables import Cables, forbidden

from consilium_client.site import Home as SiteHome
from consilium_client.state.ledger_file import read_ledger
from consilium_client.transport.agent_socket import AgentAway, call_admin
from consilium_deploy.dicom_files import Scanner, write_radiograph
from consilium_deploy.local import LocalFederation, LocalFederationError
from consilium_server.federation import Home as ServerHome
from consilium_server.state import progress, study_folder
from consilium_shared.ledger.verify import VerifiedLedger
from consilium_shared.study import Study

SITES = ("north", "south", "west")
PATIENTS = 80
IMAGES = 30
PLANTED = "QZSYNTHETIC"
"""Stands in every identifier, in a free-text column and in the site's own name of the label column."""
CLASSES = ("stable", "worse")
ENDED = ("finished", "stopped", "failed")


def write_table(file: Path, site: str, asset: str) -> None:
    """A row a patient; the outcome depends on the other columns, so that there is something to learn."""
    generator = np.random.default_rng(list(f"{site} {asset}".encode()))
    lines = [f"patient,part,{PLANTED}-finding,age,pressure,marker,unit,note"]
    for number in range(PATIENTS):
        age, pressure = generator.normal(61.3, 14.7), generator.normal(127.4, 19.2)
        marker, intensive = generator.exponential(2.3), generator.random() < 0.3
        risk = (age - 61) / 15 + (marker - 2.3) / 2 + intensive - (pressure - 127) / 30
        outcome = CLASSES[int(risk + generator.normal(0, 0.7) > 0.4)]
        part = "test" if number % 5 == 0 else "train"
        values = f"{age:.6f},{pressure:.6f},{marker:.6f},{'intensive' if intensive else 'ward'}"
        lines.append(f"{PLANTED}-{site}-{number:04d},{part},{outcome},{values},{PLANTED} note of {site} {number}")
    file.write_text("\n".join(lines) + "\n")


def write_images(folder: Path, site: str) -> None:
    """A few radiographs of noise with a label table beside them; those of one class are brighter in the middle."""
    generator = np.random.default_rng(list(f"{site} images".encode()))
    folder.mkdir()
    lines = [f"patient,{PLANTED}-finding"]
    for number in range(IMAGES):
        patient, ill = f"{PLANTED}-{site}-{number:04d}", number % 3 == 0
        grey = generator.random((24, 24)) * 0.5
        grey[8:16, 8:16] += 0.4 * ill
        tags = {"PatientName": f"{PLANTED}^NAME", "InstitutionName": "Synthetic Hospital"}
        write_radiograph(folder / f"synthetic-{number}.dcm", grey, patient, f"{site} {number}", Scanner(tags=tags))
        lines.append(f"{patient},{CLASSES[int(ill)]}")
    (folder / "synthetic-labels.csv").write_text("\n".join(lines) + "\n")


def site_yaml(site: str, folder: Path) -> str:
    """Generated tables ``cohort`` (no limit), ``guarded`` (with a budget) and ``tight`` (with a small one), and images.

    The small budget is that of the site "south": two studies of ε 2 and three rounds fit one by one, but not together;
    of the second only the first round does.
    """
    budgets = {"cohort": "unlimited", "guarded": 20.0, "tight": 2.45 if site == "south" else 20.0, "images": 20.0}
    columns = {"outcome": f"{PLANTED}-finding"}
    assets: dict[str, Any] = {}
    for asset in ("cohort", "guarded", "tight"):
        file = folder / f"synthetic-{site}-{asset}.csv"
        write_table(file, site, asset)
        assets[asset] = {"kind": "table", "path": str(file), "columns": columns}
    images = folder / f"synthetic-{site}-images"
    write_images(images, site)
    table = images / "synthetic-labels.csv"
    assets["images"] = {"kind": "dicom", "path": str(images), "table": str(table), "columns": columns}
    policy = {
        "budgets": {asset: {"epsilon": epsilon, "delta": 1e-5} for asset, epsilon in budgets.items()},
        "minimum_patients": 20,
        "minimum_held_back": 2,  # of thirty images some six
        "allow_without_privacy": True,
        "tasks": ["image-classification", "sequence-classification", "tabular-classification", "cross-table"],
        "threat_models": ["malicious-server", "honest-but-curious"],
    }
    return json.dumps({"site": site, "assets": assets, "policy": policy, "device": "cpu"})  # YAML holds JSON


def study_contract(name: str, *, private: bool, **changes: Any) -> dict[str, Any]:
    """A quick study; ``changes`` go into ``training`` and ``aggregation``, and ``asset`` into ``data``."""
    training: dict[str, Any] = {
        "rounds": 3,
        "steps_per_round": 20,
        "expected_batch": 16,
        "optimizer": {"name": "sgd", "lr": 0.05},
    }
    if not private:
        training["seed"] = 11
    aggregation = {"optimizer": {"name": "fedadam", "lr": 0.05}, "min_sites": 3, "round_timeout": "10m"}
    asset = changes.pop("asset", "guarded" if private else "cohort")
    for key, value in changes.items():
        (training if key in training else aggregation)[key] = value
    features = [
        {"name": "age", "center": 60, "scale": 15},
        {"name": "pressure", "center": 125, "scale": 20},
        {"name": "marker", "center": 2, "scale": 2},
        {"name": "unit", "categories": ["ward", "intensive"]},
    ]
    return {
        "study": name,
        "task": "tabular-classification",
        "model": {"name": "mlp", "hidden": 8},
        "data": {"asset": asset, "label": {"column": "outcome", "classes": list(CLASSES)}, "features": features},
        "training": training,
        "privacy": {"epsilon": 2.0, "delta": 1e-5, "clipping_norm": 1.0} if private else {"mode": "none"},
        "aggregation": aggregation,
        "evaluation": {"split": None, "split_column": "part", **({"epsilon": 0.5} if private else {})},
    }


class Hospitals(LocalFederation):
    """A federation under test, with what a test asks of it again and again."""

    def start(self, contract: dict[str, Any]) -> Study:
        """``consilium-server run --detach`` of a contract; its study."""
        file = self.root / f"{contract['study']}.yaml"
        file.write_text(json.dumps(contract))
        self.at_server("run", file, "--detach")
        return self.folder(contract["study"]).study()

    def run_study(self, contract: dict[str, Any]) -> Study:
        """Start a study and approve it at every site that is to take part."""
        study = self.start(contract)
        self.decide(study.study, "approve")
        return study

    def decide(self, study: str, decision: str, *sites: str, **arguments: str) -> None:
        """What IT decides at these sites (all by default), once the study is there: ``approve`` or ``reject``."""
        for site in sites or SITES:
            self.until(partial(self.knows, site, study), f"{site} hears of {study}", site)
            shown = {"plan": self.admin(site, "estimate", study=study)["plan"]} if decision == "approve" else {}
            self.admin(site, decision, study=study, by="a test", **shown, **arguments)

    def proposed(self, site: str) -> dict[str, str]:
        """Study to ``pending``, ``approved``, ``rejected`` or ``refused``, as the agent says."""
        return {each["study"]: each["state"] for each in self.admin(site, "studies")}

    def knows(self, site: str, study: str) -> bool:
        """Whether a study was proposed at a site."""
        return study in self.proposed(site)

    def admin(self, site: str, command: str, **arguments: str) -> Any:
        """One command to a running agent, as ``consilium-site`` gives it."""
        request = json.dumps({"command": command, **arguments}).encode()

        def ask() -> Any:
            try:
                return json.loads(call_admin(self.site(site) / "run" / "admin.sock", request))
            except AgentAway:  # it is starting
                return None

        answer = self.until(ask, f"the agent of {site} answers", site)
        assert "error" not in answer, answer
        return answer["value"]

    def pid(self, service: str, program: str) -> int:
        """As of every federation, but waits for a program that is just being started."""

        def look() -> int | None:
            try:
                return LocalFederation.pid(self, service, program)
            except LocalFederationError:
                return None

        return int(self.until(look, f"{program} of {service} runs", service))

    def until_phase(self, study: str, number: int, phase: str) -> None:
        """Until the study's process opens a phase of a round, just before its question goes out.

        Phases: ``training``, ``evaluation``, and after the last round ``closing``.
        """
        wanted = {"event": "round", "round": number, "phase": phase}
        opened = partial(self._tells, study, wanted)
        self.until(opened, f"round {number} of {study} comes to its {phase}", "server", pause=0.01)

    def answered(self, study: str, number: int, phase: str) -> set[str]:
        """The sites whose answers to this phase of a round are in."""
        found: set[str] = set()
        current: tuple[int, str] | None = None
        for event in self.events(study):
            if event["event"] == "round":
                current = event["round"], event["phase"]
            elif event["event"] == "answer" and current == (number, phase):
                found.add(event["site"])
        return found

    def _tells(self, study: str, wanted: dict[str, Any]) -> bool:
        return any(wanted.items() <= event.items() for event in self.events(study))

    def until(self, look: Callable[[], Any], what: str, service: str | None = None, pause: float = 0.05) -> Any:
        """As ``wait``, but looks often: for moments that pass."""
        deadline = time.monotonic() + 240
        while not (found := look()):
            assert time.monotonic() < deadline, f"waited in vain until {what}\n{self.logs(service)}"
            time.sleep(pause)
        return found

    def ended(self, study: str) -> str:
        """The state in which a study ended."""
        self.until(lambda: self.state(study) in ENDED, f"{study} ends", "server")
        return self.state(study)

    def waiting(self, study: str) -> str:
        """For whom a study waits, as ``status`` says it; cheaper to ask often."""
        return progress.read(self.folder(study)).waiting

    def folder(self, study: str) -> study_folder.StudyFolder:
        """The study's folder at the coordinator."""
        return study_folder.folder(ServerHome(self.server), study)

    def records(self, study: str) -> list[dict[str, Any]]:
        """The signed records of its rounds, verified."""
        return self.folder(study).records(ServerHome(self.server).coordinator())

    def ledger(self, site: str) -> VerifiedLedger:
        """A site's ledger, verified."""
        home = SiteHome(self.site(site))
        return read_ledger(home.ledger, site, home.identity().public)

    def entries(self, site: str, study: Study) -> list[tuple[str, Any]]:
        """(kind, body) of the ledger's entries about one study, in order."""
        return [(e.kind, e.body) for e in self.ledger(site).entries if getattr(e.body, "study", "") == study.digest]

    def charges(self, site: str, study: Study, *purposes: str) -> list[Any]:
        """The charges of a study for its training, or for these purposes, each with what became of it, in order."""
        charges, wanted = self.ledger(site).books.charges.values(), purposes or ("training",)
        return [each for each in charges if each.body.study == study.digest and each.body.purpose in wanted]

    def trains(self, site: str, study: Study, number: int) -> bool:
        """Whether a site is in the middle of a round: charged and not settled. Reads without verifying: it is quick."""
        written = (self.site(site) / "ledger.jsonl").read_bytes()
        entries = [json.loads(line) for line in written[: written.rfind(b"\n") + 1].splitlines()[-20:]]
        settled = {entry["body"]["charge_seq"] for entry in entries if entry["kind"] == "settle"}
        charged = [e for e in entries if e["kind"] == "charge" and e["body"]["study"] == study.digest]
        return any(entry["body"]["round"] == number and entry["seq"] not in settled for entry in charged)

    def models(self) -> list[dict[str, Any]]:
        """``consilium-server models --json``: folder and card of each, verified."""
        found: list[dict[str, Any]] = json.loads(self.at_server("models", "--json").stdout)
        return found

    def weights(self, study: str) -> dict[str, bytes]:
        """The bytes of each tensor of the finished model."""
        (file,) = (self.server / "models" / study).glob("*/model.safetensors")
        return {name: value.tobytes() for name, value in safetensors.numpy.load(file.read_bytes()).items()}


@contextlib.contextmanager
def running(*more: str, **settings: Any) -> Iterator[Hospitals]:
    """A federation of ``SITES`` that runs; sites in ``more`` are enrolled too, and neither admitted nor started.

    ``settings`` are ``LocalFederation``'s.
    """
    root = Path(tempfile.mkdtemp(prefix="fed"))  # short: a socket's path has at most 100 bytes
    for folder in ("data", "tmp"):
        (root / folder).mkdir()
    sites = {site: site_yaml(site, root / "data") for site in (*SITES, *more)}
    hospitals = Hospitals(root, sites, environment={"TMPDIR": str(root / "tmp")}, **settings)
    try:
        hospitals.provision(admitted=SITES)
        hospitals.up("server", *SITES)
        yield hospitals
    finally:
        hospitals.down()
        shutil.rmtree(root)


@pytest.fixture(scope="session")
def hospitals() -> Iterator[Hospitals]:
    """The federation of every test that leaves it as it was; "stranger" is enrolled there and was never admitted."""
    with running("stranger", listen="0.0.0.0") as made:
        yield made


@pytest.fixture(scope="module")
def shaken() -> Iterator[Hospitals]:
    """A federation for tests that kill its programs."""
    with running() as made:
        yield made


@pytest.fixture(scope="module")
def laid() -> Iterator[Cables]:
    """A cable to each of ``SITES``; the test is skipped where the system permits none."""
    if reason := forbidden():
        pytest.skip(reason)
    with Cables(SITES) as made:
        yield made


@pytest.fixture(scope="module")
def wired(laid: Cables) -> Iterator[Hospitals]:
    """A federation whose sites reach the coordinator by these cables alone."""
    prefixes = {site: laid.prefix(site) for site in SITES}
    with running(listen=laid.address, address=laid.address, prefixes=prefixes) as made:
        yield made


@pytest.fixture
def cables(laid: Cables) -> Iterator[Cables]:
    """Those of ``wired``, to be cut and mended; whole again after the test."""
    yield laid
    laid.mend()


@pytest.fixture(scope="session")
def contract() -> Callable[..., dict[str, Any]]:
    """``study_contract``."""
    return study_contract
