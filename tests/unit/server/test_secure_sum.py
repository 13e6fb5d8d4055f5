"""The coordinator's sums with the agents of three hospitals: every exchange, every attempt, over restarts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.support.site import SITE_YAML, Coordinator

from consilium_client.agent.requests import RequestHandler
from consilium_client.agent.secure_sums import SecureSums
from consilium_client.agent.study_service import StudyService
from consilium_client.site import Home
from consilium_server.state.pending_sum import PendingSumFile
from consilium_server.study.convening import NotOpened
from consilium_server.study.exchange_state import ExchangeState
from consilium_server.study.exchanges import Exchange
from consilium_server.study.secure_sum import Summation, SumResult, SumSpec, counted
from consilium_shared.canonical import digest
from consilium_shared.errors import PeerError, PolicyRefusal
from consilium_shared.identity import PublicIdentity
from consilium_shared.ledger.entry import Refuse
from consilium_shared.models.vector import width
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import Evaluate, Payload, Refusal, Train
from consilium_shared.secagg.server import ServerSum
from consilium_shared.secagg.site import SitePart
from consilium_shared.study import Study

SITES = ("clinic-c", "hospital-a", "hospital-b")


class Crash(BaseException):
    """Stands for kill -9 of the study's process."""


class Waits(Exception):
    """The question would stay open until more sites are back."""


class Exchanges:
    """One exchange after the other with agents in this process. ``away``: sites that a phase does not reach."""

    def __init__(self, coordinator: Coordinator, root: Path, agents: Mapping[str, RequestHandler]) -> None:
        common = coordinator.common()
        self.context: Any = SimpleNamespace(
            study=coordinator.study,
            roster=coordinator.home.roster(),
            common=common,
            coordinator=coordinator.key,
            encode=lambda request: messages.encode(request, coordinator.key, coordinator.study.schema_version),
            pause=lambda _: None,
        )
        self.folder: Any = SimpleNamespace(root=root, event=lambda kind, **about: self.events.append((kind, about)))
        due = lambda _, cohort: tuple(site for site in SITES if site not in cohort)  # noqa: E731
        self.resting: frozenset[str] = frozenset()
        self.recruitment: Any = SimpleNamespace(sites=lambda _: SITES, due=due, resting=lambda _: self.resting)
        self.beside: list[tuple[str, messages.Answer]] = []
        self.agents = agents
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.phases: list[str] = []
        self.away: dict[str, set[str]] = {}
        self.dies: str | None = None

    def run(self, exchange: Exchange) -> ExchangeState:
        """Everybody once; whoever is away then stays away until time is up. Whoever is asked aside answers first."""
        self.phases.append(exchange.phase)
        sites, aside = tuple(exchange.requests), exchange.aside
        question = ExchangeState(sites, exchange.minimum, 0.0, 60.0, exchange.awaited, exchange.least, exchange.phase)
        for site in aside.sites() if aside is not None else ():
            if aside is not None and site not in self.away.get("aside", ()):
                header, _ = self.agents[site].handle(aside.header, b"")
                answer = self.read(site, header)
                self.beside.append((site, answer))
                with contextlib.suppress(PeerError):
                    if not isinstance(answer, Refusal):
                        arrived: Any = SimpleNamespace(site=site, header=header, payload=Arrived(b""))
                        aside.accept(answer, arrived)
        for site in question.open():
            if self.dies == question.phase and question.answered:
                raise Crash
            if site in self.away.get(question.phase, ()):
                question.problem(site, "unavailable")
                continue
            asked, payload = exchange.requests[site]
            assert isinstance(payload, bytes)
            header, pieces = self.agents[site].handle(asked, payload)
            body = b"".join(pieces)
            arrival: Any = SimpleNamespace(site=site, header=header, payload=Arrived(body))
            answer = self.read(site, header)
            assert len(body) <= exchange.answer_bytes
            if isinstance(answer, Refusal):
                question.refuse(site, answer.reason, answer.detail)
                continue
            try:
                exchange.accept(answer, arrival)
            except PeerError as error:
                question.refuse(site, "malformed", str(error))
                continue
            question.answer(site)
        if not question.done(1e9):
            raise Waits
        return question

    def read(self, site: str, header: bytes) -> messages.Answer:
        """The verified answer."""
        member = self.context.roster.member(site)
        return messages.decode_answer(header, PublicIdentity.from_hex(member.identity))


