"""Faults that are planted at a server, each with how its doctor names it: the table of docs/results/doctor.md."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.support import listener

from consilium_server.commands import doctor, provision, status
from consilium_server.federation import Home
from consilium_server.state.study_folder import StudyFolder, folder
from consilium_server.superlink import presence
from consilium_server.superlink.presence import Presence
from consilium_server.superlink.settings import SuperLinkSettings
from consilium_shared import findings
from consilium_shared.study import Study

SITE = "hospital-b"


@dataclass
class Ground:
    """A sound server with its three sites connected; what a fault changes about it."""

    home: Home
    study: Study
    monkeypatch: pytest.MonkeyPatch
    stack: ExitStack
    up: bool = True
    online: tuple[str, ...] = ("clinic-c", "hospital-a", "hospital-b")

    def begin(self) -> None:
        """Let the server serve."""
        self.monkeypatch.setattr(doctor, "is_up", lambda _: self.up)
        self.monkeypatch.setattr(status, "is_up", lambda _: self.up)
        self.monkeypatch.setattr(status, "online_nodes", lambda _: set(self.online))
        port = self.stack.enter_context(listener.serving(self.home.keys, lambda _: (200, {})))
        self.port(port)

    def port(self, port: int) -> None:
        """Let the server's public port be this."""
        there = SuperLinkSettings(self.home.root, "127.0.0.1", port, 1)
        self.monkeypatch.setattr(doctor, "settings_of", lambda _: there)

    def certificate(self, days: float = 825, address: str = "127.0.0.1") -> None:
        """Let another certificate lie here, of so many days, for this address."""
        self.monkeypatch.setattr(provision, "CERTIFICATE_DAYS", days)
        self.monkeypatch.setattr(provision, "_names", lambda _: [address])
        provision.renew(self.home)

    def heard(self, site: str, **values: Any) -> None:
        """Let a site not be connected, and the SuperLink have noted this of it."""
        self.online = tuple(each for each in self.online if each != site)
        member = self.home.roster().member(site)
        assert member is not None
        file = self.home.root / "superlink" / presence.FILE
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({presence._key(member.supernode): asdict(Presence(**values))}))

    def started(self, state: Any = "running", why: str = "") -> StudyFolder:
        """A study that was started here."""
        made = folder(self.home, self.study.study)
        made.create(self.study, self.home.roster_file.read_bytes())
        made.set_state(state, why)
        return made


Plant = Callable[[Ground], Any]


@dataclass(frozen=True)
class Fault:
    """A fault of a server, and the finding that names it."""

    what: str
    plant: Plant
    check: str
    words: str
    state: str = "error"


def _other_account(ground: Ground) -> None:
    owner = ground.home.root.stat().st_uid
    ground.monkeypatch.setattr(os, "geteuid", lambda: owner + 4321)


def _other_ca(ground: Ground) -> None:
    (ground.home.keys / "ca.crt").unlink()
    provision._make_ca(ground.home, "another")


def _edited_roster(ground: Ground) -> None:
    text = ground.home.roster_file.read_text()
    ground.home.roster_file.write_text(text.replace("hospital-b", "hospital-x"))


def _unknown_name(ground: Ground) -> None:
    federation = ground.home.federation().model_copy(update={"address": "coordinator.invalid"})
    ground.monkeypatch.setattr(Home, "federation", lambda _: federation)


def _invited(ground: Ground) -> None:
    (ground.home.invitations / "later.json").write_bytes(b"{}")


def _halted(ground: Ground) -> None:
    (ground.home.heads).mkdir()
    (ground.home.heads / f"{SITE}.jsonl").write_text('["halted", "two digests of one entry"]\n')


def _waiting(ground: Ground) -> None:
    ground.started().event("waiting", sites={SITE: "offline"}, have=2, minimum=3)


def _damaged_study(ground: Ground) -> None:
    (ground.started().root / "state.json").write_bytes(b"-")


def _disk(free: int) -> Plant:
    def plant(ground: Ground) -> None:
        usage = shutil.disk_usage(ground.home.root)._replace(free=free)
        ground.monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    return plant


def _memory(ground: Ground) -> None:
    proc = ground.home.root / "root" / "proc"
    proc.mkdir(parents=True)
    (proc / "meminfo").write_text("MemAvailable:    102400 kB\n")
    real = findings.memory
    ground.monkeypatch.setattr(findings, "memory", lambda least, enough, use: real(least, enough, use, proc.parent))


