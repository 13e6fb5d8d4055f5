"""A site's part in secure sums: under which keys its result leaves, how often, and with whom it is added up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consilium_client.agent.replay_guard import ReplayGuard
from consilium_client.state.results import About, Results
from consilium_client.training import trainer
from consilium_shared.canonical import canonical_bytes
from consilium_shared.errors import IntegrityError
from consilium_shared.identity import Identity
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import (
    Advertise,
    Advertised,
    Closing,
    Counts,
    Open,
    Refusal,
    Shares,
    Signed,
    Update,
)
from consilium_shared.secagg.terms import Advert, Slot
from consilium_shared.study import Study

CURIOUS = "threat_models: [malicious-server, honest-but-curious]"

NewSite = Callable[[Any], Any]
NewCoordinator = Callable[..., Any]


class Crash(BaseException):
    """Stands for kill -9 at one place: nothing after it runs in this process."""


def reason(answer: messages.Answer) -> str:
    assert isinstance(answer, Refusal), answer
    return answer.reason


def advertise(c: Any, number: int = 1, attempt: int = 1, of: str = "training") -> bytes:
    about: dict[str, Any] = {"round": number, "attempt": attempt, "of": of}
    return messages.encode(Advertise(**c.common(), **about), c.key)


def altered(c: Any, header: bytes, **changes: Any) -> bytes:
    """The request with other fields, signed by the coordinator."""
    body = {**json.loads(header)["body"], **changes}
    signature = c.key.sign(messages.REQUEST_DOMAIN, canonical_bytes(body)).hex()
    return canonical_bytes({"body": body, "signature": signature})


def with_study(c: Any, **aggregation: Any) -> None:
    """The study of the site under these rules."""
    contract = {**c.study.contract, "aggregation": {"min_sites": 2, **aggregation}}
    c.study = Study.model_validate(contract)
    c.model = c.pack(c.study)


def kept(site: Any) -> bytes:
    """The update that the site keeps."""
    result = site.service.results.about(site.coordinator.study.digest, "training")
    result = site.service.results.get(site.coordinator.study.digest, "training", result.round)
    return bytes(result.update(0, result.about.parameters).tobytes())


def released(site: Any, kind: str = "update") -> list[tuple[bool, bool]]:
    """Of each release of the kind: whether it carries counts, and whether the result had left before."""
    bodies = [entry.body for entry in site.service.ledger.entries if entry.kind == "release"]
    return [(body.counts, body.again) for body in bodies if body.message == kind]


@pytest.fixture
def three(new_coordinator: NewCoordinator, new_site: NewSite) -> Any:
    """A cohort of three, of which two open the sum and two must give up an attempt before it is dead."""
    c = new_coordinator(policy=CURIOUS)
    with_study(c, threat_model="honest-but-curious")
    c.others = ("clinic-c", "hospital-b")
    site = new_site(c)
    site.approve()
    return site


@pytest.fixture
def approved(site: Any) -> Any:
    site.approve()
    return site


# -- keys


def test_asked_for_its_key_again_a_site_gives_the_same_and_enters_it_once(approved: Any) -> None:
    c = approved.coordinator
    first = approved.requests.handle(advertise(c), b"")
    before = approved.kinds()
    assert approved.requests.handle(advertise(c), b"") == first
    assert approved.kinds() == before
    told = c.read(first)
    approved.restart()
    again = approved.ask(advertise(c))
    assert isinstance(told, Advertised) and isinstance(again, Advertised)
    assert (again.advert, again.bundle) == (told.advert, told.bundle)
    assert approved.charges() == 0


def test_every_sum_has_a_key_of_its_own(approved: Any) -> None:
    c = approved.coordinator
    asked = [advertise(c), advertise(c, 2), advertise(c, 2, 2), advertise(c, 3)]
    assert len({approved.ask(each).advert.key for each in asked}) == 4


def test_no_key_is_given_for_an_attempt_before_the_one_under_way(approved: Any) -> None:
    c = approved.coordinator
    asked = c.train()
    approved.ask(advertise(c, attempt=3))
    assert reason(approved.ask(advertise(c, attempt=2))) == "stale-round"
    assert reason(approved.ask(asked, c.model)) == "sum"  # the first attempt was given up
    assert approved.charges() == 0


def test_a_site_takes_part_with_keys_that_it_gave_and_only_with_those(approved: Any) -> None:
    c = approved.coordinator
    asked = c.train()
    shutil.rmtree(approved.service.sums.folder / c.study.digest)
    assert reason(approved.ask(asked, c.model)) == "sum"
    assert approved.charges() == 0


def test_secrets_are_agreed_on_with_sites_on_both_sides(three: Any) -> None:
    c = three.coordinator
    asked = c.train()
    assert set(json.loads(asked)["body"]["encapsulated"]) == {"clinic-c"}
    opened = c.opened(asked, three.requests.handle(asked, c.model))
    assert opened.counts is None and opened.weight > 2
    secrets = three.service.sums.session(c.study.digest).secrets
    for name in c.others:
        neighbour = c.neighbours.members[name]
        assert neighbour.secrets[c.study.digest, "hospital-a"] == secrets[name]
    told = three.ask(advertise(c, 2))
    assert set(told.known) == {"clinic-c", "hospital-b"}


def test_a_secret_that_was_altered_or_is_from_a_stranger_is_refused(three: Any) -> None:
    c = three.coordinator
    asked = c.train()
    sent = json.loads(asked)["body"]["encapsulated"]
    forged = {"clinic-c": {**sent["clinic-c"], "signature": "0" * 128}}
    for wrong in (forged, {"hospital-z": sent["clinic-c"]}, {"hospital-b": sent["clinic-c"]}, {}):
        assert reason(three.ask(altered(c, asked, encapsulated=wrong), c.model)) == "sum"
    assert three.charges() == 0
    assert isinstance(three.ask(asked, c.model), Update)


# -- whose sum it is


def test_a_cohort_that_is_not_the_one_that_the_keys_are_of_is_refused_without_a_charge(approved: Any) -> None:
    c = approved.coordinator
    asked = c.train()
    body = json.loads(asked)["body"]
    adverts, slot = body["adverts"], Slot(**c.common(), purpose="training", round=1, attempt=1)
    stranger = Identity.generate()

    def forged(site: str, of: Slot = slot, key: int = 9) -> dict[str, Any]:
        return Advert.sign(of, site, bytes([key]) * 32, stranger).model_dump(mode="json")

    neighbour = c.neighbours.members["hospital-b"]
    later = neighbour.advert(c, slot.model_copy(update={"round": 2}), False).model_dump(mode="json")
    for wrong in (
        {**adverts, "hospital-a": forged("hospital-a")},
        {**adverts, "hospital-b": forged("hospital-b")},
        {**adverts, "hospital-b": later},
        {**adverts, "hospital-z": forged("hospital-z")},
        {**adverts, "clinic-c": forged("clinic-c")},
        {"clinic-c": forged("clinic-c"), "hospital-b": adverts["hospital-b"]},
    ):
        assert reason(approved.ask(altered(c, asked, adverts=wrong), c.model)) == "sum"
    twice = {**adverts, "hospital-b": {**adverts["hospital-b"], "key": adverts["hospital-a"]["key"]}}
    assert reason(approved.ask(altered(c, asked, adverts=twice), c.model)) == "malformed"
    assert approved.charges() == 0
    assert isinstance(approved.ask(asked, c.model), Update)


def test_a_sum_of_fewer_sites_than_the_study_says_is_refused(site: Any) -> None:
    c = site.coordinator
    with_study(c, min_sites=3)
    site.approve()
    assert reason(site.ask(c.train(), c.model)) == "sum"
    assert site.charges() == 0
    c.others = ("clinic-c", "hospital-b")
    assert isinstance(site.ask(c.train(attempt=2), c.model), Update)


def test_a_policy_that_became_stricter_holds_for_the_next_sum(approved: Any) -> None:
    c = approved.coordinator
    asked = c.train()
    file = c.site.config_file
    file.write_text(file.read_text().replace("minimum_patients: 20", "minimum_patients: 20\n  minimum_sites: 3"))
    approved.restart()
    refusal = approved.ask(asked, c.model)
    assert reason(refusal) in ("sum", "policy")
    assert approved.charges() == 0


def test_a_policy_that_became_stricter_after_the_masking_signs_nothing_that_it_would_have_refused(three: Any) -> None:
    """Counts of two are under the masks; with a least of three it would take the sum for one without any."""
    c = three.coordinator
    total = c.sum(c.train(2), three.requests.handle(c.train(2), c.model))
    file = c.site.config_file
    file.write_text(file.read_text().replace("minimum_patients: 20", "minimum_patients: 20\n  minimum_sites: 3"))
    three.restart()
    refusal = three.ask(*total.survivors())
    assert reason(refusal) == "policy" and "adds up 2 sites, this site asks for 3" in refusal.detail


def test_the_same_keys_serve_no_second_model(approved: Any) -> None:
    c = approved.coordinator
    asked = c.train()
    assert isinstance(approved.ask(asked, c.model), Update)
    other = c.pack(c.study)[:-1] + b"\x01"
    again = altered(c, asked, payload=messages.Payload.of(other).model_dump(mode="json"))
    assert reason(approved.ask(again, other)) == "stale-round"
    assert approved.charges() == 1


# -- attempt after attempt


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The round of each training that really ran."""
    ran: list[int] = []
    train = trainer.train

    def note(*arguments: Any, **named: Any) -> Any:
        ran.append(named["round"])
        return train(*arguments, **named)

    monkeypatch.setattr(trainer, "train", note)
    return ran


