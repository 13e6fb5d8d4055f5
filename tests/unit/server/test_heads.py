"""One site, one ledger: a home that runs twice or went back is found by its answers, and no honest site ever is."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.site import Site
from typer.testing import CliRunner

from consilium_client.site import Home as SiteHome
from consilium_client.state import instance
from consilium_server.commands.cli import app
from consilium_server.state.heads import Doubt, Heads, TwoLedgers
from consilium_server.state.study_folder import StudyFolder
from consilium_server.study.context import AskAgain, StudyContext
from consilium_shared.canonical import digest
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import Advertise, Head, Refusal


class Ledger:
    """A site's ledger and what it said: each question is answered once, and again with the same bytes."""

    def __init__(self, name: str, entries: tuple[str, ...] = ()) -> None:
        self.name, self.entries = name, list(entries)
        self.said: dict[str, Head] = {}

    def write(self, number: int) -> None:
        for _ in range(number):
            self.entries.append(digest(f"{self.name} {len(self.entries)}".encode()))

    def answer(self, question: str) -> Head:
        if question not in self.said:
            self.said[question] = Head(seq=len(self.entries), sha256=self.entries[-1] if self.entries else "0" * 64)
            self.write(1)  # the release of what was said
        return self.said[question]

    def copy(self, name: str) -> Ledger:
        return Ledger(name, tuple(self.entries))


def taken(heads: Heads, question: str, answer: Callable[[str], Head]) -> None:
    """What a study's process does with an answer, and where it is in doubt: a question by chance, then the first."""
    try:
        heads.check("north", question, answer(question), short=True)
    except Doubt:
        probe = secrets.token_hex(8)
        heads.ask("north", probe)
        heads.check("north", probe, answer(probe), short=True, new=True)
        heads.excuse("north", question)
        heads.check("north", question, answer(question), short=True)


STEP = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 9), st.integers(0, 1)),
    st.tuples(st.just("deliver"), st.integers(0, 9), st.integers(0, 1)),
    st.tuples(st.just("write"), st.integers(1, 4), st.just(0)),
    st.tuples(st.just("restart"), st.just(0), st.integers(0, 1)),
    st.tuples(st.just("power"), st.integers(0, 200), st.just(0)),
    st.tuples(st.just("keep"), st.just(0), st.just(0)),
    st.tuples(st.just("restore"), st.just(0), st.just(0)),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(STEP, max_size=40))
def test_an_honest_site_is_never_accused_however_late_and_often_its_answers_come(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    """Two studies' processes that are started again, answers that come twice, late and to the other's successor, losses
    of power at the server that take the end of the file, and older files that are put back, or none."""
    folder = tmp_path_factory.mktemp("heads")
    ledger, processes, asked = Ledger("north"), [Heads(folder), Heads(folder)], set()
    file, kept = folder / "north.jsonl", b""
    for kind, number, process in steps:
        question = f"question {number}"
        if kind == "ask":
            processes[process].ask("north", question)
            asked.add(question)
            ledger.answer(question)
        elif kind == "deliver" and question in asked:
            taken(processes[process], question, ledger.answer)
        elif kind == "write":
            ledger.write(number)
        elif kind == "restart":
            processes[process] = Heads(folder)
        elif kind == "power" and file.exists():
            file.write_bytes(file.read_bytes()[: -number or None])
            processes = [Heads(folder), Heads(folder)]
        elif kind == "keep":
            kept = file.read_bytes() if file.exists() else b""
        elif kind == "restore":
            file.write_bytes(kept)
            processes = [Heads(folder), Heads(folder)]
    assert Heads(folder).halted("north") is None


@pytest.mark.parametrize("lost", ["its last lines", "the file"])
def test_a_server_that_lost_what_it_knew_asks_once_more_before_it_accuses(tmp_path: Path, lost: str) -> None:
    """Both studies' questions were answered before the loss, and are put in another order after it."""
    heads, ledger, file = Heads(tmp_path), Ledger("north"), tmp_path / "north.jsonl"
    heads.check("north", "proposal", ledger.answer("proposal"))
    before = file.read_bytes()
    for question in ("one's keys", "other's keys"):
        heads.ask("north", question)
        heads.check("north", question, ledger.answer(question))
    file.write_bytes(before) if lost == "its last lines" else file.unlink()
    heads = Heads(tmp_path)
    for question in ("other's keys", "one's keys"):
        heads.ask("north", question)
        with pytest.raises(Doubt) if question == "one's keys" else nullcontext():
            heads.check("north", question, ledger.answer(question))
    taken(heads, "one's keys", ledger.answer)
    Heads(tmp_path).check("north", "one's keys", ledger.answer("one's keys"))
    assert heads.halted("north") is None


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 30), st.lists(st.booleans(), min_size=8, max_size=8), st.integers(0, 5))
def test_of_two_copies_that_answer_by_chance_the_site_is_halted_when_the_second_has_answered_a_while(
    tmp_path_factory: pytest.TempPathFactory, before: int, which: list[bool], ahead: int
) -> None:
    folder = tmp_path_factory.mktemp("heads")
    heads, original = Heads(folder), Ledger("original")
    original.write(before)
    clone = original.copy("clone")
    original.write(ahead)
    with pytest.raises(TwoLedgers, match="two copies"):
        for number, from_clone in enumerate([*which, *([True, False] * 20)]):
            heads.ask("north", str(number))
            taken(heads, str(number), (clone if from_clone else original).answer)


