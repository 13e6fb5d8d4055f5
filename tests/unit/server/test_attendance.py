"""No site of a roster is ever without a standing and, where it is out, a reason; and whoever can come back is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_server.state.progress import Progress
from consilium_server.study import exchanges as exchanges_module
from consilium_server.study.attendance import LASTING, Attendance
from consilium_server.study.context import AskAgain, Halted
from consilium_server.study.exchange_state import ExchangeState
from consilium_server.study.exchanges import Aside, Exchange, Exchanges
from consilium_server.study.rounds import StudyRun
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import Advertised, Refusal

SITES = ("north", "south", "west")


@pytest.fixture
def there(tmp_path: Path) -> Attendance:
    found = Attendance(SITES, 20, tmp_path / "attendance")
    for site in SITES:
        found.come(site)
    found.begin(1)
    return found


def test_who_refused_stands_in_every_record_until_it_is_back(there: Attendance) -> None:
    there.begin(2)
    there.note_refusal("south", "data", "the data cannot be used")
    there.refuse("south", "data", "the data cannot be used", 2)
    assert there.absent({"north", "west"}) == ({}, {"south": ["data", "the data cannot be used"]})
    for number in (3, 4):
        there.begin(number)
        assert there.absent({"north", "west"})[1] == {"south": ["data", "since round 2: the data cannot be used"]}
    there.begin(5)
    assert there.come("south")
    assert there.absent(SITES) == ({}, {})


def test_a_refusal_in_an_attempt_that_was_given_up_stays_in_the_rounds_record(there: Attendance) -> None:
    there.note_refusal("south", "model", "no model")
    there.note_away("west", "gave no update in 20.0 s")
    assert there.absent({"north"}) == ({"west": "gave no update in 20.0 s"}, {"south": ["model", "no model"]})
    there.note_away("west", "gave no keys in 3.0 s")
    assert there.absent({"north", "south"}) == ({"west": "gave no keys in 3.0 s"}, {})
    assert there.remarks({"north", "south"}) == {
        "south": ["model: no model"],
        "west": ["gave no update in 20.0 s", "gave no keys in 3.0 s"],
    }


def test_who_was_refused_before_the_first_round_stays_named_while_it_is_proposed_to_again(there: Attendance) -> None:
    there.out, there.round = {}, 0
    there.refuse("south", "budget", "not covered", 0)
    there.begin(1)
    there.undecided("south", lost=True)  # what was refused is not kept there: it is to be told of the study again
    assert there.sites("pending") == ("south",)
    assert there.absent({"north", "west"}) == ({}, {"south": ["budget", "since before round 1: not covered"]})
    there.undecided("south")
    assert there.absent({"north", "west"}) == ({"south": "not decided"}, {})


def test_who_refuses_after_the_server_was_started_again_was_not_out_since_before_the_first_round(
    tmp_path: Path,
) -> None:
    """In the records of round 7 and 8 of a study that went on after its checkpoint of round 6."""
    there, run, said = Attendance(SITES, 20, tmp_path / "attendance"), StudyRun.__new__(StudyRun), []

    def gather(_: frozenset[str]) -> None:
        there.come("north"), there.come("west")
        there.refuse("south", "budget", "not covered", there.round, costly=True)

    def train(number: int) -> None:
        there.begin(number)
        said.append(there.absent({"north", "west"})[1]["south"])
        there.begin(number + 1)
        said.append(there.absent({"north", "west"})[1]["south"])
        raise Halted("enough")

    run.checkpoint = SimpleNamespace(round=6, record={"participants": SITES})  # type: ignore[assignment]
    run.study = SimpleNamespace(training=SimpleNamespace(rounds=20))  # type: ignore[assignment]
    run.recruitment = SimpleNamespace(attendance=there, gather=gather)  # type: ignore[assignment]
    nothing = {"_has_record": lambda _: True, "_check_moved": lambda: None, "_check_noise": lambda: None}
    nothing["_over"] = lambda _: False
    for name, does in {**nothing, "_train": train}.items():
        setattr(run, name, does)
    with pytest.raises(Halted):
        run.run()
    assert said == [["budget", "not covered"], ["budget", "since round 7: not covered"]]


def test_the_notes_of_a_round_outlive_the_process_and_no_other_rounds_are_taken_for_them(tmp_path: Path) -> None:
    def fresh(number: int) -> Attendance:
        found = Attendance(SITES, 20, tmp_path / "attendance")
        for site in SITES:
            found.come(site)
        found.begin(number)
        return found

    fresh(2).note_refusal("south", "model", "no model")
    assert fresh(2).absent({"north", "west"})[1] == {"south": ["model", "no model"]}
    assert fresh(3).absent({"north", "west"}) == ({"south": "was not asked for this sum"}, {})
    (tmp_path / "attendance").write_bytes(b"damaged")
    assert fresh(2).absent({"north", "west"}) == ({"south": "was not asked for this sum"}, {})


@pytest.mark.parametrize("reason", ["data", "malformed", "policy", "budget", "witness", "too-slow"])
def test_what_the_hospitals_people_can_mend_is_asked_again_for_the_next_round(there: Attendance, reason: str) -> None:
    assert there.refuse("south", reason, "", 1) == 2
    assert there.due(1, {"north", "west"}) == ()
    assert there.due(2, {"north", "west"}) == ("south",)
    assert there.refuse("south", reason, "", 2) == 3, "without keys it costs the others nothing: once a round"
    assert there.out["south"].since == 1


@pytest.mark.parametrize("reason", sorted(LASTING))
def test_what_lasts_is_asked_again_when_somebody_resumes_the_study(there: Attendance, reason: str) -> None:
    assert there.refuse("south", reason, "", 1) is None
    assert there.due(99, {"north", "west"}) == ()
    there.recall()
    assert there.due(2, {"north", "west"}) == ("south",)


def test_who_gives_keys_and_then_refuses_is_asked_after_growing_pauses(there: Attendance) -> None:
    asked = [number := 1]
    for _ in range(4):
        again = there.refuse("south", "data", "", number, costly=True)
        assert again is not None
        there.come("south")
        asked.append(number := again)
    assert asked == [1, 2, 4, 8, 16]
    assert there.refuse("south", "data", "", 20) is None, "the study is over then"


def test_who_gives_keys_and_then_is_late_is_left_out_for_growing_pauses_and_stands_there_with_the_reason(
    there: Attendance,
) -> None:
    late = [number := 1]
    for _ in range(4):
        again = there.late("south", number)
        assert there.late("south", number) == again, "of one round once, however many attempts it has"
        assert [n for n in range(number, again + 2) if "south" in there.resting(n)] == [*range(number + 1, again)]
        assert there.due(again, {"north", "west"}) == ("south",)
        assert again == number + 1 or there.due(again - 1, {"north", "west"}) == ()
        late.append(number := again)
    assert late == [1, 2, 4, 8, 16]
    there.begin(14)
    away, refused = there.absent({"north", "west"})
    assert (away, refused) == (
        {"south": "left out until round 16: it gave keys and was late, in round 8 the last time"},
        {},
    )
    there.recall()
    assert there.resting(14) == frozenset() and there.late("south", 17) == 18


def test_a_failure_is_forgiven_after_as_many_rounds_in_a_row_as_make_it_one_in_ten(there: Attendance) -> None:
    def fail_again() -> int:
        return there.late("south", number) - number

    number = 1
    assert fail_again() == 1
    for _ in range(8):
        there.took_part(["south"])
    number = 11
    assert fail_again() == 2, "one round too few"
    for _ in range(2 * 9):
        there.took_part(["south", "north"])
    number += 50
    assert fail_again() == 1


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.floats(0.0, 1.0))
def test_a_site_costs_the_others_one_round_in_ten_at_most_and_a_few_however_it_chooses_when_to_fail(
    tmp_path_factory: pytest.TempPathFactory, seed: int, often: float
) -> None:
    rounds, chance, cost = 400, Random(seed), 0
    there = Attendance(SITES, rounds, tmp_path_factory.mktemp("study") / "attendance")
    for site in SITES:
        there.come(site)
    for number in range(1, rounds + 1):
        there.begin(number)
        out = there.out.get("south")
        if "south" in there.resting(number) or (out is not None and (out.again or rounds) > number):
            continue
        there.come("south")
        # Greedy: it fails as soon as that costs it the shortest pause; else as it likes.
        if not there._in_vain.get("south") or chance.random() < often:
            cost += 1
            if chance.random() < 0.5:
                there.late("south", number)
            else:
                there.refuse("south", "data", "", number, costly=True)
        else:
            there.took_part(["south"])
    assert cost <= rounds / 10 + 10


EVENTS = st.tuples(
    st.sampled_from(["refuse", "ahead", "away", "late", "come", "undecided", "round"]), st.sampled_from(SITES)
)


@settings(deadline=None)
@given(st.lists(EVENTS, max_size=20), st.sets(st.sampled_from(SITES)))
def test_whatever_happens_every_site_is_in_a_record_in_exactly_one_place(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, str]], participants: set[str]
) -> None:
    there = Attendance(SITES, 20, tmp_path_factory.mktemp("study") / "attendance")
    there.begin(1)
    for kind, site in events:
        if kind == "refuse":
            there.note_refusal(site, "data", "x")
            there.refuse(site, "data", "x", there.round, costly=True)
        elif kind == "ahead":
            there.refuse(site, "data", "x", there.round + 1)
        elif kind == "away":
            there.note_away(site, "y")
        elif kind == "late":
            there.late(site, there.round)
        elif kind == "round":
            there.begin(there.round + 1)
        else:
            getattr(there, kind)(site)
    away, refused = there.absent(participants)
    assert sorted([*participants, *away, *refused]) == sorted(SITES)
    assert all(away.values()) and all(reason for reason, _ in refused.values())


# -- the questions: nobody is waited for who is asked aside


class Clock:
    """Seconds that pass only when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Sites:
    """Sites that answer after so many seconds, or never; ``said``: what they say, a Refusal or keys."""

    def __init__(self, clock: Clock, delays: Mapping[str, float], said: Mapping[str, Any]) -> None:
        self.clock, self.delays, self.said = clock, delays, said

    def ask(self, _: Any, requests: Mapping[str, Any], *__: Any, on_wait: Any, abort: Any, **___: Any) -> Iterator[Any]:
        began, waiting = self.clock.now, dict(requests)
        while waiting and not abort():
            on_wait({site: "asked" if site in self.delays else "offline" for site in waiting})
            self.clock.now += 0.1
            for site in [s for s in waiting if self.clock.now - began >= self.delays.get(s, 1e9)]:
                del waiting[site]
                yield SimpleNamespace(site=site, problem=None, payload=SimpleNamespace(size=0))
        for site in waiting:
            yield SimpleNamespace(site=site, problem="aborted", payload=SimpleNamespace(size=0))


