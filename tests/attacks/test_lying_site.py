"""A site that sends what it must not spoils at most its own round, is found where it can be, and learns nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.support.messages import SITE, answers
from tests.support.sums import Federation, Sum, Whole, same

from consilium_shared import limits, task
from consilium_shared.canonical import canonical_bytes
from consilium_shared.config import load_yaml
from consilium_shared.errors import DataError, PeerError
from consilium_shared.metrics import Layout
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import Payload
from consilium_shared.protocol.summand import Opened, bound, counts_segment, fixed_point, read
from consilium_shared.secagg import keys, ring
from consilium_shared.secagg.keys import KEY_BYTES
from consilium_shared.secagg.site import sealed_bytes
from consilium_shared.study import Study

LIAR = "site-03"
PARAMETERS = 5
SAMPLE = load_yaml(task.studies()["heart-disease"] / "study.yaml", Study)


def study(**aggregation: Any) -> Study:
    """A contract with these rules for what is added up."""
    contract = {**SAMPLE.contract, "aggregation": {**SAMPLE.contract["aggregation"], **aggregation}}
    return Study.from_contract(json.loads(json.dumps(contract)))


# -- what is added up


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_honest_site_sends_no_update_that_is_not_finite(value: float) -> None:
    update = np.zeros(PARAMETERS, np.float32)
    update[-1] = value
    with pytest.raises(DataError, match="finite"):
        bound(update, study())
    with pytest.raises(DataError, match="finite"):
        fixed_point(study(), 4).encode(update, np.zeros(PARAMETERS, np.uint32))


def test_an_honest_sites_update_is_within_the_bounds_whatever_training_gave() -> None:
    draw = np.random.default_rng(1)
    rules = study(norm_bound=2.0, coordinate_bound=0.5, weighting="equal")
    for size in (1.0, 1e3, 1e30):
        update = (size * draw.normal(size=PARAMETERS)).astype(np.float32)
        bound(update, rules)
        assert np.linalg.norm(update) <= 2.0 * (1 + 1e-6) and np.abs(update).max() <= 0.5
        encoded = np.zeros(PARAMETERS, np.uint32)
        fixed_point(rules, 4).encode(update, encoded)
        assert np.abs(encoded.view(np.int32)).max() <= fixed_point(rules, 4).levels


def test_an_honest_site_sends_no_count_that_could_overflow_the_sum() -> None:
    largest = ring.integers_limit(4)
    counts_segment(np.array([largest]), 4, counted=True)
    for value in (largest + 1, -largest - 1):
        with pytest.raises(DataError, match="too large"):
            counts_segment(np.array([value]), 4, counted=True)


def opened(rules: Study, updates: list[list[float]], weights: list[int], words: np.ndarray | None = None) -> Opened:
    """What is read off the sum of honest encodings, to which a liar adds any words of the ring."""
    total = np.zeros(PARAMETERS, ring.DTYPES[32])
    for update, weight in zip(updates, weights, strict=True):
        encoded = np.zeros(PARAMETERS, ring.DTYPES[32])
        scale = weight / (1 if rules.aggregation.weighting == "equal" else rules.aggregation.max_weight)
        fixed_point(rules, 4).encode(np.array(update, np.float32), encoded, scale)
        total += encoded
    if words is not None:
        total += words
    summed = np.array([sum(weights)], np.int64).view(np.uint64)
    return read(rules, "training", 4, len(weights), {"update": total, "weight": summed})


@pytest.mark.parametrize("weighting", ["equal", "patients"])
def test_the_largest_honest_sum_is_plausible_and_a_larger_one_is_not(weighting: str) -> None:
    rules = study(norm_bound=2.0, coordinate_bound=2.0, weighting=weighting, max_weight=1000)
    weights = [1, 1, 1, 1] if weighting == "equal" else [1000, 1, 7, 333]
    whole = opened(rules, [[2.0, 0, 0, 0, 0]] * 4, weights)
    assert whole.implausible is None and whole.mean[0] == pytest.approx(2.0, rel=1e-5)
    assert "norm" in str(opened(rules, [[2.0, 0.2, 0, 0, 0]] * 4, weights).implausible)


def test_a_liar_hides_behind_others_that_moved_little_but_no_farther_than_all_together_could() -> None:
    rules = study(norm_bound=2.0, coordinate_bound=2.0, weighting="equal")
    beyond = [2.0, 2.0, 2.0, 2.0, 2.0]
    assert opened(rules, [[0.1, 0, 0, 0, 0]] * 3 + [beyond], [1] * 4).implausible is None
    assert opened(rules, [[1.0, 1.0, 1.0, 0, 0]] * 3 + [beyond], [1] * 4).implausible is not None


def test_a_coordinate_beyond_the_bound_is_reported() -> None:
    rules = study(norm_bound=100.0, coordinate_bound=1.0, weighting="equal")
    words = np.zeros(PARAMETERS, np.uint32)
    words[2] = fixed_point(rules, 4).levels // 2
    assert opened(rules, [[0, 0, 1.0, 0, 0]] * 4, [1] * 4).implausible is None
    assert "coordinate" in str(opened(rules, [[0, 0, 1.0, 0, 0]] * 4, [1] * 4, words).implausible)


def test_words_from_nowhere_are_reported() -> None:
    words = np.random.default_rng(2).integers(0, 2**32, PARAMETERS, dtype=np.uint32)
    rules = study(norm_bound=1.0, coordinate_bound=1.0, weighting="equal")
    assert opened(rules, [[0.0] * PARAMETERS] * 4, [1] * 4, words).implausible is not None


@pytest.mark.parametrize("weight", [0, -1, 3, 4 * 1000 + 1, 2**63 - 1, -(2**63)])
def test_a_summed_weight_that_no_honest_sites_have_is_not_used(weight: int) -> None:
    rules = study(max_weight=1000, weighting="patients")
    totals: dict[str, Any] = {
        "update": np.zeros(PARAMETERS, np.uint32),
        "weight": np.array([weight], np.int64).view(np.uint64),
    }
    found = read(rules, "training", 4, 4, totals)
    assert "spoilt" in str(found.implausible) and (found.mean.size, found.counts) == (0, None)


@pytest.mark.parametrize("counted", [-1, 5, 2**62])
@pytest.mark.parametrize("purpose", ["training", "evaluation"])
def test_more_sites_that_counted_than_there_are_is_not_used(purpose: Any, counted: int) -> None:
    rules = study(weighting="equal")
    counts = np.array([counted, *([0] * Layout.of(rules).width)], np.int64).view(np.uint64)
    rest: dict[str, Any] = {"update": np.zeros(PARAMETERS, np.uint32), "weight": np.array([4], np.uint64)}
    found = read(rules, purpose, 4, 4, {"counts": counts, **(rest if purpose == "training" else {})})
    assert "spoilt" in str(found.implausible) and (found.mean.size, found.counts) == (0, None)


# -- what is sent


@pytest.mark.parametrize(
    "change",
    [lambda b: b"", lambda b: b[:-1], lambda b: b + b"\0", lambda b: b * 2, lambda b: b[: len(b) // 2]],
)
def test_a_contribution_of_another_length_is_not_taken_and_the_sum_goes_on(
    four: Federation, change: Callable[[bytes], bytes]
) -> None:
    attempt = four.sum()
    attempt.mask()
    attempt.fold(*four.names[:3])
    with pytest.raises(PeerError, match="a contribution has"):
        attempt.total.fold(LIAR, Whole(change(attempt.sent[LIAR])))
    attempt.total.close(2)
    attempt.sign()
    attempt.release()
    assert same(attempt.total.open(), attempt.plain(*four.names[:3]))


def test_a_message_beyond_the_limits_is_refused_before_it_is_read() -> None:
    with pytest.raises(PeerError, match="at most"):
        messages.decode_answer(bytes(limits.HEADER_BYTES + 1), SITE.public)
    body = answers()["update"][0].model_dump(mode="json")
    body["payload"]["size"] = limits.PAYLOAD_BYTES + 1
    signature = SITE.sign(messages.ANSWER_DOMAIN, canonical_bytes(body)).hex()
    with pytest.raises(PeerError, match="out of bounds"):
        messages.decode_answer(canonical_bytes({"body": body, "signature": signature}), SITE.public)
    with pytest.raises(PeerError):
        Payload.of(b"small").check(bytes(2**20))


def test_a_contribution_of_another_round_leaves_only_noise_and_is_signed_by_nobody(four: Federation) -> None:
    attempt, other = four.sum(), four.sum(slot=four.slot(round=2))
    other.mask(LIAR)
    attempt.mask(*four.names[:3])
    attempt.sent[LIAR] = other.sent[LIAR]
    attempt.close()
    with pytest.raises(PeerError, match="altered"):
        attempt.sign("site-00")


def test_a_sites_words_spoil_the_sum_by_those_words_and_no_mask_is_lost(four: Federation) -> None:
    attempt = four.sum()
    attempt.mask()
    size = attempt.terms.segments[0].bytes
    spoilt = bytes(np.frombuffer(attempt.sent[LIAR][:size], np.uint32) + np.uint32(12345)) + attempt.sent[LIAR][size:]
    attempt.sent[LIAR] = spoilt
    total, plain = attempt.opened(), attempt.plain()
    assert np.array_equal(total["update"], plain["update"] + np.uint32(12345))
    assert np.array_equal(total["counts"], plain["counts"])


# -- what opens it


def ready(federation: Federation, *gone: str) -> Sum:
    """Everybody who is left has signed and released."""
    attempt = federation.sum()
    attempt.close(*[site for site in federation.names if site not in gone])
    attempt.sign()
    attempt.release()
    return attempt


@pytest.mark.parametrize("liars", [("site-00",), ("site-06",), ("site-00", "site-01"), ("site-02", "site-05")])
def test_wrong_shares_are_survived_while_enough_others_are_right(seven: Federation, liars: tuple[str, ...]) -> None:
    attempt = ready(seven)
    for liar in liars:
        attempt.total.share(liar, bytes(len(attempt.total._shares[liar])))
    assert same(attempt.total.open(), attempt.plain())


def test_wrong_shares_of_the_seeds_with_a_site_that_is_gone_are_survived_too(seven: Federation) -> None:
    attempt = ready(seven, "site-04")
    right, seeds = attempt.total._shares["site-01"], attempt.total._seeds()
    for at in range(0, len(right), KEY_BYTES):  # its shares of one seed after the other
        attempt.total.share("site-01", right[:at] + bytes(KEY_BYTES) + right[at + KEY_BYTES :])
        assert attempt.total._seeds() == seeds
    assert same(attempt.total.open(), attempt.plain(*[site for site in seven.names if site != "site-04"]))


def test_more_wrong_shares_than_that_open_nothing_and_the_sum_stays_as_it_is(seven: Federation) -> None:
    attempt = ready(seven)
    right = dict(attempt.total._shares)
    for liar in seven.names[:3]:
        attempt.total.share(liar, bytes(len(right[liar])))
    with pytest.raises(PeerError, match="committed to"):
        attempt.total.open()
    for liar in seven.names[:3]:
        attempt.total.share(liar, right[liar])
    assert same(attempt.total.open(), attempt.plain())


@pytest.mark.parametrize("length", [0, KEY_BYTES - 1, 4 * KEY_BYTES - 1, 4 * KEY_BYTES + 1, 8 * KEY_BYTES])
def test_shares_of_another_length_are_not_taken(four: Federation, length: int) -> None:
    attempt = four.sum()
    attempt.close()
    attempt.sign()
    with pytest.raises(PeerError, match="a survivor's shares have 128 bytes"):
        attempt.total.share(LIAR, bytes(length))
    assert attempt.total.sharers == ()


def with_trailer(attempt: Sum, change: Callable[[bytearray], None]) -> None:
    """The liar's sealed shares and commitments, changed before it sends them."""
    attempt.mask()
    body = attempt.terms.masked_bytes
    trailer = bytearray(attempt.sent[LIAR][body:])
    change(trailer)
    attempt.sent[LIAR] = attempt.sent[LIAR][:body] + bytes(trailer)