def test_an_abandoned_attempt_is_masked_again_without_training_or_charge(
    approved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, ran = approved.coordinator, counting(monkeypatch)
    c.opened(c.train(1), approved.requests.handle(c.train(1), c.model))
    first = approved.requests.handle(c.train(2), c.model)
    update = np.frombuffer(kept(approved), np.float32)
    approved.restart()
    asked = c.train(2, attempt=2)
    second = approved.requests.handle(asked, c.model)
    assert first[1] != second[1], "other masks"
    opened = c.opened(asked, second)
    weight = approved.service.spending.approval(c.study.digest).plan.patients
    np.testing.assert_allclose(opened.mean * (weight + 1) / weight, update, atol=1e-3)
    assert ran == [1, 2]
    assert (approved.charges(), approved.charges("evaluation")) == (2, 1)
    assert released(approved) == [(False, False), (True, False), (True, True)]
    assert reason(approved.ask(c.train(2), c.model)) == "stale-round"


def test_an_attempt_that_may_still_be_opened_is_not_repeated_but_trained_and_charged_anew(
    three: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, ran = three.coordinator, counting(monkeypatch)
    c.abandoning = False  # the others have promised nothing: they are enough to open the first attempt
    assert isinstance(three.ask(c.train(), c.model), Update)
    update = kept(three)
    assert isinstance(three.ask(c.train(attempt=2), c.model), Update)
    assert kept(three) != update
    assert (ran, three.charges()) == ([1, 1], 2)
    assert released(three) == [(False, False), (False, False)]


def test_an_attempt_that_enough_others_gave_up_is_repeated(three: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    c, ran = three.coordinator, counting(monkeypatch)
    assert isinstance(three.ask(c.train(), c.model), Update)
    update = kept(three)
    assert isinstance(three.ask(c.train(attempt=2), c.model), Update)
    assert kept(three) == update
    assert (ran, three.charges()) == ([1], 1)
    assert released(three) == [(False, False), (False, True)]


def test_an_attempt_stays_open_to_doubt_however_many_later_ones_are_dead(
    three: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, ran = three.coordinator, counting(monkeypatch)
    assert isinstance(three.ask(c.train(), c.model), Update)
    c.abandoning = False
    assert isinstance(three.ask(c.train(attempt=3), c.model), Update)
    assert ran == [1, 1]
    c.abandoning = True
    assert isinstance(three.ask(c.train(attempt=4), c.model), Update)
    assert (ran, three.charges()) == ([1, 1], 2)  # the second result has left in attempt 3 alone, and that is dead


def test_a_set_that_this_site_alone_signed_is_dead_once_the_other_promises_not_to(
    approved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, ran = approved.coordinator, counting(monkeypatch)
    total = c.sum(c.train(), approved.requests.handle(c.train(), c.model))
    assert isinstance(approved.ask(*total.survivors()), Signed)
    assert isinstance(approved.ask(c.train(attempt=2), c.model), Update)
    assert (ran, approved.charges()) == ([1], 1)
    assert released(approved) == [(False, False), (False, True)]


@pytest.mark.parametrize("place", ["signed by both", "released", "died while releasing"])
def test_after_a_set_was_signed_by_enough_the_round_is_trained_anew(
    approved: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    c, ran = approved.coordinator, counting(monkeypatch)
    total = c.sum(c.train(), approved.requests.handle(c.train(), c.model))
    opening = total.open(approved.ask(*total.survivors()).signature)  # the neighbour signs
    if place == "released":
        assert isinstance(approved.ask(*opening), Shares)
        assert approved.service.results.about(c.study.digest, "training") is None
    elif place == "died while releasing":

        def die(*_: Any) -> None:
            raise Crash

        with monkeypatch.context() as dying:
            dying.setattr(Results, "drop", die)
            with pytest.raises(Crash):
                approved.requests.handle(*opening)
        approved.restart()
    assert isinstance(approved.ask(c.train(attempt=2), c.model), Update)
    assert (ran, approved.charges()) == ([1, 1], 2)
    assert released(approved) == [(False, False), (False, False)]


def test_a_round_that_cannot_be_paid_a_second_time_is_refused(three: Any) -> None:
    c = three.coordinator
    c.abandoning = False
    for number in (1, 2, 3):
        assert isinstance(three.ask(c.train(number), c.model), Update)
    assert reason(three.ask(c.train(3, attempt=2), c.model)) == "budget"
    assert three.charges() == 3


def test_without_privacy_a_model_is_worked_on_once_and_leaves_again_only_where_no_other_sum_can_be_opened(
    new_coordinator: NewCoordinator, new_site: NewSite
) -> None:
    """Two sums with the same numbers of this site, over other sites, would show whose are whose."""
    c = new_coordinator(epsilon="unlimited", policy=f"allow_without_privacy: true\n  {CURIOUS}")
    aggregation = {"min_sites": 2, "threat_model": "honest-but-curious"}
    training = {**c.study.contract["training"], "seed": 7}
    plain = {"privacy": {"mode": "none"}, "evaluation": {}, "training": training, "aggregation": aggregation}
    c.study = Study.model_validate({**c.study.contract, **plain})
    c.model, c.others = c.pack(c.study), ("clinic-c", "hospital-b")
    site = new_site(c)
    site.approve()
    assert isinstance(site.ask(c.train(), c.model), Update)
    first = kept(site)
    assert isinstance(site.ask(c.train(attempt=2), c.model), Update)  # the first is dead
    assert kept(site) == first
    c.abandoning = False
    assert reason(site.ask(c.train(attempt=3), c.model)) == "sum"
    assert site.charges() == 1
    assert reason(site.ask(c.train(2), c.model)) == "sum"  # nor in another round
    assert site.charges() == 1
    stepped = pack(to_vector(build(c.study)) + 1, c.study)
    assert isinstance(site.ask(c.train(2, stepped), stepped), Update)
    assert site.charges() == 2


@pytest.fixture
def plain(new_coordinator: NewCoordinator, new_site: NewSite) -> Any:
    """A site in a study without privacy, of three rounds with counts after each."""
    c = new_coordinator(epsilon="unlimited", policy=f"allow_without_privacy: true\n  {CURIOUS}")
    changes = {"privacy": {"mode": "none"}, "evaluation": {}, "aggregation": {"min_sites": 2}}
    c.study = Study.model_validate({**c.study.contract, **changes})
    c.model = c.pack(c.study)
    site = new_site(c)
    site.approve()
    return site


def other(site: Any, by: float) -> bytes:
    """Another model of the study."""
    study = site.coordinator.study
    return pack(to_vector(build(study)) + by, study)


def test_without_privacy_the_counts_of_one_model_are_in_one_sum(plain: Any) -> None:
    c = plain.coordinator
    for number in (1, 2):
        model = other(plain, number - 1)
        assert isinstance(plain.ask(c.train(number, model), model), Update)
    last = other(plain, 3)
    assert isinstance(plain.ask(c.train(3, last), last), Update)  # with the counts of this very model
    assert reason(plain.ask(c.evaluate(3, last), last)) == "sum"
    assert isinstance(plain.ask(c.evaluate(3, c.model), c.model), Counts)


def test_without_privacy_a_round_is_worked_on_once_whatever_the_model(plain: Any) -> None:
    c = plain.coordinator
    for number in (1, 2, 3):
        model = other(plain, number - 1)
        answer = plain.requests.handle(c.train(number, model), model)
        c.opened(c.train(number, model), answer)
        again = other(plain, number + 0.5)
        assert reason(plain.ask(c.train(number, again, attempt=2), again)) == "sum"
    answer = plain.requests.handle(c.evaluate(3), c.model)
    c.opened(c.evaluate(3), answer)
    assert plain.charges() == 3


def test_where_every_round_is_of_the_same_sites_another_set_is_neither_worked_for_nor_signed(
    new_coordinator: NewCoordinator, new_site: NewSite
) -> None:
    """Also after a restart, and after the study was withdrawn and approved again."""
    c = new_coordinator(epsilon="unlimited", policy=f"allow_without_privacy: true\n  {CURIOUS}")
    aggregation = {"min_sites": 2, "threat_model": "honest-but-curious", "same_sites": True}
    c.study = Study.model_validate(
        {**c.study.contract, "privacy": {"mode": "none"}, "evaluation": {}, "aggregation": aggregation}
    )
    c.model, c.others = c.pack(c.study), ("clinic-c", "hospital-b")
    site = new_site(c)
    site.approve()
    c.opened(c.train(), site.requests.handle(c.train(), c.model))
    model = other(site, 1)
    asked = c.train(2, model)
    answer = site.requests.handle(asked, model)
    fewer, all_three = c.sum(asked, answer, without=("clinic-c",)), c.sum(asked, answer)
    site.restart()
    refused = site.ask(*fewer.survivors())
    assert reason(refused) == "sum" and "same_sites" in refused.detail and "clinic-c" in refused.detail
    assert isinstance(site.ask(*all_three.survivors()), Signed)
    c.others, model = ("hospital-b",), other(site, 2)
    refused = site.ask(c.train(3, model), model)
    assert reason(refused) == "sum" and "clinic-c would be missing" in refused.detail
    assert site.charges() == 2
    proposal = site.service.proposals.find(c.study.digest)
    known = site.service.sums.session(c.study.digest).together
    site.service.reject(proposal, "tester", "we stop")
    site.service.approvals.approve(proposal, "tester")
    assert site.service.sums.session(c.study.digest).together == known != {}


@pytest.mark.parametrize("same_sites", [False, True])
def test_what_is_lost_of_what_left_is_not_taken_for_nothing(
    new_coordinator: NewCoordinator, new_site: NewSite, same_sites: bool
) -> None:
    """The file with the keys is damaged and deleted, as the program says: the ledger knows that something left."""
    c = new_coordinator(epsilon="unlimited", policy="allow_without_privacy: true")
    privacy: dict[str, Any] = {} if same_sites else {"privacy": {"mode": "none"}, "evaluation": {}}
    rules = {"min_sites": 2, "same_sites": same_sites}
    c.study = Study.model_validate({**c.study.contract, **privacy, "aggregation": rules})
    c.model = c.pack(c.study)
    site = new_site(c)
    site.approve()
    c.opened(c.train(), site.requests.handle(c.train(), c.model))
    file = site.service.sums.folder / c.study.digest / "session.json"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match=r"delete it.*takes no further part"):
        site.service.sums.session(c.study.digest)
    file.unlink()
    site.restart()
    model = other(site, 1)
    refused = site.ask(c.train(2, model), model)
    assert reason(refused) == "sum" and "has lost what it kept" in refused.detail
    assert site.charges() == 1


# -- counts


def test_counts_are_not_promised_for_a_kept_result_that_goes_without_them(approved: Any) -> None:
    """Else the next attempt's cohort would count on them, and the counts of one other site could be the whole sum."""
    c, service = approved.coordinator, approved.service
    slot = Slot(**c.common(), purpose="training", round=2, attempt=2)
    assert ReplayGuard(service).counts_given(c.study, slot)
    about: dict[str, Any] = {
        "purpose": "training",
        "round": 2,
        "attempt": 1,
        "model": "0" * 64,
        "weight": 1,
        "epsilon": 1.0,
    }
    without = About(**about, counted=False, parameters=1, counts=3)
    service.results.put(c.study.digest, without, np.zeros(1, np.float32), np.zeros(3, np.int64))
    assert not ReplayGuard(service).counts_given(c.study, slot)
    assert ReplayGuard(service).counts_given(c.study, slot.model_copy(update={"round": 3}))
    given = approved.ask(advertise(c, 2, 2))
    assert isinstance(given, Advertised) and not given.advert.counts


def test_a_site_that_lets_no_counts_leave_adds_zeros_and_is_not_charged_for_them(
    new_coordinator: NewCoordinator, new_site: NewSite
) -> None:
    c = new_coordinator(policy="allow_evaluation_counts: false")
    site = new_site(c)
    site.approve()
    assert isinstance(site.ask(c.train(), c.model), Update)
    asked = c.train(2)
    opened = c.opened(asked, site.requests.handle(asked, c.model))
    assert opened.counted == 0 and not opened.counts.any()  # nor does the neighbour, whose would stand alone
    assert site.charges("evaluation") == 0
    assert released(site) == [(False, False), (False, False)]


def lets_no_counts_leave_from_now_on(site: Any) -> None:
    file = site.coordinator.site.config_file
    changed = "minimum_patients: 20\n  allow_evaluation_counts: false"
    file.write_text(file.read_text().replace("minimum_patients: 20", changed))
    site.restart()


def test_counts_that_were_offered_with_a_key_are_added_or_the_site_stays_out_of_that_sum(approved: Any) -> None:
    """Zeros in their place would leave the neighbour's counts alone in the sum."""
    c = approved.coordinator
    c.opened(c.train(), approved.requests.handle(c.train(), c.model))
    asked = c.train(2)  # the key for it rode on the first round's shares
    lets_no_counts_leave_from_now_on(approved)
    assert reason(approved.ask(asked, c.model)) == "sum"
    assert (approved.charges(), approved.charges("evaluation")) == (1, 0)
    asked = c.train(2, attempt=2)
    assert not json.loads(asked)["body"]["adverts"]["hospital-a"]["counts"]
    assert c.opened(asked, approved.requests.handle(asked, c.model)).counted == 0


def test_the_same_masks_never_hide_counts_once_and_zeros_the_other_time(approved: Any) -> None:
    """The difference of the two answers would be this site's counts; the second comes where the first was lost."""
    c = approved.coordinator
    c.opened(c.train(), approved.requests.handle(c.train(), c.model))
    asked = c.train(2)
    first = approved.requests.handle(asked, c.model)
    shutil.rmtree(approved.service.responses.folder / c.study.digest)
    assert approved.requests.handle(asked, c.model)[1] == first[1]
    shutil.rmtree(approved.service.responses.folder / c.study.digest)
    lets_no_counts_leave_from_now_on(approved)
    assert reason(approved.ask(asked, c.model)) == "sum"
    assert isinstance(approved.ask(c.train(2, attempt=2), c.model), Update)
    assert released(approved)[-1] == (False, True)


def test_a_sum_of_counts_alone_to_which_too_few_would_add_is_not_charged(approved: Any) -> None:
    c = approved.coordinator
    for number in (1, 2, 3):
        assert isinstance(approved.ask(c.train(number), c.model), Update)
    before = approved.charges("evaluation")
    c.neighbours.members["hospital-b"].counts = False
    assert reason(approved.ask(c.evaluate(), c.model)) == "sum"
    assert approved.charges("evaluation") == before


def test_an_abandoned_evaluation_is_masked_again_on_the_same_charge(approved: Any) -> None:
    c = approved.coordinator
    for number in (1, 2, 3):
        assert isinstance(approved.ask(c.train(number), c.model), Update)
    first, second = c.evaluate(), c.evaluate(attempt=2)
    assert reason(approved.ask(first, c.model)) == "sum"  # it was given up when the second's key was given
    third = c.evaluate(attempt=3)
    assert reason(approved.ask(second, c.model)) == "sum"
    answer = approved.requests.handle(third, c.model)
    assert isinstance(c.read(answer), Counts)
    asked = c.evaluate(attempt=4)
    again = approved.requests.handle(asked, c.model)
    assert isinstance(c.read(again), Counts) and again[1] != answer[1]
    assert approved.charges("evaluation") == 3
    assert released(approved, "counts") == [(False, False), (False, True)]


# -- signing and opening


def test_keys_mask_one_result_ever_even_if_the_answer_is_lost(approved: Any) -> None:
    """Two vectors under one mask would tell their difference."""
    c = approved.coordinator
    asked = c.train()
    answer = approved.requests.handle(asked, c.model)
    total = c.sum(asked, answer)
    signed = approved.ask(*total.survivors())
    shutil.rmtree(approved.service.responses.folder / c.study.digest)
    assert approved.requests.handle(asked, c.model)[1] == answer[1]
    assert isinstance(approved.ask(*total.open(signed.signature)), Shares)  # the result is deleted
    shutil.rmtree(approved.service.responses.folder / c.study.digest)
    assert reason(approved.ask(asked, c.model)) == "sum"
    assert approved.charges() == 1


def test_survivors_without_this_site_too_few_or_from_elsewhere_are_refused(three: Any) -> None:
    c = three.coordinator
    asked = c.train()
    total = c.sum(asked, three.requests.handle(asked, c.model))
    for wrong in (
        ("clinic-c", "hospital-b"),
        ("hospital-a", "hospital-z"),
        ("hospital-b", "hospital-a"),
        ("hospital-a", "hospital-a"),
        ("clinic-c", "hospital-a"),  # not with the shares of three
    ):
        assert reason(three.ask(*total.survivors(wrong))) == "sum"
    assert isinstance(three.ask(*total.survivors()), Signed)


def test_fewer_survivors_than_the_threshold_are_refused(site: Any) -> None:
    c = site.coordinator
    c.others = ("clinic-c", "hospital-b")  # of three sites a lying coordinator needs all
    site.approve()
    asked = c.train()
    total = c.sum(asked, site.requests.handle(asked, c.model))
    sealed = total.total.sealed_for("hospital-a")
    part = sealed[: len(sealed) // 2]
    header = total.survivors(("clinic-c", "hospital-a"))[0]
    header = altered(c, header, payload=messages.Payload.of(part).model_dump(mode="json"))
    assert reason(site.ask(header, part)) == "sum"
    assert isinstance(site.ask(*total.survivors()), Signed)


def test_a_site_signs_one_set_of_survivors_also_across_a_restart(three: Any) -> None:
    c = three.coordinator
    asked = c.train()
    answer = three.requests.handle(asked, c.model)
    both, fewer = c.sum(asked, answer), c.sum(asked, answer, without=("clinic-c",))
    signed = three.ask(*fewer.survivors())
    assert isinstance(signed, Signed)
    three.restart()
    assert reason(three.ask(*both.survivors())) == "sum"
    again = three.ask(*fewer.survivors())
    assert isinstance(again, Signed) and again.signature == signed.signature
    shares = three.requests.handle(*fewer.open(signed.signature))
    opened = fewer.read(shares[1])
    assert opened.weight == three.service.spending.approval(c.study.digest).plan.patients + 1  # one neighbour's


def test_shares_are_released_only_for_a_set_that_enough_others_signed(approved: Any) -> None:
    c = approved.coordinator
    asked = c.train()
    total = c.sum(asked, approved.requests.handle(asked, c.model))
    unsigned = messages.encode(
        Open(**c.common(), **total.about, signatures=dict.fromkeys(total.terms.cohort, "0" * 128)), c.key
    )
    assert reason(approved.ask(unsigned)) == "sum"
    signed = approved.ask(*total.survivors())
    opening, sealed = total.open(signed.signature)
    signatures = json.loads(opening)["body"]["signatures"]
    for wrong in (
        {**signatures, "hospital-b": signatures["hospital-a"]},
        {**signatures, "hospital-b": "0" * 128},
        {"hospital-a": signatures["hospital-a"], "hospital-z": signatures["hospital-b"]},
    ):
        assert reason(approved.ask(altered(c, opening, signatures=wrong), sealed)) == "sum"
    first = approved.requests.handle(opening, sealed)
    assert isinstance(c.read(first), Shares)
    approved.restart()
    assert approved.requests.handle(opening, sealed)[1] == first[1]


# -- the keys of the next sum


def after_round(site: Any, number: int) -> Advert | None:
    """The key that comes with the shares of a round's sum."""
    c = site.coordinator
    asked = c.train(number)
    total = c.sum(asked, site.requests.handle(asked, c.model))
    shares = site.ask(*total.open(site.ask(*total.survivors()).signature))
    assert isinstance(shares, Shares)
    following: Advert | None = shares.next
    return following


def test_the_key_of_the_next_sum_rides_on_the_shares_of_this_one(approved: Any) -> None:
    c = approved.coordinator
    for number in (1, 2):
        following = after_round(approved, number)
        slot = Slot(**c.common(), purpose="training", round=number + 1, attempt=1)
        assert following is not None
        following.verify(slot, "hospital-a", approved.service.identity.public)
        assert approved.ask(advertise(c, number + 1)).advert == following
    last = after_round(approved, 3)
    assert last is not None
    slot = Slot(**c.common(), purpose="evaluation", round=3, attempt=1)
    last.verify(slot, "hospital-a", approved.service.identity.public)
    asked = c.evaluate()
    total = c.sum(asked, approved.requests.handle(asked, c.model))
    shares = approved.ask(*total.open(approved.ask(*total.survivors()).signature))
    assert isinstance(shares, Shares) and shares.next is None


def test_where_no_counts_leave_no_key_for_them_rides_back(new_coordinator: NewCoordinator, new_site: NewSite) -> None:
    c = new_coordinator(policy="allow_evaluation_counts: false")
    site = new_site(c)
    site.approve()
    assert after_round(site, 1) is not None
    assert isinstance(site.ask(c.train(2), c.model), Update)
    assert after_round(site, 3) is None


# -- what is deleted


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.rglob("*") if file.is_file())


def test_keys_of_earlier_rounds_are_deleted_once_a_later_one_was_answered(approved: Any) -> None:
    c = approved.coordinator
    approved.ask(c.train(1), c.model)
    approved.ask(c.train(1, attempt=2), c.model)
    folder = approved.service.sums.folder / c.study.digest
    assert files(folder) == ["session.json", "training.1.1", "training.1.2"]
    approved.ask(c.train(2), c.model)
    assert files(folder) == ["session.json", "training.2.1"]


def test_results_and_secrets_of_a_study_are_deleted_when_it_is_closed(approved: Any) -> None:
    c = approved.coordinator
    for number in (1, 2, 3):
        assert isinstance(approved.ask(c.train(number), c.model), Update)
    assert isinstance(approved.ask(c.evaluate(), c.model), Counts)
    assert files(approved.service.results.folder) and files(approved.service.sums.folder)
    assert isinstance(approved.ask(c.close(3)), Closing)
    assert files(approved.service.results.folder) == files(approved.service.sums.folder) == []
    assert isinstance(approved.ask(c.close(3)), Closing)
    for late in (advertise(c, 3, 2), c.train(3, attempt=2), c.evaluate(attempt=2)):
        assert reason(approved.ask(late, c.model if b"adverts" in late else b"")) == "stale-round"
    assert files(approved.service.sums.folder) == []


def test_an_attempt_that_was_signed_is_told_though_its_state_is_lost(approved: Any) -> None:
    """The ledger has it: else the promise to sign nothing there would be broken already."""
    c = approved.coordinator
    c.opened(c.train(), approved.requests.handle(c.train(), c.model))
    (approved.service.sums.folder / c.study.digest / "training.1.1").unlink()
    given = approved.ask(advertise(c, 1, 2))
    assert isinstance(given, Advertised) and given.advert.signed == (1,)
