"""A site believes no history that contradicts what it knows: refused before anything is charged, entered, not told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from consilium_client.state.ledger_file import LedgerFile
from consilium_client.state.responses import Staged
from consilium_client.state.results import Results
from consilium_shared.canonical import digest
from consilium_shared.errors import LedgerError, SignatureError
from consilium_shared.identity import Identity
from consilium_shared.ledger.chain import Books, LedgerHead
from consilium_shared.ledger.entry import line_digest, make_body, sign_entry
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import Closing, Recorded, Refusal, Update

OTHER = "hospital-b"


class Crash(BaseException):
    """Stands for kill -9 at one place: nothing after it runs in this process."""


def train(c: Any, number: int, recorded: Recorded | None) -> bytes:
    header: bytes = c.train(number, recorded=recorded)
    return header


def asked(site: Any, number: int, recorded: Recorded | None) -> messages.Answer:
    answer: messages.Answer = site.ask(train(site.coordinator, number, recorded), site.coordinator.model)
    return answer


def head(site: Any, seq: int | None = None) -> dict[str, Any]:
    entries = site.service.ledger.entries
    seq = len(entries) if seq is None else seq
    return {"seq": seq, "sha256": line_digest(entries[seq - 1].line())}


def refused(site: Any, number: int, recorded: Recorded | None) -> str:
    """Asked with a false history: refused without a charge and without a witness; the reason in the ledger."""
    header = train(site.coordinator, number, recorded)  # asks for the site's key first
    before = site.kinds()
    answer = site.ask(header, site.coordinator.model)
    assert isinstance(answer, Refusal) and answer.reason == "witness", answer
    assert site.kinds()[len(before) :] == ["refuse", "release"]
    why: str = site.service.ledger.entries[-2].body.detail
    assert why not in answer.detail and "its ledger says why" in answer.detail
    return why


@pytest.fixture
def trained(site: Any) -> Any:
    """A site that trained round 1; ``told`` is the head that it named."""
    site.approve()
    update = asked(site, 1, None)
    assert isinstance(update, Update) and update.countersignature is None
    site.told = update.head.model_dump()
    return site


def shown(site: Any, number: int = 1, **changes: Any) -> Recorded:
    """The faithful record of a round in which both took part."""
    other = site.coordinator.recorded(number).heads[OTHER].model_dump()
    heads = {site.service.site: site.told, OTHER: other, **changes.pop("heads", {})}
    recorded: Recorded = site.coordinator.recorded(number, heads=heads, **changes)
    return recorded


def test_what_fits_is_entered_before_the_charge_and_countersigned(trained: Any) -> None:
    recorded = shown(trained)
    header = train(trained.coordinator, 2, recorded)
    before = len(trained.kinds())
    update = trained.ask(header, trained.coordinator.model)
    assert isinstance(update, Update) and update.countersignature is not None
    both = ["charge", "charge", "settle", "settle"]  # the training, and the counts that ride on it
    assert trained.kinds()[before:] == ["witness", *both, "release"]
    assert trained.service.ledger.entries[before].body.model_dump(mode="json") == {
        "study": trained.coordinator.study.digest,
        **recorded.model_dump(mode="json"),
    }
    key = trained.service.identity.public
    messages.verify_countersignature(update.countersignature, recorded.record, key)
    with pytest.raises(SignatureError):
        messages.verify_countersignature(update.countersignature, digest(b"another record"), key)
    with pytest.raises(SignatureError):
        messages.verify_countersignature(update.countersignature, recorded.record, Identity.generate().public)
    assert update.head.seq > before + 1, "the answer's head commits to the witness entry"


def test_asked_again_also_after_a_restart_it_is_the_same_answer_and_no_second_entry(trained: Any) -> None:
    c, header = trained.coordinator, train(trained.coordinator, 2, shown(trained))
    first = trained.requests.handle(header, c.model)
    before = trained.kinds()
    assert trained.requests.handle(header, c.model) == first
    trained.restart()
    assert trained.requests.handle(header, c.model) == first
    assert trained.kinds() == before


@pytest.mark.parametrize("place", ["witness", "charge", "keep", "store"])
def test_a_crash_around_the_witness_entry_leaves_one_of_it(
    trained: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    append = LedgerFile.append

    def die(*_: Any) -> None:
        raise Crash

    def guarded(ledger: LedgerFile, kind: str, fields: dict[str, Any]) -> Any:
        return die() if kind == place else append(ledger, kind, fields)

    monkeypatch.setattr(LedgerFile, "append", guarded)
    if place == "keep":
        monkeypatch.setattr(Results, "put", die)
    elif place == "store":
        monkeypatch.setattr(Staged, "commit", die)
    recorded = shown(trained)
    with pytest.raises(Crash):
        asked(trained, 2, recorded)
    monkeypatch.undo()
    told = trained.told
    trained.restart()
    trained.told = told
    assert isinstance(asked(trained, 2, recorded), Update)
    assert trained.kinds().count("witness") == 1
    assert (trained.charges(), trained.charges("evaluation")) == (2, 1)


def test_a_false_head_of_its_own_is_refused_whoever_made_it_up(trained: Any) -> None:
    """A coordinator that frames a site: with another entry, an earlier one, one that does not exist yet."""
    name, seq = trained.service.site, trained.told["seq"]
    assert [trained.kinds()[at - 1] for at in (seq, seq - 1)] == ["settle", "charge"]
    false = {"seq": seq, "sha256": digest(b"an entry that was never written")}
    assert "no entry of it" in refused(trained, 2, shown(trained, heads={name: false}))
    assert "before its charge" in refused(trained, 2, shown(trained, heads={name: head(trained, seq - 2)}))
    later = {"seq": 10_000, "sha256": digest(b"later")}
    assert "no entry of it" in refused(trained, 2, shown(trained, heads={name: later}))
    assert trained.charges() == 1
    assert isinstance(asked(trained, 2, shown(trained)), Update), "the true history is still accepted"


def test_another_sites_ledger_that_goes_back_or_stands_still_is_refused(trained: Any) -> None:
    assert isinstance(asked(trained, 2, shown(trained)), Update)
    first = shown(trained).heads[OTHER]
    back = {"seq": first.seq - 1, "sha256": digest(b"before")}
    still = {"seq": first.seq, "sha256": digest(b"rewritten")}
    for head_of_other in (first.model_dump(), back, still):
        recorded = trained.coordinator.recorded(2, heads={OTHER: head_of_other})
        assert f"come to entry {first.seq}" in refused(trained, 3, recorded)
    assert trained.charges() == 2


def test_a_second_record_of_the_same_round_is_refused(trained: Any) -> None:
    c = trained.coordinator
    crashed_before_the_charge = c.recorded(1, heads=shown(trained).model_dump()["heads"])
    trained.service.ledger.append(
        "witness", {"study": c.study.digest, **crashed_before_the_charge.model_dump(mode="json")}
    )
    other_bytes = shown(trained, record=digest(b"another record"))
    other_heads = shown(trained, heads={OTHER: {"seq": 99, "sha256": digest(b"another head")}})
    for recorded in (other_bytes, other_heads):
        assert "another record of round 1" in refused(trained, 2, recorded)
    assert isinstance(asked(trained, 2, shown(trained)), Update)


def test_a_round_without_the_record_of_the_one_before_is_refused(trained: Any) -> None:
    assert "without the record" in refused(trained, 2, None)
    assert "without the record" in refused(trained, 3, shown(trained))
    assert "without the record" in refused(trained, 2, shown(trained, number=2))
    stranger = {"hospital-z": {"seq": 3, "sha256": digest(b"stranger")}}
    assert "hospital-z" in refused(trained, 2, shown(trained, heads=stranger))


def test_a_round_whose_record_was_shown_is_over(trained: Any) -> None:
    """A coordinator that recorded a round cannot have another update of it later, nor counts, nor shares."""
    c = trained.coordinator
    assert isinstance(asked(trained, 2, shown(trained)), Update)
    trained.told = head(trained)
    witnessed = shown(trained, number=2).model_dump(mode="json")
    trained.service.ledger.append("witness", {"study": c.study.digest, **witnessed})
    for header in (c.evaluate(2), c.train(2), c.train(2, attempt=2)):
        answer = trained.ask(header, c.model)
        assert isinstance(answer, Refusal) and answer.reason == "stale-round"
    of: dict[str, Any] = {"round": 2, "attempt": 1, "of": "training"}
    late = messages.Open(**c.common(), **of, signatures=dict.fromkeys((OTHER, trained.service.site), "0" * 128))
    answer = trained.ask(messages.encode(late, c.key))
    assert isinstance(answer, Refusal) and answer.reason == "stale-round"
    assert trained.charges() == 2


# -- the end


def at_the_end(site: Any) -> Recorded:
    for number in (2, 3):
        recorded = shown(site, number - 1)
        update = asked(site, number, recorded)
        assert isinstance(update, Update)
        site.told = update.head.model_dump()
    return shown(site, 3)


def close(site: Any, recorded: Recorded) -> bytes:
    header: bytes = site.coordinator.close(recorded.round, **recorded.model_dump(mode="json", exclude={"round"}))
    return header


def test_the_last_record_is_witnessed_and_the_whole_cost_told(trained: Any) -> None:
    recorded = at_the_end(trained)
    before = len(trained.kinds())
    answer = trained.requests.handle(close(trained, recorded), b"")
    closing = trained.coordinator.read(answer)
    assert isinstance(closing, Closing) and closing.round == 3 and closing.audit is None
    messages.verify_countersignature(closing.countersignature, recorded.record, trained.service.identity.public)
    spent = trained.service.spending.study_epsilon(trained.coordinator.study.digest)
    assert closing.epsilon is not None and spent <= closing.epsilon <= spent + 0.001
    assert trained.kinds()[before:] == ["witness", "release"]
    assert closing.head.seq == before + 1, "its head is the witness entry"
    trained.restart()
    assert trained.requests.handle(close(trained, recorded), b"") == answer
    assert len(trained.kinds()) == before + 2


def test_no_other_round_than_the_last_is_closed_and_no_second_end_is_accepted(trained: Any) -> None:
    early = trained.ask(close(trained, shown(trained)))
    assert isinstance(early, Refusal) and early.reason == "witness"
    recorded = at_the_end(trained)
    assert isinstance(trained.ask(close(trained, recorded)), Closing)
    other = recorded.model_copy(update={"record": digest(b"another end")})
    again = trained.ask(close(trained, other))
    assert isinstance(again, Refusal) and again.reason == "stale-round"


def test_an_audit_of_the_study_at_this_site_is_told_at_the_end(trained: Any) -> None:
    c, recorded = trained.coordinator, at_the_end(trained)
    fields = {"canaries": 100, "guesses": 40, "plan": "3" * 64, "by": "tester"}
    for study, correct in ((c.study.digest, 30), (c.study.digest, 21), ("4" * 64, 40)):
        body = {"study": study, "name": "synthetic-study", "correct": correct, **fields}
        trained.service.ledger.append("audit", body)
    closing = trained.ask(close(trained, recorded))
    assert isinstance(closing, Closing) and closing.audit is not None
    assert (closing.audit.canaries, closing.audit.guesses, closing.audit.correct) == (100, 40, 21)


# -- the rules themselves


def test_the_rules_hold_across_studies_for_the_same_entry_of_a_ledger() -> None:
    """Two studies may show a ledger in any order, but never two different entries of the same number."""
    books, key, at = Books(), Identity.generate(), LedgerHead(0, "0" * 64)

    def witnessed(study: str, number: int, seq: int, sha256: str) -> None:
        nonlocal at
        fields = {"study": study * 64, "round": number, "record": "5" * 64}
        body = make_body("witness", {**fields, "heads": {"south": {"seq": seq, "sha256": sha256 * 64}}})
        entry = sign_entry(at.seq + 1, "2026-01-01T00:00:00.000Z", body, at.sha256, key)
        books.admit(entry)
        at = LedgerHead(entry.seq, line_digest(entry.line()))

    witnessed("a", 1, 8, "8")
    witnessed("b", 1, 4, "4")
    witnessed("b", 2, 8, "8")
    with pytest.raises(LedgerError, match="another entry 8"):
        witnessed("c", 1, 8, "9")
    with pytest.raises(LedgerError, match="come to entry 8"):
        witnessed("b", 3, 7, "7")
    with pytest.raises(LedgerError, match="after that of round 2"):
        witnessed("b", 2, 9, "9")
    assert [books.last_witnessed(study * 64) for study in "abc"] == [1, 2, 0]


def test_a_site_that_was_away_takes_part_again(
    new_coordinator: Callable[..., Any], new_site: Callable[[Any], Any]
) -> None:
    """It is in no record, so nothing of its own is in what it is shown."""
    site = new_site(new_coordinator())
    site.approve()
    update = asked(site, 3, site.coordinator.recorded(2))
    assert isinstance(update, Update) and update.countersignature is not None