@pytest.fixture
def asked(there: Attendance, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def make(
        delays: Mapping[str, float], said: Mapping[str, Any] | None = None, gone: dict[str, str] | None = None
    ) -> Any:
        clock, events = Clock(), []
        sites = Sites(clock, delays, said or {})
        study = SimpleNamespace(aggregation=SimpleNamespace(round_timeout="60s"), schema_version=2)
        folder = SimpleNamespace(root=None, event=lambda kind, **about: events.append({"event": kind, **about}))
        answer: Any = Advertised.model_construct()
        context = SimpleNamespace(
            folder=folder,
            study=study,
            grid=None,
            nodes=dict.fromkeys(SITES, 1),
            check_wanted=lambda: None,
            note_asked=lambda *_: None,
            instead=lambda _: None,
            removal=({} if gone is None else gone).get,
            nodes_changed=lambda: False,
            pause=lambda _: None,
            decode=lambda arrival, _: sites.said.get(arrival.site, answer),
        )
        monkeypatch.setattr(exchanges_module, "ask", sites.ask)
        monkeypatch.setattr(exchanges_module, "time", clock)
        exchanges = Exchanges(context, SimpleNamespace(attendance=there))  # type: ignore[arg-type]
        return SimpleNamespace(exchanges=exchanges, clock=clock, events=events)

    return make


def put(
    run: Any, phase: str, sites: tuple[str, ...], minimum: int, aside: Aside | None = None, **more: Any
) -> ExchangeState:
    requests = dict.fromkeys(sites, (b"", b""))
    found: ExchangeState = run.exchanges.run(
        Exchange(phase, 2, requests, lambda *_: None, minimum, aside=aside, **more)
    )
    return found


def beside(there: Attendance, cohort: set[str], got: list[str]) -> Aside:
    def accept(_: messages.Answer, arrival: Any) -> None:
        got.append(arrival.site)

    return Aside(3, b"keys", lambda: there.due(3, cohort), accept)


def test_a_slow_site_gives_its_key_while_the_others_train_and_costs_no_time(
    there: Attendance, asked: Callable[..., Any]
) -> None:
    run, got = asked({"north": 20.0, "south": 5.2, "west": 19.0}), list[Any]()
    put(run, "training", ("north", "west"), 2, beside(there, {"north", "west"}, got))
    assert got == ["south"]
    assert run.clock.now == pytest.approx(20.0, abs=0.2)


@pytest.mark.parametrize("delay", [None, 30.0])
def test_one_that_does_not_answer_aside_holds_nobody_up(
    there: Attendance, asked: Callable[..., Any], delay: float | None
) -> None:
    run, got = asked({"north": 2.0, "west": 1.0} | ({"south": delay} if delay else {})), list[Any]()
    put(run, "training", ("north", "west"), 2, beside(there, {"north", "west"}, got))
    assert got == [] and run.clock.now == pytest.approx(2.0, abs=0.2)
    assert there.absent({"north", "west"})[0] == {"south": "was not asked for this sum"}


def test_who_is_out_and_can_take_part_again_is_back_and_who_cannot_is_asked_in_the_next_round(
    there: Attendance, asked: Callable[..., Any]
) -> None:
    there.refuse("south", "data", "unreadable", 2)
    refusal = Refusal.model_construct(reason="data", detail="unreadable")
    run, got = asked({"north": 9.0, "west": 9.0, "south": 1.0}, {"south": refusal}), list[Any]()
    put(run, "training", ("north", "west"), 2, beside(there, {"north", "west"}, got))
    assert (there.out["south"].since, there.out["south"].again, there.standing["south"]) == (2, 4, "refused")
    there.out["south"] = there.out["south"].__class__(2, "data", "unreadable", 3)
    run = asked({"north": 9.0, "west": 9.0, "south": 1.0})
    put(run, "training", ("north", "west"), 2, beside(there, {"north", "west"}, got))
    assert got == ["south"] and there.standing["south"] == "approved" and not there.out
    assert run.events[-1]["event"] == "answer" and {"event": "back", "round": 3, "site": "south"} in run.events


def test_the_window_for_latecomers_grows_with_what_a_site_was_seen_to_take(
    there: Attendance, asked: Callable[..., Any]
) -> None:
    run = asked({"north": 0.5, "west": 0.5, "south": 4.6})
    late = put(run, "keys", SITES, 2, awaited=frozenset({"north", "west"}))
    assert late.answered == ["north", "west"]
    assert run.clock.now == pytest.approx(3.0, abs=0.2), "nothing is known of south yet"
    told = there.absent({"north", "west"})[0]["south"]
    assert told == "gave no keys in 3.0 s: it was asked and had not answered"
    put(run, "training", ("north", "west"), 2, beside(there, {"north", "west"}, []))  # too short for south
    put(run, "survivors", SITES, 3)  # it is heard once
    began = run.clock.now
    found = put(run, "keys", SITES, 2, awaited=frozenset({"north", "west"}))
    assert found.answered == ["north", "west", "south"]
    assert run.clock.now - began == pytest.approx(4.6, abs=0.2)


def test_one_that_is_not_connected_is_not_given_more_than_the_shortest_window(
    there: Attendance, asked: Callable[..., Any]
) -> None:
    run = asked({"north": 0.5, "west": 0.5})
    run.exchanges._pace["south"] = 20.0
    put(run, "keys", SITES, 2, awaited=frozenset({"north", "west"}))
    assert run.clock.now == pytest.approx(3.0, abs=0.2)
    assert there.absent({"north", "west"})[0]["south"].startswith("gave no keys in 3.0 s: its SuperNode was not conn")


def test_a_site_that_failed_is_asked_once_more_though_another_is_asked_aside(
    there: Attendance, asked: Callable[..., Any]
) -> None:
    said = {"north": Refusal.model_construct(reason="internal", detail="failed")}
    run = asked({"north": 1.0, "west": 2.0}, said)  # south is away and asked aside all the time
    found = put(run, "training", ("north", "west"), 1, beside(there, {"north", "west"}, []))
    assert found.refused == {"north": ("internal", "failed")}
    assert run.clock.now < 10
    assert there.absent({"west"})[1] == {"north": ["internal", "failed"]}


@pytest.mark.parametrize("aside", [False, True])
def test_a_site_in_doubt_is_asked_something_new_and_then_what_it_was_asked(
    there: Attendance, asked: Callable[..., Any], aside: bool
) -> None:
    run = asked({"north": 9.0, "south": 1.0, "west": 1.0})
    put_to_south, instead, got = list[Any](), dict[Any, Any](), list[Any]()
    answer: Any = Advertised.model_construct()

    def decode(arrival: Any, header: bytes) -> messages.Answer:
        if arrival.site != "south":
            return answer
        put_to_south.append(header)
        if header == b"new":
            del instead["south"]
            raise AskAgain("its ledger goes on")
        if len(put_to_south) == 1:
            instead["south"] = b"new", b"chance"
            raise AskAgain("its ledger had 9 entries")
        return answer

    run.exchanges.context.decode, run.exchanges.context.instead = decode, instead.get
    cohort = ("north", "west") if aside else SITES
    for _ in range(3 if aside else 1):
        found = put(run, "training", cohort, len(cohort), beside(there, set(cohort), got) if aside else None)
    assert put_to_south == ([b"keys", b"new", b"keys"] if aside else [b"", b"new", b""])
    assert sorted(found.answered) == sorted(cohort) and not found.refused and not there.out
    assert got == (["south"] if aside else [])


def test_who_gave_a_key_and_no_update_when_time_was_up_was_late_and_nobody_else_is(
    there: Attendance, asked: Callable[..., Any]
) -> None:
    run = asked({"north": 1.0, "west": 1.0})
    for number in (2, 3, 5):
        there.begin(number)
        run.exchanges.run(Exchange("training", number, dict.fromkeys(SITES, (b"", b"")), lambda *_: None, 2))
    assert there._in_vain == {"south": 3} and there.resting(8) == {"south"} and there.resting(9) == frozenset()
    assert there.absent({"north", "west"})[0]["south"].endswith("; it is left out until round 9, as it was late before")
    put(run, "keys", SITES, 2, awaited=frozenset())
    assert there._in_vain == {"south": 3}, "without keys it costs the others nothing"


def test_who_had_not_answered_when_a_refusal_ended_the_attempt_was_not_late(
    there: Attendance, asked: Callable[..., Any]
) -> None:
    run = asked({"north": 1.0, "west": 50.0}, {"north": Refusal.model_construct(reason="data", detail="unreadable")})
    put(run, "training", ("north", "west"), 2)
    assert there._in_vain == {"north": 1}


def test_the_people_at_the_coordinator_read_what_stays_out_and_what_brings_it_back() -> None:
    progress = Progress("hick", 5)
    about = {"event": "refusal", "round": 2, "site": "south", "reason": "data", "detail": "unreadable"}
    line = progress.apply({**about, "again": 3})
    assert line == "round 2: south out (data): unreadable; asked again for round 3"
    assert progress.out() == {"south": "out: data, asked again for round 3: unreadable"}
    assert "consilium-server resume hick" in str(progress.apply({**about, "reason": "rejected", "again": None}))
    assert progress.apply({"event": "back", "round": 4, "site": "south"}) == "round 4: south takes part again"
    assert progress.out() == {}


def test_a_site_that_was_removed_is_refused_before_it_is_asked_and_in_every_later_round(
    asked: Callable[..., Any], there: Attendance
) -> None:
    gone: dict[str, str] = {}
    run = asked(dict.fromkeys(SITES, 1.0), gone=gone)
    assert set(put(run, "training", SITES, 2).answered) == set(SITES)
    gone["south"] = "removed from the federation on 2026-11-30: keys copied"
    state = put(run, "training", SITES, 2)
    assert set(state.answered) == set(SITES) - {"south"}
    assert there.out["south"].reason == "removed" and there.out["south"].again is None
    assert gone["south"] in [event.get("detail") for event in run.events]
    assert [e for e in run.events if e["event"] == "answer" and e["site"] == "south"][1:] == []
