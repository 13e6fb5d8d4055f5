"""The site's agent against a coordinator that wants one update in two sums, or more than it may have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.attacks.federation import Whole
from tests.unit.conftest import Coordinator, Site
from tests.unit.neighbour import HERE, THERE

from consilium_client.results import Results
from consilium_shared import messages
from consilium_shared.messages import Advertise, Advertised, Open, Payload, Refusal, Shares, Signed, Survivors, Update
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector, width
from consilium_shared.secagg.server import ServerSum
from consilium_shared.secagg.terms import Terms
from consilium_shared.summand import segments


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path)


@pytest.fixture
def site(coordinator: Coordinator) -> Iterator[Site]:
    made = Site(coordinator)
    made.approve()
    yield made
    made.desk.close()


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Every update that training gave."""
    found: list[np.ndarray] = []
    put = Results.put

    def noted(self: Any, study: str, about: Any, update: np.ndarray, counts: Any) -> Any:
        found.append(update.copy())
        return put(self, study, about, update, counts)

    monkeypatch.setattr(Results, "put", noted)
    return found


def refused(answer: messages.Answer, reason: str, detail: str = "") -> None:
    assert isinstance(answer, Refusal), answer
    assert answer.reason == reason and detail in answer.detail, answer


def total_of(coordinator: Coordinator, header: bytes, payload: bytes) -> ServerSum:
    """The coordinator's end of the sum, hospital-a's vector in it and hospital-b's beside it."""
    request: Any = messages.decode_request(header, coordinator.key.public)
    study, slot = coordinator.study, request.slot
    parts = segments(study, "training", request.round, width(study))
    about = {"slot": slot, "model": request.payload.sha256, "adverts": request.adverts, "segments": parts}
    terms = Terms(**about, threat_model=study.aggregation.threat_model)
    total = ServerSum(terms, coordinator.neighbour._identities(coordinator))
    total.fold(HERE, Whole(payload))
    neighbour = coordinator.neighbour
    neighbour.states[slot], contribution = neighbour._part(coordinator, study).mask(neighbour.states[slot], terms)
    total.fold(THERE, Whole(bytes(terms.masked_bytes) + contribution.trailer))
    total.close(2)
    return total


def ask_to_sign(site: Site, total: ServerSum) -> messages.Answer:
    sealed, slot = total.sealed_for(HERE), total.terms.slot
    about: dict[str, Any] = {"of": slot.purpose, "round": slot.round, "attempt": slot.attempt}
    request = Survivors(**site.coordinator.common(), **about, survivors=(HERE, THERE), payload=Payload.of(sealed))
    return site.ask(messages.encode(request, site.coordinator.key), sealed)


def ask_to_open(site: Site, total: ServerSum, signatures: dict[str, bytes]) -> messages.Answer:
    sealed, slot = total.sealed_for(HERE), total.terms.slot
    about: dict[str, Any] = {"of": slot.purpose, "round": slot.round, "attempt": slot.attempt}
    request = Open(
        **site.coordinator.common(),
        **about,
        signatures={name: signature.hex() for name, signature in signatures.items()},
        payload=Payload.of(sealed),
    )
    return site.ask(messages.encode(request, site.coordinator.key), sealed)


def neighbours_signature(coordinator: Coordinator, total: ServerSum) -> bytes:
    part, state = coordinator.neighbour._part(coordinator, coordinator.study), coordinator.neighbour.states
    state[total.terms.slot], signature = part.sign(state[total.terms.slot], (HERE, THERE), total.sealed_for(THERE))
    return signature


def test_an_attempt_that_nobody_can_open_is_repeated_with_the_same_update_on_the_same_charge(
    site: Site, updates: list[Any]
) -> None:
    c = site.coordinator
    first = site.requests.handle(c.train(), c.model)
    site.restart()
    header = c.train(attempt=2)
    second = site.requests.handle(header, c.model)
    assert isinstance(c.read(second), Update) and first[1] != second[1]
    assert site.charges() == 1 and len(updates) == 1
    opened = c.opened(header, second)
    assert opened.weight > 1 and opened.implausible is None


def test_after_that_the_first_attempt_is_signed_for_by_nobody(site: Site) -> None:
    c = site.coordinator
    header = c.train()
    first = total_of(c, header, site.requests.handle(header, c.model)[1])
    site.requests.handle(c.train(attempt=2), c.model)
    for _ in range(2):
        refused(ask_to_sign(site, first), "sum", "abandoned")
        site.restart()