class Arrived:
    """A payload in memory."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def read(self) -> bytes:
        return self.data

    def pieces(self, size: int) -> Iterator[bytes]:
        return (self.data[start : start + size] for start in range(0, self.size, size))


class Federation:
    """Three agents that approved the study, and the coordinator's sums; ``restart`` is a new study process."""

    def __init__(
        self, folder: Path, model: dict[str, Any] | None = None, silent: tuple[str, ...] = (), **aggregation: Any
    ) -> None:
        """``silent``: sites that let no evaluation counts leave."""
        self.coordinator = Coordinator(folder)
        contract = {**self.coordinator.study.contract, "aggregation": {"min_sites": 2, **aggregation}}
        contract["model"] = model or contract["model"]
        self.coordinator.study = Study.model_validate(contract)
        self.model = self.coordinator.pack(self.coordinator.study)
        self.services, policy = {}, "threat_models: [malicious-server, honest-but-curious]"
        for site in SITES:
            home = Home(folder / site[-1])
            rules = policy + "\n  allow_evaluation_counts: false" * (site in silent)
            text = SITE_YAML.format(epsilon=5.0, policy=rules).replace("site: hospital-a", f"site: {site}")
            home.config_file.write_text(text)
            (home.root / "synthetic.csv").write_bytes((folder / "a" / "synthetic.csv").read_bytes())
            self.services[site] = StudyService(home)
        self.agents = {site: RequestHandler(service) for site, service in self.services.items()}
        self.root = folder / "study"
        self.root.mkdir()
        for site, agent in self.agents.items():
            agent.handle(self.coordinator.propose(), b"")
            service = self.services[site]
            service.approvals.approve(service.proposals.find(self.coordinator.study.digest), "tester")
        self.restart()

    def restart(self) -> None:
        self.exchanges = Exchanges(self.coordinator, self.root, self.agents)
        self.sums = Summation(self.exchanges, width(self.coordinator.study))  # type: ignore[arg-type]

    def train(self, number: int = 1, attempts: int = 16, together: frozenset[str] | None = None) -> SumResult:
        recorded = self.coordinator.recorded(number - 1, heads={}) if number > 1 else None

        def request(attempt: int, adverts: Any, encapsulated: Any) -> Train:
            keys = {"attempt": attempt, "adverts": adverts, "encapsulated": encapsulated}
            common = self.exchanges.context.common
            return Train(**common, **keys, round=number, payload=Payload.of(self.model), recorded=recorded)

        asked = SumSpec("training", number, self.model, digest(self.model), request, lambda _: None, attempts, together)
        return self.sums.run(asked, frozenset(SITES))

    def evaluate(self, number: int, together: frozenset[str] | None = None) -> SumResult:
        def request(attempt: int, adverts: Any, encapsulated: Any) -> Evaluate:
            keys = {"attempt": attempt, "adverts": adverts, "encapsulated": encapsulated}
            return Evaluate(**self.exchanges.context.common, **keys, round=number, payload=Payload.of(self.model))

        asked = SumSpec("evaluation", number, self.model, digest(self.model), request, lambda _: None, 2, together)
        return self.sums.run(asked, frozenset(SITES))

    def lets_counts_leave(self, site: str, allowed: bool) -> None:
        """The site's policy is another from now on."""
        config = self.services[site].config
        policy = config.policy.model_copy(update={"allow_evaluation_counts": allowed})
        service, changed = self.services[site], config.model_copy(update={"policy": policy})
        service.config = service.data.config = service.estimates.config = service.approvals.config = changed

    def charges(self) -> dict[str, int]:
        study = self.coordinator.study.digest
        return {site: service.spending.attempts(study, 1) for site, service in self.services.items()}

    def expected(self, *sites: str) -> Any:
        """The weighted mean of what these sites keep, before they sign; None where one has signed."""
        study, weights = self.coordinator.study.digest, 0
        total: Any = 0.0
        for site in sites:
            about = self.services[site].results.about(study, "training")
            result = about and self.services[site].results.get(study, "training", about.round)
            if not result:
                return None
            total = total + result.about.weight * result.update(0, result.about.parameters).astype(float)
            weights += result.about.weight
        return total / weights


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Callable[..., Federation]]:
    made: list[Federation] = []

    def make(**aggregation: Any) -> Federation:
        made.append(Federation(tmp_path / "federation", **aggregation))
        return made[-1]

    yield make
    for each in made:
        for service in each.services.values():
            service.close()