def test_a_backup_that_was_put_back_is_found_with_its_first_answers_and_no_answer_is_taken_any_more(
    tmp_path: Path,
) -> None:
    heads, ledger = Heads(tmp_path), Ledger("now")
    ledger.write(1)
    backup = ledger.copy("restored")
    ledger.write(2)
    for number in range(4):
        heads.ask("north", f"before {number}")
        heads.check("north", f"before {number}", ledger.answer(f"before {number}"))
    heads.ask("north", "new")
    with pytest.raises(TwoLedgers, match="had 7 entries or more before it was asked, and 2 when it answered"):
        taken(heads, "new", backup.answer)
    ledger.write(9)
    for process in (heads, Heads(tmp_path)):  # in every study, whatever comes next
        process.ask("north", "later")
        with pytest.raises(TwoLedgers):
            process.check("north", "later", ledger.answer("later"))
    Heads(tmp_path).check("south", "later", Ledger("south").answer("later"))


def test_one_number_with_two_digests_is_proof_even_where_the_question_was_never_noted(tmp_path: Path) -> None:
    one, other = Head(seq=7, sha256="a" * 64), Head(seq=7, sha256="b" * 64)
    heads = Heads(tmp_path)
    heads.check("north", "?", one)
    heads.check("north", "?", one)
    with pytest.raises(TwoLedgers, match="entry 7 of its ledger is aaaaaaaaaaaa in one answer and bbbbbbbbbbbb in"):
        heads.check("north", "?", other)


def test_two_answers_at_one_head_are_proof_and_the_same_one_twice_or_one_kept_over_a_crash_are_none(
    tmp_path: Path,
) -> None:
    """A copy that is level with the other: the answer of each is entered after the same entry."""
    heads, head = Heads(tmp_path), Head(seq=7, sha256="a" * 64)
    heads.check("north", "update", head)
    for _ in range(2):
        heads.check("north", "keys", head, short=True)
    heads.check("north", "counts", head)
    with pytest.raises(TwoLedgers, match="two answers were made when its ledger ended with entry 7"):
        Heads(tmp_path).check("north", "other keys", head, short=True)


def test_a_file_with_a_torn_or_foreign_line_is_read_on(tmp_path: Path) -> None:
    heads = Heads(tmp_path)
    heads.check("north", "?", Head(seq=7, sha256="a" * 64))
    with (tmp_path / "north.jsonl").open("ab") as file:
        file.write(b'[]\n{"x": 1}\n["head", "x"]\n["hea')
    with pytest.raises(TwoLedgers):
        Heads(tmp_path).check("north", "?", Head(seq=7, sha256="b" * 64))
    assert Heads(tmp_path).halted("north") is not None


@pytest.fixture
def talk(coordinator: Any) -> Any:
    """The server's context of a study, over an answer that came by hand."""
    folder = StudyFolder(coordinator.home.studies / "one")
    folder.create(coordinator.study, coordinator.home.roster_file.read_bytes())

    def once(process: StudyContext, site: Site, header: bytes, sent: bytes = b"") -> messages.Answer:
        process.note_asked("hospital-a", header)
        answer, body = site.requests.handle(header, sent)
        payload: Any = SimpleNamespace(size=len(body), sha256=digest(body))
        return process.decode(SimpleNamespace(site="hospital-a", header=answer, payload=payload), header)  # type: ignore[arg-type]

    def ask(site: Site, header: bytes) -> messages.Answer:
        process = StudyContext(coordinator.home, folder, None, {})  # type: ignore[arg-type]
        for _ in range(3):
            try:
                return once(process, site, *(process.instead("hospital-a") or (header,)))
            except AskAgain:
                continue
        raise AssertionError("it is asked for ever")

    return ask


def keys(coordinator: Any, number: int) -> bytes:
    request = Advertise(**coordinator.common(), of="training", round=number, attempt=1)
    return messages.encode(request, coordinator.key)