def _libraries(ground: Ground) -> None:
    real = findings.pinned
    ground.monkeypatch.setattr(findings, "pinned", lambda role: real(role, ['flwr==1.40.0; extra == "server"']))


def _down(ground: Ground) -> None:
    ground.up = False
    ground.port(2)


def _port_taken(ground: Ground) -> None:
    ground.up = False


FAULTS = (
    Fault("the doctor runs as another account than the server", _other_account, "account", "sudo -u"),
    Fault(
        "the coordinator's key is gone",
        lambda g: (g.home.keys / "coordinator.key").unlink(),
        "coordinator's key",
        "cannot read the key",
    ),
    Fault(
        "the coordinator's key is readable by others",
        lambda g: (g.home.keys / "coordinator.key").chmod(0o644),
        "coordinator's key",
        "run: chmod 600",
    ),
    Fault("the certificate ran out", lambda g: g.certificate(-0.02), "certificate", "run consilium-server renew"),
    Fault(
        "the certificate runs out in 10 days",
        lambda g: g.certificate(10.1),
        "certificate",
        "10 days, for 127.0.0.1: run consilium-server renew",
        "warning",
    ),
    Fault(
        "the certificate lacks the name that sites call",
        lambda g: g.certificate(address="elsewhere.example"),
        "certificate",
        "is for elsewhere.example, and sites call 127.0.0.1",
    ),
    Fault(
        "the certificate is damaged",
        lambda g: (g.home.keys / "superlink.crt").write_bytes(b"-"),
        "certificate",
        "restore it",
    ),
    Fault(
        "the certificate is of another key",
        lambda g: (g.home.keys / "superlink.key").write_bytes((g.home.keys / "ca.key").read_bytes()),
        "certificate",
        "another key than superlink.key",
    ),
    Fault("the certificate is of another CA", _other_ca, "certificate", "the federation's CA did not sign it"),
    Fault(
        "an older certificate is served than lies here",
        lambda g: g.certificate(),
        "programs",
        "an older certificate than lies here",
        "warning",
    ),
    Fault("the roster was edited", _edited_roster, "roster", "was edited or damaged: restore it"),
    Fault("the server's name is not known", _unknown_name, "address", "ask for its entry in the DNS", "warning"),
    Fault("another program has the port", _port_taken, "programs", "another program has port"),
    Fault(
        "the programs do not run",
        _down,
        "programs",
        "start them: consilium-server up",
        "warning",
    ),
    Fault("the programs run and do not answer", lambda g: g.port(2), "programs", "nothing answers on port 2"),
    Fault("a site was invited and never admitted", _invited, "site later", "then admit it", "warning"),
    Fault("a site runs twice", _halted, f"site {SITE}", f"then consilium-server readmit {SITE}"),
    Fault(
        "a site dropped out",
        lambda g: g.heard(SITE, seen=time.time() - 7200, release="0.1.0"),
        f"site {SITE}",
        "not connected (not since",
        "warning",
    ),
    Fault("a site never connected", lambda g: g.heard(SITE), f"site {SITE}", "not connected (never)", "warning"),
    Fault(
        "a site's clock is wrong",
        lambda g: g.heard(SITE, seen=1.0, clock=-1200.0, refused=2.0),
        f"site {SITE}",
        "its clock is 20 min behind",
    ),
    Fault(
        "a study failed", lambda g: g.started("failed", "a record is damaged"), "study synthetic-study", "a record is"
    ),
    Fault(
        "a study was stopped",
        lambda g: g.started("stopped", "by the coordinator"),
        "study synthetic-study",
        "consilium-server resume",
        "warning",
    ),
    Fault("a study waits for a site", _waiting, "study synthetic-study", f"waiting for {SITE} (offline)", "warning"),
    Fault("a study's state is damaged", _damaged_study, "study synthetic-study", "state.json"),
    Fault("the disk is full", _disk(0), "disk", "make room"),
    Fault("memory is used up", _memory, "memory", "end other programs"),
    Fault("a library is of another version", _libraries, "libraries", "this release is made for 1.40.0"),
)


def copy(sound: Path, here: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack, study: Study) -> Ground:
    """Ground of its own for one fault, in the folder ``here``."""
    made = Ground(Home(shutil.copytree(sound, here) / "server"), study, monkeypatch, stack)
    made.begin()
    return made