def noting(together: Federation, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each closed sum should open to."""
    means: list[Any] = []
    close = ServerSum.close

    def note(total: ServerSum, minimum: int) -> Any:
        survivors = close(total, minimum)
        means.append(together.expected(*survivors))
        return survivors

    monkeypatch.setattr(ServerSum, "close", note)
    return means


def test_a_sum_is_the_weighted_mean_and_the_next_one_needs_three_exchanges(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = federation()
    means = noting(together, monkeypatch)
    summed = together.train(1)
    np.testing.assert_allclose(summed.opened.mean, means[0], atol=1e-4)
    assert together.exchanges.phases == ["keys", "handshake", "training", "survivors", "opening"]
    assert tuple(summed.answers) == SITES and list(summed.record["adverts"]) == list(SITES)
    assert set(summed.record["signatures"]) == set(SITES) and summed.record["attempt"] == 1
    together.exchanges.phases.clear()
    summed = together.train(2)
    np.testing.assert_allclose(summed.opened.mean, means[1], atol=1e-4)
    assert summed.opened.counted == 3
    assert together.exchanges.phases == ["training", "survivors", "opening"]


@pytest.mark.parametrize("back", [False, True])
def test_without_a_site_whose_counts_would_have_hidden_anothers_the_round_goes_on_and_opens_none(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    """Two of three offer counts and one of the two goes away: enough are left for the sum, not for the counts."""
    together = federation(threat_model="honest-but-curious", silent=("clinic-c",))
    together.train(1)
    means = noting(together, monkeypatch)
    # Back, it would give a key again each time and no vector: that must not hold the round up for ever.
    together.exchanges.away = {"training": {"hospital-b"}, "keys": set() if back else {"hospital-b"}}
    summed = together.train(2)
    assert (set(summed.answers), summed.record["attempt"]) == ({"clinic-c", "hospital-a"}, 2)
    assert summed.opened.counted == 0 and summed.opened.counts is not None and not summed.opened.counts.any()
    np.testing.assert_allclose(summed.opened.mean, means[0], atol=1e-4)
    (event,) = together.exchanges.events
    assert event[0] == "abandoned" and "1 of the survivors have added counts" in event[1]["why"]
    study = together.coordinator.study.digest
    assert together.services["hospital-a"].spending.attempts(study, 2) == 1, "on the same charge"


def test_a_site_that_was_late_too_often_is_left_out_of_a_round_where_enough_are_left_without_it(
    federation: Callable[..., Federation],
) -> None:
    together = federation(threat_model="honest-but-curious")
    together.exchanges.resting = frozenset({"hospital-b"})
    assert set(together.train(1).answers) == {"clinic-c", "hospital-a"}
    together.restart()
    together.exchanges.resting = frozenset({"hospital-a", "hospital-b"})
    assert set(together.train(2).answers) == set(SITES), "fewer than the least number would be left"


def test_where_every_round_is_of_the_same_sites_a_round_waits_for_whoever_is_away(
    federation: Callable[..., Federation],
) -> None:
    together = federation(threat_model="honest-but-curious", same_sites=True)
    first = frozenset(together.train(1).answers)
    for phase in ("keys", "training"):
        together.restart()
        together.exchanges.away = {phase: {"hospital-b"}}
        with pytest.raises(Waits):
            together.train(2, together=first)
    together.restart()
    assert set(together.train(2, together=first).answers) == first


def test_where_every_sum_is_of_the_same_sites_the_last_models_counts_are_asked_of_those_who_gave_some_before(
    federation: Callable[..., Federation],
) -> None:
    """One of three lets counts leave before the last sum only: with it in that sum no site would sign."""
    together = federation(threat_model="honest-but-curious", same_sites=True, silent=("clinic-c",))
    study, records, first = together.coordinator.study, [], None
    for number in (1, 2, 3):
        together.lets_counts_leave("clinic-c", number == 3)
        summed = together.train(number, together=first)
        first = frozenset(summed.answers)
        records.append({"round": number, "participants": list(summed.answers), "opened": summed.record})
    offering = counted(study, records, 2)
    assert offering == {"hospital-a", "hospital-b"} and counted(study, records, 3) == counted(study, [], 2) == set()
    assert counted(study, records[:1], 2) == set(), "no counts ride on the first round"
    opened = together.evaluate(3, offering)
    assert set(opened.answers) == offering and opened.opened.counted == 2


@pytest.mark.parametrize("gone", [False, True])
def test_where_every_sum_is_of_the_same_sites_whoever_lets_no_more_counts_leave_ends_it_soon_and_charges_no_more(
    federation: Callable[..., Federation], gone: bool
) -> None:
    together = federation(threat_model="honest-but-curious", same_sites=True)
    first = frozenset(together.train(1).answers)
    together.train(2, together=first)
    if not gone:
        assert together.train(3, together=first).opened.counted == 3
        return
    together.lets_counts_leave("hospital-b", False)
    with pytest.raises(NotOpened, match="given up after attempt 3"):
        together.train(3, together=first)
    study = together.coordinator.study.digest
    assert [service.spending.attempts(study, 3) for service in together.services.values()] == [1, 1, 0]
    entries = together.services["hospital-a"].ledger.entries
    refusals = [entry.body.detail for entry in entries if isinstance(entry.body, Refuse)]
    assert any("counts of an earlier sum were of clinic-c, hospital-a, hospital-b" in each for each in refusals)


def test_with_all_who_offer_counts_in_it_the_sum_has_theirs(federation: Callable[..., Federation]) -> None:
    together = federation(threat_model="honest-but-curious", silent=("clinic-c",))
    together.train(1)
    together.exchanges.away = {"training": {"clinic-c"}}
    opened = together.train(2).opened
    assert opened.counted == 2 and opened.counts is not None and opened.counts.any()


def test_of_a_model_that_is_trained_in_part_the_sum_is_of_that_part(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = federation(model={"name": "mlp", "hidden": 5, "trainable": "lora", "lora_rank": 1})
    means = noting(together, monkeypatch)
    summed = together.train(1)
    trained = (2 + 5) + (5 * 2 + 2)  # of the first layer's addition, and the head
    assert summed.opened.mean.shape == (trained,)
    assert summed.opened.mean.all()
    np.testing.assert_allclose(summed.opened.mean, means[0], atol=1e-4)


def test_without_a_site_that_too_few_can_do_without_the_round_is_made_again_on_the_same_charges(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = federation()  # of three sites a lying coordinator needs all
    means = noting(together, monkeypatch)
    gone = {"hospital-b"}
    together.exchanges.away = dict.fromkeys(("training", "survivors", "opening"), gone)
    attempt = together.sums.keys.convene

    def convene(slot: Any, *rest: Any, **more: Any) -> Any:
        if slot.attempt > 1:
            together.exchanges.away["keys"] = gone
        return attempt(slot, *rest, **more)

    monkeypatch.setattr(together.sums.keys, "convene", convene)
    summed = together.train(1)
    assert set(summed.answers) == {"clinic-c", "hospital-a"} and summed.record["attempt"] == 2
    np.testing.assert_allclose(summed.opened.mean, means[0], atol=1e-4)
    assert together.charges() == {"clinic-c": 1, "hospital-a": 1, "hospital-b": 0}
    assert [kind for kind, _ in together.exchanges.events] == ["abandoned"]


@pytest.mark.parametrize("phase", ["survivors", "opening"])
def test_a_survivor_that_goes_away_is_not_needed_while_enough_others_are_there(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    together = federation(threat_model="honest-but-curious")
    means = noting(together, monkeypatch)
    together.exchanges.away = {phase: {"hospital-a"}, "opening": {"hospital-a"}}
    summed = together.train(1)
    np.testing.assert_allclose(summed.opened.mean, means[0], atol=1e-4)
    assert tuple(summed.answers) == SITES and summed.record["attempt"] == 1
    assert ("hospital-a" in summed.record["signatures"]) == (phase == "opening")


def test_a_site_that_gave_no_vector_is_not_in_the_sum_and_its_masks_are_taken_off(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = federation(threat_model="honest-but-curious")
    means = noting(together, monkeypatch)
    together.exchanges.away = {"training": {"hospital-a"}}
    summed = together.train(1)
    np.testing.assert_allclose(summed.opened.mean, means[0], atol=1e-4)
    assert set(summed.answers) == {"clinic-c", "hospital-b"}
    assert list(summed.record["adverts"]) == list(SITES) and summed.record["attempt"] == 1


@pytest.mark.parametrize("phase", ["training", "survivors", "opening"])
def test_a_process_that_dies_in_any_exchange_asks_the_same_again_and_opens_the_same_sum(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    together = federation()
    together.exchanges.dies = phase
    means = noting(together, monkeypatch)
    with pytest.raises(Crash):
        together.train(1)
    together.restart()
    summed = together.train(1)
    np.testing.assert_allclose(summed.opened.mean, means[0], atol=1e-4)
    assert together.exchanges.phases == ["training", "survivors", "opening"]
    assert summed.record["attempt"] == 1
    assert set(together.charges().values()) == {1}


def test_after_the_set_was_closed_a_restarted_process_takes_exactly_those_and_waits_for_nobody_else(
    federation: Callable[..., Federation],
) -> None:
    together = federation(threat_model="honest-but-curious")
    together.exchanges.away, together.exchanges.dies = {"training": {"hospital-a"}}, "survivors"
    with pytest.raises(Crash):
        together.train(1)
    together.restart()
    summed = together.train(1)  # hospital-a is back, and not asked
    assert set(summed.answers) == {"clinic-c", "hospital-b"}
    assert together.charges()["hospital-a"] == 0


def test_a_closed_set_that_does_not_come_back_whole_after_a_restart_is_waited_for(
    federation: Callable[..., Federation],
) -> None:
    together = federation(threat_model="honest-but-curious")
    together.exchanges.dies = "survivors"
    with pytest.raises(Crash):
        together.train(1)
    together.restart()
    together.exchanges.away = {"training": {"hospital-b"}}
    with pytest.raises(Waits):
        together.train(1)
    assert together.exchanges.phases == ["training"]
    together.exchanges.away = {}
    summed = together.train(1)
    assert tuple(summed.answers) == SITES and summed.record["attempt"] == 1
    assert set(together.charges().values()) == {1}


@pytest.mark.parametrize("phase", ["survivors", "opening"])
def test_what_fewer_than_the_threshold_sign_or_release_stays_shut_until_the_others_are_back(
    federation: Callable[..., Federation], phase: str
) -> None:
    together = federation()
    together.exchanges.away = {phase: {"hospital-b"}}
    with pytest.raises(Waits):
        together.train(1)
    together.exchanges.away = {}
    summed = together.train(1)
    assert tuple(summed.answers) == SITES and summed.record["attempt"] == 1
    assert set(together.charges().values()) == {1}, "what was signed is opened, and nothing is trained anew"


def test_a_sum_that_every_site_refuses_is_given_up_with_attempts_left(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = federation()

    def refuse(*_: Any, **__: Any) -> Any:
        raise PolicyRefusal("sum", "a test")

    monkeypatch.setattr(SecureSums, "contribute", refuse)
    with pytest.raises(NotOpened, match="given up after attempt 2"):
        together.train(1)
    monkeypatch.undo()
    assert together.train(1).record["attempt"] == 2, "the very attempt that was refused"


@pytest.mark.parametrize("rule", [{"min_sites": 3}, {"corrupt_sites": 1}])
def test_with_fewer_sites_than_the_minimum_nothing_is_asked_of_any_data(
    federation: Callable[..., Federation], rule: dict[str, int]
) -> None:
    together = federation(**rule)
    together.exchanges.away = {"handshake": {"hospital-b"}}
    with pytest.raises(NotOpened, match="after attempt 2: 2 sites have given keys, and 3 are needed"):
        together.train(1, attempts=2)
    assert set(together.charges().values()) == {0}
    assert PendingSumFile(together.root).read("training", 1) is None


def test_where_too_few_have_approved_no_attempt_is_made(federation: Callable[..., Federation]) -> None:
    together = federation()
    together.exchanges.recruitment = SimpleNamespace(sites=lambda _: SITES[:1], due=lambda *_: (), resting=lambda _: ())
    with pytest.raises(NotOpened, match="1 sites can take part, and 2 are needed"):
        together.train(1)
    assert set(together.charges().values()) == {0}


def test_a_sum_that_no_sites_could_have_given_is_told_and_nothing_of_it_is_used(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = federation()
    opening = ServerSum.open

    def spoilt(total: ServerSum) -> Any:
        totals = opening(total)
        totals["weight"][0] += np.uint64(2**40)
        return totals

    monkeypatch.setattr(ServerSum, "open", spoilt)
    opened = together.train(1).opened
    assert opened.implausible is not None and "somebody spoilt the sum" in opened.implausible
    assert opened.mean.size == 0 and opened.counts is None


@pytest.mark.parametrize("silent", [(), ("clinic-c",), ("clinic-c", "hospital-b")])
def test_whoever_says_that_more_have_counted_than_offered_to_spoils_the_sum(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch, silent: tuple[str, ...]
) -> None:
    """Else one site's invention could be the metrics where too few offer counts and nobody adds any."""
    together = federation(silent=silent)
    together.train(1)
    opening, offering = ServerSum.open, 3 - len(silent)

    def claim(total: ServerSum) -> Any:
        totals = opening(total)
        totals["counts"][0] = np.uint64(max(offering, 1) + 1)
        return totals

    monkeypatch.setattr(ServerSum, "open", claim)
    opened = together.train(2).opened
    assert opened.implausible is not None and "sites say that they counted" in opened.implausible
    assert opened.counts is None and opened.counted == 0


def test_a_key_that_is_another_sites_is_found_when_it_comes_and_no_other_site_suffers(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = federation()
    advertise = SitePart.advertise

    def copied(part: SitePart, slot: Any, site: str, seed: bytes, **more: Any) -> Any:
        return advertise(part, slot, site, seed if site == "hospital-b" else bytes(32), **more)

    monkeypatch.setattr(SitePart, "advertise", copied)
    summed = together.train(1)
    assert set(summed.answers) == {"clinic-c", "hospital-b"}


def test_who_missed_a_round_is_asked_for_its_key_while_the_others_work_and_nobody_waits_for_it(
    federation: Callable[..., Federation],
) -> None:
    together = federation(threat_model="honest-but-curious")
    away = together.exchanges.away = {phase: {"hospital-b"} for phase in ("keys", "aside")}
    assert set(together.train(1).answers) == {"clinic-c", "hospital-a"}
    together.exchanges.phases.clear()
    del away["aside"]  # it answers, but too late for a question that is waited for: "keys" never reaches it
    assert set(together.train(2).answers) == {"clinic-c", "hospital-a"}
    assert [site for site, _ in together.exchanges.beside] == ["hospital-b"], "once: its key is there"
    assert set(together.train(3).answers) == set(SITES)
    assert together.exchanges.phases.count("keys") == 1, "only in round 2, whose keys were asked for too late"


def test_keys_that_were_given_ahead_survive_further_attempts_at_the_round_before(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = federation(threat_model="honest-but-curious")
    together.exchanges.away = {"keys": {"hospital-b"}}
    opening = ServerSum.open
    fails = iter([True])

    def once(total: ServerSum) -> Any:
        if next(fails, False):
            raise PeerError("a test")
        return opening(total)

    monkeypatch.setattr(ServerSum, "open", once)
    assert together.train(1).record["attempt"] == 2
    together.exchanges.phases.clear()
    assert set(together.train(2).answers) == set(SITES)
    assert "keys" not in together.exchanges.phases


def test_a_site_whose_data_cannot_be_read_gives_no_key_and_gives_one_when_it_can(
    federation: Callable[..., Federation],
) -> None:
    together = federation(threat_model="honest-but-curious")
    service = together.services["hospital-b"]
    service.data._records = None  # a restarted agent
    service.data._patients.clear()
    file = service.home.root / "synthetic.csv"
    file.rename(file.with_name("moved"))
    summed = together.train(1)
    assert set(summed.answers) == {"clinic-c", "hospital-a"} and summed.record["attempt"] == 1
    refusals = [answer for site, answer in together.exchanges.beside if isinstance(answer, Refusal)]
    assert {answer.reason for answer in refusals} == {"data"}
    file.with_name("moved").rename(file)
    assert set(together.train(2).answers) == set(SITES)
