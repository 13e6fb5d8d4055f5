"""A start of the SuperLink: waited for while it makes progress; a start that fails says its true cause."""

from __future__ import annotations

import datetime
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from consilium_server.commands.provision import provision
from consilium_server.federation import Home
from consilium_server.superlink import start as superlink_start
from consilium_server.superlink.main import bind
from consilium_server.superlink.settings import SuperLinkSettings, check_certificates, prepare
from consilium_server.superlink.start import STILL_SECONDS, cause, wait_for_superlink
from consilium_shared.errors import ConfigurationError, TransportError
from consilium_shared.identity import write_secret
from consilium_shared.process.supervisor import Supervisor

FEDERATION = "federation: f\naddress: 127.0.0.1\nport: 9443\nsites: [hospital-a, hospital-b]\n"


class Start(Supervisor):
    """A start whose seconds pass as they are looked at; ``step`` is done in each, and says whether it answers."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(home / "log", lambda _: None)
        self.link = SuperLinkSettings(home, "127.0.0.1", 1, 2)
        self.link.directory.mkdir(parents=True)
        self.log = home / "superlink.log"
        self.now = 0.0
        self.running = True
        self.said: list[str] = []
        self.step: Callable[[int], bool] = lambda _: False
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(superlink_start, "wait_until_ready", self._look)

    def _look(self, _link: SuperLinkSettings, timeout: float) -> None:
        self.now += timeout
        if not self.step(int(self.now)):
            raise TransportError("it does not answer")

    def alive(self, name: str) -> bool:
        return self.running

    def wait(self) -> None:
        wait_for_superlink(self.log, self.link, self, self.said.append)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    return Start(tmp_path, monkeypatch)


@pytest.mark.parametrize("what", ["log", "file"])
def test_a_slow_start_is_waited_for_as_long_as_it_makes_progress(start: Start, what: str) -> None:
    file = start.log if what == "log" else start.link.directory / "presence.json.new"

    def step(second: int) -> bool:
        if second % int(STILL_SECONDS - 1) == 0:
            with file.open("a") as opened:
                opened.write(f"second {second}\n")
        return second > 3600

    start.step = step
    start.wait()
    assert start.now > 3600
    assert any("still starting" in line for line in start.said)


def test_a_start_that_stands_still_is_given_up(start: Start) -> None:
    start.log.write_text("of an earlier start\n")
    with pytest.raises(ConfigurationError, match="stand still"):
        start.wait()
    assert STILL_SECONDS < start.now < STILL_SECONDS + 5


def test_a_start_that_ends_is_told_with_what_it_said_and_not_with_what_an_earlier_one_said(start: Start) -> None:
    start.log.write_text("the SuperLink ends: the earlier cause\n")

    def step(_: int) -> bool:
        with start.log.open("a") as opened:
            opened.write("one line\nthe SuperLink ends: the port is taken\nanother thread's last line\n")
        start.running = False
        return False

    start.step = step
    with pytest.raises(ConfigurationError, match=r"does not start \(.*superlink\.log\): the port is taken$"):
        start.wait()


MIGRATION = """\
2026-11-30 INFO alembic.runtime.migration Running upgrade a -> b, Add task usage.
Traceback (most recent call last):
  File "base.py", line 1967, in _exec_single_context
    self.dialect.do_execute(
sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) table task_usage already exists
[SQL:
CREATE TABLE task_usage (token VARCHAR)
]
(Background on this error at: https://sqlalche.me/e/21/e3q8)
"""


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (MIGRATION, "sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) table task_usage already exists"),
        ("Traceback (most recent call last):\n  File 1\nMemoryError\n", "MemoryError"),
        ("a warning\nKilled\n\n", "Killed"),
        (f"{MIGRATION}the SuperLink ends: OperationalError: short\n", "OperationalError: short"),
        ("", "its log is empty"),
    ],
)
def test_the_cause_is_the_line_that_says_what_happened(tmp_path: Path, log: str, said: str) -> None:
    file = tmp_path / "superlink.log"
    earlier = b"the SuperLink ends: something of yesterday\n"
    file.write_bytes(earlier + log.encode())
    assert cause(file, len(earlier)) == said
    assert cause(tmp_path / "none.log", 0) == "its log is empty"


def test_the_log_that_a_start_found_too_long_is_read_from_its_new_beginning(tmp_path: Path) -> None:
    (tmp_path / "superlink.log").write_text("the SuperLink ends: at once\n")
    assert cause(tmp_path / "superlink.log", 20_000_000) == "at once"


# --- what a start is refused for, before anything is made ---


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("provisioned")
    (folder / "federation.yaml").write_text(FEDERATION)
    home = Home(folder / "server")
    provision(home, folder / "federation.yaml")
    return home


@pytest.fixture
def settings(provisioned: Home, tmp_path: Path) -> SuperLinkSettings:
    shutil.copytree(provisioned.root, tmp_path / "server")
    return SuperLinkSettings(tmp_path / "server", "127.0.0.1", 9443, 9444)


@pytest.mark.parametrize(
    ("days", "said"),
    [
        (826, r"superlink\.crt expired on .*consilium-server renew"),
        (3651, r"ca\.crt expired on"),
        (-1, r"not valid before .* Set the clock"),
    ],
)
def test_a_certificate_out_of_its_time_is_named_with_the_cure(
    settings: SuperLinkSettings, days: int, said: str
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    check_certificates(settings, now)
    with pytest.raises(ConfigurationError, match=said):
        check_certificates(settings, now + datetime.timedelta(days=days))


@pytest.mark.parametrize("name", ["ca.crt", "superlink.crt", "superlink.key"])
def test_a_damaged_certificate_or_key_is_named(settings: SuperLinkSettings, name: str) -> None:
    (settings.home / "keys" / name).write_bytes(b"")
    with pytest.raises(ConfigurationError, match=rf"{name} is not a"):
        prepare(settings)


def test_a_certificate_of_another_key_is_named(settings: SuperLinkSettings) -> None:
    settings.certificate.write_bytes(settings.ca_certificate.read_bytes())
    with pytest.raises(ConfigurationError, match=r"superlink\.crt belongs to another key"):
        prepare(settings)


@pytest.mark.parametrize("name", ["superexec.secret", "control.token"])
def test_a_secret_that_a_stop_left_empty_is_made_again(settings: SuperLinkSettings, name: str) -> None:
    prepare(settings)
    (settings.directory / name).write_bytes(b"")
    (settings.directory / f".{name}.le_ft123").write_bytes(b"half")
    prepare(settings)
    assert len(settings.control_token()) == len(settings.superexec_secret()) == 64
    assert not (settings.directory / f".{name}.le_ft123").exists()


@pytest.mark.parametrize("which", ["private", "public"])
def test_a_port_that_is_taken_is_named_as_the_last_word_of_the_log(
    settings: SuperLinkSettings, tmp_path: Path, which: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, bind("127.0.0.1", 0) as free:
        ports = [str(each.getsockname()[1]) for each in (taken, free)]
        free.close()
        public, private = ports if which == "public" else ports[::-1]
        names = ("--home", str(settings.home), "--public-host", "127.0.0.1")
        command = ["-m", "consilium_server.superlink", *names, "--public-port", public, "--private-port", private]
        with (tmp_path / "log").open("wb") as log:
            done = subprocess.run([sys.executable, *command], stderr=log, check=False, timeout=100)
    assert done.returncode == 2
    assert cause(tmp_path / "log", 0).startswith(
        f"Cannot listen on 127.0.0.1:{ports[0]}: another program has that port"
    )


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"192\.0\.2\.1:0: no interface of this machine"):
        bind("192.0.2.1", 0)


# --- what a stop leaves while keys are made ---


def test_a_key_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Stop

    for function in ("fsync", "link"):
        with monkeypatch.context() as patched, pytest.raises(Stop):
            patched.setattr(f"os.{function}", stop)
            write_secret(tmp_path / "keys" / "a.key", b"secret")
        assert list((tmp_path / "keys").iterdir()) == []
    write_secret(tmp_path / "keys" / "a.key", b"secret")
    with pytest.raises(ConfigurationError, match="exists"):
        write_secret(tmp_path / "keys" / "a.key", b"other")
    assert (tmp_path / "keys" / "a.key").read_bytes() == b"secret"
    assert (tmp_path / "keys" / "a.key").stat().st_mode & 0o777 == 0o600
    assert [file.name for file in (tmp_path / "keys").iterdir()] == ["a.key"]


def test_provisioning_goes_on_after_a_stop_at_any_file(tmp_path: Path, provisioned: Home) -> None:
    """Each file in the order of its making: whatever came after it is missing."""
    order = ["coordinator.key", "ca.key", "ca.crt", "superlink.key", "superlink.crt"]
    (tmp_path / "federation.yaml").write_text(FEDERATION)
    for number in range(len(order)):
        home = Home(tmp_path / f"server-{number}")
        home.keys.mkdir(parents=True)
        for name in order[: number + 1]:
            shutil.copy(provisioned.keys / name, home.keys / name)
        provision(home, tmp_path / "federation.yaml")
        assert provision(home, tmp_path / "federation.yaml") == []
        prepare(SuperLinkSettings(home.root, "127.0.0.1", 9443, 9444))
    invited = Home(tmp_path / "server-4")
    (invited.keys / "ca.crt").unlink()
    with pytest.raises(ConfigurationError, match=r"ca\.crt is missing.*invitation"):
        provision(invited, tmp_path / "federation.yaml")