@pytest.mark.parametrize("gone", [(), ("site-01",)])
def test_a_site_that_commits_to_other_seeds_than_it_shares_is_named(four: Federation, gone: tuple[str, ...]) -> None:
    attempt = four.sum()
    place = 4 if not gone else 2

    def change(trailer: bytearray) -> None:
        trailer[-KEY_BYTES * (5 - place) :] = bytes(KEY_BYTES * (5 - place))

    with_trailer(attempt, change)
    attempt.close(*[site for site in four.names if site not in gone])
    attempt.sign()
    attempt.release()
    with pytest.raises(PeerError, match=f"committed to by: {LIAR}$"):
        attempt.total.open()


def test_a_site_that_seals_nonsense_gets_no_signature_of_whom_it_sealed_it_to(four: Federation) -> None:
    attempt = four.sum()
    size = sealed_bytes(attempt.terms)

    def change(trailer: bytearray) -> None:
        trailer[:size] = bytes(size)

    with_trailer(attempt, change)
    attempt.close()
    with pytest.raises(PeerError, match="altered"):
        attempt.sign("site-00")
    attempt.sign("site-01", "site-02")
    assert attempt.states["site-00"].stage == "masked"


def test_a_site_that_seals_shares_of_different_secrets_opens_nothing_else(four: Federation) -> None:
    """Correctly sealed to each, but of no one polynomial."""
    attempt = four.sum()
    part, state = four.parts[LIAR], attempt.states[LIAR]
    size, terms = sealed_bytes(attempt.terms), attempt.terms

    def change(trailer: bytearray) -> None:
        agreed = part._agreed(state, terms)["site-01"]
        key = keys.derive(agreed, "share", terms.digest, LIAR, "site-01")
        about = canonical_bytes([terms.digest, LIAR, "site-01"])
        trailer[size : 2 * size] = keys.seal(key, bytes(KEY_BYTES * 4), about)

    with_trailer(attempt, change)
    attempt.close()
    attempt.sign()
    attempt.release()
    attempt.total._shares.pop("site-02")
    with pytest.raises(PeerError, match=f"committed to by: {LIAR}$"):
        attempt.total.open()
    attempt.release("site-02")
    assert same(attempt.total.open(), attempt.plain())