def test_a_clone_of_a_real_home_is_found_between_two_rounds_and_both_ends_can_read_why(
    coordinator: Any, site: Site, talk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.approve()
    talk(site, keys(coordinator, 1))
    shutil.copytree(coordinator.site.root, tmp_path / "clone", ignore=shutil.ignore_patterns("run"))
    monkeypatch.setattr(coordinator, "site", SiteHome(tmp_path / "clone"))
    clone = Site(coordinator)
    try:
        talk(site, keys(coordinator, 2))
        with pytest.raises(TwoLedgers) as found:
            talk(clone, keys(coordinator, 3))
    finally:
        clone.service.close()
    assert "two copies of this site's home run" in str(found.value) and "readmit" in str(found.value)
    with pytest.raises(TwoLedgers):
        talk(site, keys(coordinator, 1))
    server = ["--home", str(coordinator.home.root)]
    assert "halted: " in CliRunner().invoke(app, ["status", *server]).output
    assert CliRunner().invoke(app, ["readmit", "hospital-a", *server]).exit_code == 0
    talk(site, keys(coordinator, 3))
    assert Heads(coordinator.home.heads).halted("hospital-a") is None
    assert (coordinator.home.heads / "hospital-a.1.jsonl").exists(), "the proof is kept"


def test_a_site_that_is_moved_or_started_again_after_a_crash_goes_on(
    coordinator: Any, site: Site, talk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.approve()
    talk(site, keys(coordinator, 1))
    site.service.close()
    shutil.copytree(coordinator.site.root, tmp_path / "moved", ignore=shutil.ignore_patterns("run"))
    moved = SiteHome(tmp_path / "moved")
    with moved.ledger.open("ab") as ledger:
        ledger.write(b'{"torn')
    monkeypatch.setattr(coordinator, "site", moved)
    again = Site(coordinator)
    try:
        assert "recover" in again.kinds()
        for header in (keys(coordinator, 2), keys(coordinator, 1), keys(coordinator, 2)):
            talk(again, header)
    finally:
        again.service.close()


def test_after_a_loss_at_the_server_a_real_site_gives_what_it_gave_and_is_not_accused(
    coordinator: Any, site: Site, talk: Any
) -> None:
    site.approve()
    one, two = (talk(site, keys(coordinator, number)) for number in (1, 2))
    entries = len(site.service.ledger.entries)
    (coordinator.home.heads / "hospital-a.jsonl").unlink()
    assert talk(site, keys(coordinator, 2)) == two and talk(site, keys(coordinator, 1)) == one
    assert len(site.service.ledger.entries) == entries + 1, "it was asked one new question"
    assert Heads(coordinator.home.heads).halted("hospital-a") is None


def test_a_refusal_of_what_the_site_could_not_read_which_no_ledger_has_accuses_nobody(
    coordinator: Any, site: Site, talk: Any
) -> None:
    site.approve()
    for number in (1, 2, 3):
        unreadable = json.loads(keys(coordinator, number))
        unreadable["body"]["attempt"] = 2  # altered on the way: the signature is none of it
        answer = talk(site, json.dumps(unreadable, separators=(",", ":"), sort_keys=True).encode())
        assert isinstance(answer, Refusal) and answer.reason == "bad-signature"
        talk(site, keys(coordinator, number))


def test_a_home_that_starts_in_another_place_or_on_another_machine_says_so_once(
    coordinator: Any, site: Site, tmp_path: Path
) -> None:
    machine = tmp_path / "machine-id"
    machine.write_text("one\n")
    assert [instance.note(coordinator.site, machine) for _ in range(2)] == [False, False]
    machine.write_text("two\n")
    assert [instance.note(coordinator.site, machine) for _ in range(2)] == [True, False]
    site.service.close()
    shutil.copytree(coordinator.site.root, tmp_path / "copy", ignore=shutil.ignore_patterns("run"))
    assert [instance.note(SiteHome(tmp_path / "copy"), machine) for _ in range(2)] == [True, False]
    (coordinator.site.store / "instance").write_bytes(b"damaged")
    assert not instance.note(coordinator.site, machine)


def test_a_cloned_machine_with_other_network_adapters_says_so_and_one_more_adapter_is_no_clone(
    coordinator: Any, site: Site, tmp_path: Path
) -> None:
    machine, adapters = tmp_path / "machine-id", tmp_path / "net"
    machine.write_text("one\n")

    def has(**addresses: str) -> bool:
        shutil.rmtree(adapters, ignore_errors=True)
        for name, address in addresses.items():
            (adapters / name / "device").mkdir(parents=True)
            (adapters / name / "address").write_text(address + "\n")
        (adapters / "docker0").mkdir(parents=True)
        (adapters / "docker0" / "address").write_text("another each day")
        return instance.note(coordinator.site, machine, adapters)

    assert not has(eth0="02:00:00:00:00:01")
    assert not has(eth0="02:00:00:00:00:01", eth1="02:00:00:00:00:02")
    assert not has(eth0="02:00:00:00:00:02"), "one was exchanged"
    assert not has(), "where none can be seen nothing is said"
    assert not has(eth0="02:00:00:00:00:03")
    assert has(eth0="02:00:00:00:00:04") and not has(eth0="02:00:00:00:00:04")
    file = coordinator.site.store / "instance"
    older = {name: value for name, value in json.loads(file.read_bytes()).items() if name != "adapters"}
    file.write_bytes(json.dumps(older).encode())
    assert not has(eth0="02:00:00:00:00:09"), "a note of an older release says nothing about them"