def test_an_update_whose_shares_were_released_is_in_no_other_sum(site: Site, updates: list[Any]) -> None:
    """The next attempt is trained anew, with a charge of its own; the first update is gone."""
    c = site.coordinator
    header = c.train()
    first = total_of(c, header, site.requests.handle(header, c.model)[1])
    theirs, signed = neighbours_signature(c, first), ask_to_sign(site, first)
    assert isinstance(signed, Signed)
    both = {HERE: bytes.fromhex(signed.signature), THERE: theirs}
    assert isinstance(ask_to_open(site, first, both), Shares)
    assert list(site.desk.results.folder.iterdir()) == []
    assert isinstance(site.ask(c.train(attempt=2), c.model), Update)
    assert site.charges() == 2 and len(updates) == 2 and not np.array_equal(*updates)


def test_a_signed_set_is_opened_again_with_the_same_bytes_and_no_other_set_ever(site: Site) -> None:
    c = site.coordinator
    header = c.train()
    total = total_of(c, header, site.requests.handle(header, c.model)[1])
    theirs = neighbours_signature(c, total)
    signed = ask_to_sign(site, total)
    assert isinstance(signed, Signed)
    both = {HERE: bytes.fromhex(signed.signature), THERE: theirs}
    released = []
    for _ in range(2):
        assert isinstance(ask_to_sign(site, total), Signed)
        answer = ask_to_open(site, total, both)
        assert isinstance(answer, Shares)
        released.append(answer.payload)
        site.restart()
    assert released[0] == released[1]
    refused(ask_to_open(site, total, {HERE: both[HERE], THERE: both[HERE]}), "sum", "verify")


def test_nothing_is_opened_that_was_not_signed(site: Site) -> None:
    c = site.coordinator
    header = c.train()
    total = total_of(c, header, site.requests.handle(header, c.model)[1])
    theirs = neighbours_signature(c, total)
    refused(ask_to_open(site, total, {HERE: theirs, THERE: theirs}), "sum", "masked")


def test_a_model_of_its_own_for_a_second_attempt_gets_no_second_update_from_one_round(
    site: Site, updates: list[Any]
) -> None:
    c = site.coordinator
    site.requests.handle(c.train(), c.model)
    other = pack(to_vector(build(c.study)) + 1, c.study)
    refused(site.ask(c.train(model=other, attempt=2), other), "stale-round", "another model")
    assert len(updates) == 1 and site.charges() == 1


def test_an_earlier_attempt_is_over_once_a_later_one_has_begun(site: Site) -> None:
    c = site.coordinator
    earlier = c.train()
    about: dict[str, Any] = {"of": "training", "round": 1}
    later = messages.encode(Advertise(**c.common(), **about, attempt=3), c.key)
    assert isinstance(site.ask(later), Advertised)
    refused(site.ask(earlier, c.model), "sum", "abandoned")
    refused(site.ask(messages.encode(Advertise(**c.common(), **about, attempt=2), c.key)), "stale-round")
    refused(site.ask(messages.encode(Advertise(**c.common(), **about, attempt=1), c.key)), "sum", "spent")
    assert site.charges() == 0


def test_what_a_cohort_of_strangers_is_asked_to_sum_is_refused_before_it_costs_anything(site: Site) -> None:
    c = site.coordinator
    request = messages.decode_request(c.train(), c.key.public)
    assert isinstance(request, messages.Train)
    own, other = request.adverts[HERE], request.adverts[THERE]
    stranger = c.neighbour._stand_in(request.slot)
    cases: list[tuple[dict[str, Any], str]] = [
        ({HERE: own, THERE: stranger}, "verify"),
        ({HERE: stranger, THERE: other}, "as it was sent"),
        ({HERE: own, "hospital-c": other}, "not in the roster"),
    ]
    for adverts, detail in cases:
        changed = messages.encode(request.model_copy(update={"adverts": adverts}), c.key)
        refused(site.ask(changed, c.model), "sum", detail)
    assert site.charges() == 0 and site.desk.results.about(c.study.digest, "training") is None


def test_a_study_of_fewer_sites_than_the_policy_asks_for_is_refused_when_it_is_proposed(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path / "strict", policy="minimum_sites: 3")
    site = Site(coordinator)
    try:
        refused(site.ask(coordinator.propose()), "policy", "adds up 2 sites")
    finally:
        site.desk.close()

