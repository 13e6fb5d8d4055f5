"""Every fault that is planted at a server is found by its doctor and named, with what to do; a sound one has none."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from tests.support import server_faults
from tests.support.server_faults import FAULTS, Fault, Ground
from tests.support.site import CONTRACT, Coordinator

from consilium_server.commands import conditions, provision, status
from consilium_server.commands.doctor import examine
from consilium_server.state.progress import Progress
from consilium_server.superlink.presence import Presence, Presences, of_sites
from consilium_server.superlink.renewal import Renewal
from consilium_shared.findings import Finding
from consilium_shared.study import Study


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a federation, of which each fault gets a copy."""
    folder = tmp_path_factory.mktemp("sound")
    Coordinator(folder)
    return folder


@pytest.fixture
def ground(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ground]:
    with ExitStack() as stack:
        yield server_faults.copy(sound, tmp_path / "f", monkeypatch, stack, Study.model_validate(CONTRACT))


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.what for fault in FAULTS])
def test_a_fault_is_named(ground: Ground, fault: Fault) -> None:
    fault.plant(ground)
    (finding,) = (each for each in examine(ground.home) if each.check == fault.check)
    assert (finding.state, fault.words in finding.detail) == (fault.state, True), finding.detail


def test_a_sound_server_is_all_ok(ground: Ground) -> None:
    ground.monkeypatch.setattr("consilium_shared.findings.memory", lambda *_: Finding("memory", "ok", ""))
    ground.started()
    assert [each for each in examine(ground.home) if each.state != "ok"] == []


def test_a_renewed_certificate_is_taken_while_the_server_serves(ground: Ground) -> None:
    files = ground.home.keys / "superlink.crt", ground.home.keys / "superlink.key"

    async def serve() -> list[str]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*files)
        renewal = Renewal(*files)
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
        where = server.sockets[0].getsockname()[:2]

        async def shown() -> str:
            return await asyncio.to_thread(ssl.get_server_certificate, where)

        found = [await shown()]
        assert not renewal.look([context])
        files[1].write_bytes(files[1].read_bytes()[:100])  # half a pair
        assert not renewal.look([context])
        found.append(await shown())
        provision.renew(ground.home)
        assert renewal.look([context]) and not renewal.look([context])
        found.append(await shown())
        server.close()
        return found

    before, half, after = asyncio.run(serve())
    assert before == half != after
    assert after.strip() == files[0].read_text().strip()


def test_whoever_was_heard_is_noted_and_a_refused_clock_until_it_is_right(ground: Ground) -> None:
    directory, roster = ground.home.root / "superlink", ground.home.roster()
    directory.mkdir()
    noted, member = Presences(directory), roster.members[1]
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    key = serialization.load_ssh_public_key(member.supernode.encode()).public_bytes(*form)
    noted.refused(key, 60.04)
    noted.write()
    assert of_sites(directory, roster)[member.site].wrong_clock() == 60.0
    assert status.said(of_sites(directory, roster)[member.site], False) == "refused: its clock is 60 s ahead"
    again = Presences(directory)
    again.taken(key, b"0.2.0\x1b[31m" + b"a" * 100)
    again.write()
    found = of_sites(directory, roster)
    assert found[member.site].wrong_clock() is None
    assert status.said(found[member.site], False).startswith("not since ")
    assert (found[member.site].release or "").startswith("0.2.0") and len(found[member.site].release or "") <= 40
    assert found[roster.members[0].site] == Presence()
    (directory / "presence.json").write_bytes(b"[1")
    assert of_sites(directory, roster)[member.site] == Presence()


def test_time_left_is_told_where_a_study_runs_and_waits_for_nobody() -> None:
    progress = Progress("s", 10, state="running", round=4, seconds=[10.0, 12.0, 300.0, 11.0])
    assert status.seconds_left(progress) == 69.0
    progress.waiting = "2 of 3 sites"
    assert status.seconds_left(progress) is None


def test_the_time_of_a_sites_last_answer_is_known() -> None:
    progress = Progress("s", 3)
    at = time.time()
    about = {"phase": "training", "seconds": 1.0, "bytes": 3}
    progress.apply({"event": "answer", "round": 1, "site": "north", "time": at, **about})
    assert status._exchanged([progress, Progress("t", 1, heard={"north": at - 5})]) == {"north": at}


def test_what_the_coordinators_people_should_know_is_a_condition(ground: Ground) -> None:
    ground.heard(server_faults.SITE, seen=1.0)
    folder = ground.started()
    folder.event("waiting", sites={server_faults.SITE: "offline"}, have=2, minimum=3)
    found = conditions.now(ground.home)
    assert sorted(each.kind for each in found.values()) == ["site-away", "study-waits"]
    assert found[f"away:{server_faults.SITE}"].over == ("site-back", f"site {server_faults.SITE} is connected again")
    folder.set_state("stopped", "by the coordinator")
    ground.certificate(10.1)
    found = conditions.now(ground.home)
    assert sorted(each.kind for each in found.values()) == ["certificate", "site-away", "study-ended"]
