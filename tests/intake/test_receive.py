"""What archives send arrives whole or not at all, once, from those who may send."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import struct
import threading
import time
import warnings
from pathlib import Path

import httpx
import pytest
from pydicom import dcmread
from pynetdicom import AE
from pynetdicom.sop_class import Verification
from tests.intake import studies
from tests.intake.archives import Archive, free_port

from consilium_client.commands.checks import installation
from consilium_client.commands.up import receiving
from consilium_client.intake.inbox import digest_of
from consilium_client.site import Home
from consilium_shared.errors import DataError
from consilium_shared.process.supervisor import Supervisor


def files_in(site) -> dict[str, Path]:
    return {file.stem: file for file in (site.root / "intake" / "inbox").glob("??/*.dcm")}


def association(site, title: str = Archive.title, contexts=None, called: str = "CONSILIUM"):
    entity = AE(ae_title=title)
    for each in contexts or [Verification]:
        entity.add_requested_context(each)
    return entity.associate("127.0.0.1", site.port, ae_title=called)


def test_an_archive_sends_and_every_instance_is_there_as_it_was(archive: Archive, site, tmp_path: Path) -> None:
    files = studies.write(tmp_path / "sent")
    site.receive()
    archive.hold(files)
    archive.send()
    kept = files_in(site)
    assert len(kept) == len(files)
    for file in files:
        sent = dcmread(file)
        got = dcmread(kept[hashlib.sha256(sent.SOPInstanceUID.encode()).hexdigest()])
        assert (got.PatientName, got.PixelData) == (sent.PatientName, sent.PixelData)
        assert got.file_meta.TransferSyntaxUID == sent.file_meta.TransferSyntaxUID
    inbox = site.inbox()
    assert {each.source for each in inbox.instances()} == {f"C-STORE from {Archive.title} (127.0.0.1)"}
    assert all(file.stat().st_mode & 0o077 == 0 for file in kept.values())


def test_what_is_sent_again_is_one_instance(archive: Archive, site, tmp_path: Path) -> None:
    site.receive()
    archive.hold(studies.write(tmp_path / "sent", studies=2, images=2))
    for _ in range(3):
        archive.send()
    assert site.inbox().counts() == {"inbox": 4, "repeats": 8, "differing": 0}


def test_other_bytes_under_a_known_identifier_do_not_replace_the_first(archive_of, site, tmp_path: Path) -> None:
    site.receive()
    one, other = studies.instance(0, 0), studies.instance(0, 0, PatientID="somebody else")
    for number, made in enumerate((one, other)):
        file = tmp_path / f"{number}.dcm"
        made.save_as(file, enforce_file_format=True)
        archive = archive_of("stand-in")
        archive.hold([file])
        archive.send()
    (kept,) = files_in(site).values()
    assert dcmread(kept).PatientID == one.PatientID
    assert site.inbox().counts() == {"inbox": 1, "repeats": 1, "differing": 1}


def send_what_breaks_off(archive: Archive) -> None:
    with contextlib.suppress(httpx.HTTPError):
        archive.send()


def test_a_killed_receiver_loses_nothing_that_it_acknowledged_and_keeps_nothing_twice(
    archive: Archive, site, tmp_path: Path
) -> None:
    files = studies.write(tmp_path / "sent", studies=8, images=5)
    archive.hold(files)
    running = site.receive()
    for kills in range(2):
        sending = threading.Thread(target=send_what_breaks_off, args=[archive], daemon=True)
        sending.start()
        before = len(files_in(site))
        until = time.monotonic() + 120
        while len(files_in(site)) < before + 5 and time.monotonic() < until:
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        running.wait()
        sending.join(timeout=60)
        acknowledged = {each.digest for each in site.inbox().instances()}
        assert acknowledged <= set(files_in(site))
        running = site.receive()
        assert {each.digest for each in site.inbox().instances()} == set(files_in(site)) >= acknowledged
        assert len(acknowledged) >= 5 * (kills + 1) - 1
    archive.send()
    expected = {hashlib.sha256(dcmread(file).SOPInstanceUID.encode()).hexdigest() for file in files}
    assert set(files_in(site)) == expected
    for file in files:
        sent = dcmread(file)
        got = files_in(site)[hashlib.sha256(sent.SOPInstanceUID.encode()).hexdigest()]
        assert dcmread(got).PixelData == sent.PixelData
    assert list((site.root / "intake" / "inbox" / "tmp").iterdir()) == []


def test_who_is_not_on_the_list_is_turned_away(site) -> None:
    site.receive()
    known = association(site)
    assert known.is_established and known.send_c_echo().Status == 0
    known.release()
    for stranger in (association(site, title="STRANGER"), association(site, called="OTHER")):
        assert stranger.is_rejected
    assert "no such peer" in site.said()


def test_an_address_that_is_on_nobodys_list_gets_no_answer(site) -> None:
    site.settings["receive"]["peers"] = [
        {"ae_title": Archive.title, "addresses": ["192.0.2.0/24"]},
    ]
    running = site.start("receive")
    until = time.monotonic() + 30
    while time.monotonic() < until and "receives on" not in site.said():
        time.sleep(0.1)
    with socket.create_connection(("127.0.0.1", site.port), timeout=10) as stranger:
        stranger.sendall(b"\x01")
        assert stranger_is_closed(stranger)
    assert running.poll() is None


def stranger_is_closed(connection: socket.socket) -> bool:
    connection.settimeout(20)
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


def test_a_title_counts_only_from_its_own_address(site) -> None:
    site.settings["receive"]["peers"] = [
        {"ae_title": Archive.title, "addresses": ["192.0.2.1"]},
        {"ae_title": "OTHER", "addresses": ["127.0.0.1"]},
    ]
    site.receive()
    assert association(site).is_rejected
    right = association(site, title="OTHER")
    assert right.is_established
    right.release()


def test_a_pdu_that_announces_gigabytes_ends_its_connection_alone(site) -> None:
    running = site.receive()
    beside = association(site)
    with socket.create_connection(("127.0.0.1", site.port), timeout=10) as attacker:
        attacker.sendall(struct.pack(">BBL", 1, 0, 2**32 - 1) + bytes(1000))
        assert stranger_is_closed(attacker)
    assert beside.send_c_echo().Status == 0
    beside.release()
    assert running.poll() is None


def test_a_connection_that_says_nothing_or_a_byte_at_a_time_is_closed_and_holds_nobody_up(site) -> None:
    site.settings["receive"]["timeout"] = 1.0
    site.receive()
    with (
        socket.create_connection(("127.0.0.1", site.port), timeout=10) as silent,
        socket.create_connection(("127.0.0.1", site.port), timeout=10) as slow,
    ):
        slow.sendall(struct.pack(">BBL", 1, 0, 1000) + b"\x00")
        beside = association(site)
        assert beside.send_c_echo().Status == 0
        beside.release()
        assert stranger_is_closed(silent)
        assert stranger_is_closed(slow)


def test_no_more_connections_than_permitted(site) -> None:
    site.settings["receive"]["associations"] = 2
    site.receive()
    time.sleep(0.5)  # the look whether it listens was a connection, too
    held = [association(site), association(site)]
    assert all(each.is_established for each in held)
    assert not association(site).is_established
    held.pop().release()
    time.sleep(0.5)
    again = association(site)
    assert again.is_established
    for each in (again, *held):
        each.release()


def test_an_instance_that_is_too_large_or_finds_no_room_is_refused_and_leaves_nothing(site, tmp_path: Path) -> None:
    site.settings["limits"] = {"object_mib": 1, "keep_free_gib": 0.01}
    site.receive()
    large = studies.instance(0, 0, Rows=1024, Columns=1024)
    client = association(site, contexts=[large.SOPClassUID])
    assert "Status" not in client.send_c_store(large)
    small = studies.instance(0, 1)
    client = association(site, contexts=[small.SOPClassUID])
    assert client.send_c_store(small).Status == 0
    client.release()
    assert len(files_in(site)) == 1
    until = time.monotonic() + 10
    while list((site.root / "intake" / "inbox" / "tmp").iterdir()) and time.monotonic() < until:
        time.sleep(0.1)
    assert list((site.root / "intake" / "inbox" / "tmp").iterdir()) == []
    site.kill()
    site.settings["limits"] = {"keep_free_gib": 10.0**9}
    site.receive()
    client = association(site, contexts=[small.SOPClassUID])
    assert client.send_c_store(studies.instance(0, 2)).Status == 0xA700
    client.release()
    assert len(files_in(site)) == 1


def test_a_name_that_is_no_uid_stays_out(site) -> None:
    site.receive()
    made = studies.instance(0, 0)
    client = association(site, contexts=[made.SOPClassUID])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.SOPInstanceUID = "../../../etc/passwd"
        assert client.send_c_store(made).Status == 0xC000
    client.release()
    assert files_in(site) == {}
    assert "sent a SOP instance UID that is no UID" in site.said()


@pytest.mark.parametrize("bad", ["", ".", "1", "1..2", "1.02", "1.a", "1.2\n", "1/2", "1." * 32 + "1"])
def test_only_a_uid_names_an_instance(bad: str) -> None:
    with pytest.raises(DataError):
        digest_of(bad)


def test_the_log_says_titles_and_addresses_and_nothing_of_a_patient(archive: Archive, site, tmp_path: Path) -> None:
    site.receive()
    archive.hold(studies.write(tmp_path / "sent", studies=1))
    archive.send()
    assert f"association with {Archive.title} from 127.0.0.1" in site.said()
    assert studies.PLANTED not in site.said()


def test_a_port_that_is_taken_is_said_without_a_traceback(site) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        site.settings["receive"]["port"] = taken.getsockname()[1]
        done = site.run("receive")
    assert done.returncode == 2
    assert "cannot listen" in done.stderr and "Traceback" not in done.stderr


def test_up_runs_the_receiver_where_site_yaml_has_one_and_starts_it_again_when_it_ends(site, tmp_path: Path) -> None:
    site.write()
    home, said = Home(site.root), []
    (program,) = receiving(home, home.config())
    supervisor = Supervisor(home.logs, said.append)
    supervisor.add(program)

    def echoes() -> bool:
        made = association(site)
        answered = made.is_established and made.send_c_echo().Status == 0
        made.abort()
        return answered

    def until(look) -> None:
        deadline = time.monotonic() + 60
        while not look():
            assert time.monotonic() < deadline, said
            supervisor.tick()
            time.sleep(0.05)

    try:
        until(echoes)
        assert installation.intake(home).state == "ok"
        os.kill(supervisor.process("receiver"), signal.SIGKILL)
        until(lambda: len(said) == 2)  # started, killed
        assert installation.intake(home).state == "warning"
        until(echoes)
    finally:
        supervisor.stop()
    assert [line.split(" (")[0] for line in said] == [
        "receiver started",
        "receiver was killed by signal 9; starting it again in 1 s",
        "receiver started",
    ]


def test_a_receiver_that_cannot_receive_says_why_and_one_of_its_own_unit_is_left_to_it(site, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", site.port)):
        site.write()
        home, said = Home(site.root), []
        supervisor = Supervisor(home.logs, said.append)
        (program,) = receiving(home, home.config())
        supervisor.add(program)
        deadline = time.monotonic() + 60
        while len(said) < 2 and time.monotonic() < deadline:
            supervisor.tick()
            time.sleep(0.05)
        supervisor.stop()
    assert f"ended with status 2: cannot listen on 127.0.0.1:{site.port}" in said[1]
    site.settings["receive"]["unit"] = True
    site.write()
    assert receiving(home, home.config()) == []
    del site.settings["receive"]
    site.write()
    assert receiving(home, home.config()) == []
