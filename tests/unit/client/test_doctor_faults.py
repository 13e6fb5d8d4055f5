"""Every fault that is planted at a site is found by its doctor and named, with what to do; a sound site has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from tests.support import faults, server_faults
from tests.support.faults import FAULTS, Fault, Ground
from tests.support.site import Coordinator

from consilium_client.commands.doctor import examine
from consilium_client.transport import admission, connection
from consilium_server.superlink.gate import signer
from consilium_shared.findings import Finding


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a federation, of which each fault gets a copy."""
    folder = tmp_path_factory.mktemp("sound")
    Coordinator(folder)
    return folder


@pytest.fixture
def ground(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ground]:
    with ExitStack() as stack:
        yield faults.copy(sound, tmp_path / "f", monkeypatch, stack)


def test_the_table_in_the_documents_has_every_fault_of_both_ends() -> None:
    page = (Path(__file__).parents[3] / "docs" / "results" / "doctor.md").read_text(encoding="utf-8")
    told = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")]
    assert told == ["fault", *(f.what for f in FAULTS), "fault", *(f.what for f in server_faults.FAULTS)]


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.what for fault in FAULTS])
def test_a_fault_is_named(ground: Ground, fault: Fault) -> None:
    fault.plant(ground)
    (finding,) = (each for each in examine(ground.home) if each.check == fault.check)
    assert (finding.state, fault.words in finding.detail) == (fault.state, True), finding.detail


def test_a_sound_site_is_all_ok(ground: Ground) -> None:
    ground.monkeypatch.setattr("consilium_shared.findings.memory", lambda *_: Finding("memory", "ok", ""))
    assert [each for each in examine(ground.home) if each.state != "ok"] == []


def test_a_way_through_a_proxy_is_followed_with_name_and_password(ground: Ground) -> None:
    heads = ground.proxy(200, "it:s%40fe@")
    found = {each.check: each for each in examine(ground.home)}
    assert found["coordinator"].detail.endswith(f"through the proxy {found['proxy'].detail.split(',')[0]}")
    assert found["admission"].state == found["clock"].state == "ok"
    assert heads and all(b"Proxy-Authorization: Basic aXQ6c0BmZQ==" in head for head in heads)
    assert "s@fe" not in str(found)


def test_the_supernodes_end_has_a_cause(ground: Ground) -> None:
    there = ground.home.invitation()
    ground.monkeypatch.setattr(connection, "open_invitation", lambda _: there)
    assert "the server answers now" in connection.cause(ground.home.root)
    ground.admitted = False
    assert connection.cause(ground.home.root).startswith("admission: not admitted")
    ground.ahead = 60.0
    assert connection.cause(ground.home.root).startswith("clock: this machine's clock is")


def test_the_clocks_that_are_refused_are_those_that_flower_refuses() -> None:
    assert connection.NOTED_AHEAD_SECONDS < connection.AHEAD_SECONDS == SYSTEM_TIME_TOLERANCE
    assert connection.NOTED_BEHIND_SECONDS < connection.BEHIND_SECONDS == TIMESTAMP_TOLERANCE


def test_with_a_wrong_clock_it_is_the_clock_that_is_named(ground: Ground) -> None:
    ground.ahead, ground.admitted = 7200.0, False
    found = {each.check: each for each in examine(ground.home)}
    assert "s ahead of the server's; Flower refuses" in found["clock"].detail
    assert (found["admission"].state, "with this clock" in found["admission"].detail) == ("warning", True)


def test_without_a_server_each_other_check_says_which_one_is_to_be_mended(ground: Ground) -> None:
    ground.port(1)
    found = {each.check: each for each in examine(ground.home)}
    assert {found[check].state for check in ("certificate", "clock", "admission")} == {"warning"}
    assert all("see coordinator" in found[check].detail for check in ("certificate", "clock"))


def test_the_question_is_signed_as_flower_signs() -> None:
    key, when = ec.generate_private_key(ec.SECP384R1()), datetime(2026, 11, 30, tzinfo=UTC)
    assert admission.HEADERS == (TIMESTAMP_HEADER, FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
    headers = {name.encode(): value.encode() for name, value in admission.signed(key, when).items()}
    assert signer(headers, when) is not None
    assert signer(headers, when + timedelta(hours=1)) is None
