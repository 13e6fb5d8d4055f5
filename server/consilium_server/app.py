"""One study's process, a Flower ServerApp: the composition root that ties rounds, exchange, aggregation and checkpoint.

Started by ``up`` for each wanted study and started again when it dies; it goes on at the round where it stood.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from consilium_server import registry, studies
from consilium_server.aggregation import READABLE, CountSum, UpdateSum
from consilium_server.checkpoint import Checkpoint, CheckpointFile
from consilium_server.conversation import WEEK_SECONDS, Conversation, Halted
from consilium_server.exchange import Answer as Arrival
from consilium_server.exchange import ask, open_grid
from consilium_server.federation import Home
from consilium_server.optimizer import ServerOptimizer
from consilium_server.recruitment import Recruitment
from consilium_server.rounds import Question
from consilium_server.superlink import node_names
from consilium_server.up import settings
from consilium_shared import logs, messages
from consilium_shared.canonical import digest
from consilium_shared.errors import ConfigurationError, ConsiliumError, PeerError, TransportError
from consilium_shared.messages import Close, Closing, Counts, Evaluate, Payload, Refusal, Train, Update
from consilium_shared.metrics import Layout, metrics
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.study import seconds

log = logging.getLogger("consilium.study")

AGAIN = 75
"""Exit status: the transport failed, start again and resume (EX_TEMPFAIL of sysexits.h)."""
RETRY_SECONDS = 1.0


class StudyRun:
    """A study under way. Everything it must not lose is in its folder; the rest is found out again."""

    def __init__(self, talk: Conversation) -> None:
        self.talk = talk
        self.folder, self.home, self.study = talk.folder, talk.home, talk.study
        self.recruitment = Recruitment(talk)
        self.optimizer = ServerOptimizer.from_study(self.study.aggregation.optimizer)
        self.checkpoints = CheckpointFile(self.folder.root)
        found = self.checkpoints.read(self.study.digest)
        if found is None:
            found = Checkpoint(self.study.digest, 0, to_vector(build(self.study)), {}, {})
        else:
            self.optimizer.restore(found.optimizer)
        self.point = found
        self.packed = pack(found.model, self.study)
        """The model of ``point`` as it is sent: packed once, asked for in evaluation and in the next round."""

    def run(self) -> None:
        """From the checkpoint to the registry; raises Halted or ConsiliumError."""
        # Before round 1 everybody is waited for; after a restart those who took part in the last round.
        awaited = frozenset(self.point.record.get("participants", self.recruitment.standing))
        if self.point.record and not self._has_record(self.point.round):
            self.recruitment.gather(awaited)
            self._close(self.point)
        while self.point.round < self.study.training.rounds:
            self.recruitment.gather(awaited)
            awaited = frozenset()
            self._train(self.point.round + 1)
            self._close(self.point)
        model = registry.find(self.home, self.study, self.packed) or self._end()
        self.folder.event("published", folder=str(model.folder))
        self.folder.set_state("finished")

    def _train(self, number: int) -> None:
        model = self.packed
        recorded = self.folder.recorded(number - 1, self.talk.coordinator) if number > 1 else None
        train = Train(**self.talk.common, round=number, payload=Payload.of(model), recorded=recorded)
        header = messages.encode(train, self.talk.coordinator)
        total = UpdateSum(self.point.model.size, equal=self.study.aggregation.weighting == "equal")
        question = self._question(
            number, "training", self.recruitment.sites("approved"), self.study.aggregation.min_sites
        )
        epsilon: dict[str, float | None] = {}
        heads: dict[str, dict[str, Any]] = {}
        answers: dict[str, str] = {}
        countersigned: dict[str, str] = {}

        def accept(answer: messages.Answer, arrival: Arrival) -> None:
            if not isinstance(answer, Update) or answer.round != number:
                raise PeerError("not an answer to this question")
            signature = self.talk.countersignature(answer, recorded)
            total.fold(answer.site, arrival.payload.read())
            if signature is not None:
                countersigned[answer.site] = signature
            answers[answer.site] = digest(arrival.header)
            epsilon[answer.site] = answer.epsilon
            heads[answer.site] = answer.head.model_dump(mode="json")

        began = time.monotonic()
        self._ask(question, number, header, model, total.payload_bytes, accept)
        for site in question.stopped():
            self.recruitment.standing[site] = "refused"
        if not question.enough():
            why = "; ".join(f"{site}: {reason}" for site, (reason, _) in sorted(question.refused.items()))
            raise Halted(f"round {number} has {len(question.answered)} of {question.minimum} answers ({why})")
        stepped = self.optimizer.step(self.point.model, total.mean())
        after = pack(stepped, self.study)
        record = {
            "study": self.study.digest,
            "federation": self.talk.roster.federation,
            "roster": self.talk.roster.digest,
            "round": number,
            "model_before": digest(model),
            "model_after": digest(after),
            "participants": sorted(question.answered),
            "away": {**dict.fromkeys(self.recruitment.sites("pending"), "not decided"), **question.away()},
            "refused": {site: list(why) for site, why in question.refused.items()},
            "epsilon": epsilon,
            "heads": heads,
            "previous": recorded.record if recorded is not None else None,
            "answers": answers,
            "countersigned": countersigned,
            "seconds": round(time.monotonic() - began, 3),
        }
        self.point = Checkpoint(self.study.digest, number, stepped, self.optimizer.state(), record)
        self.packed = after
        self.checkpoints.write(self.point)

    def _close(self, point: Checkpoint) -> None:
        """Evaluate where the study says so, sign the record, tell whoever watches."""
        found: dict[str, Any] | None = None
        counts: dict[str, str] = {}
        epsilon = dict(point.record["epsilon"])
        if point.round in self.study.evaluated_rounds:
            found, counts, spent = self._evaluate(point)
            epsilon |= spent
        record = {**point.record, "epsilon": epsilon, "metrics": found, "counts": counts}
        self.folder.write_record(record, self.talk.coordinator)
        self.folder.event(
            "closed",
            round=point.round,
            seconds=record["seconds"],
            away=record["away"],
            epsilon=record["epsilon"],
            metrics=found,
        )
        log.info("round %d closed with %d sites", point.round, len(record["participants"]))

    def _end(self) -> registry.Model:
        """Show the last record to everybody who took part, for at most ``round_timeout``; then publish the model."""
        number, records = self.point.round, self.folder.records(self.talk.coordinator)
        sites = {site for record in records for site in record["participants"]}
        recorded = self.folder.recorded(number, self.talk.coordinator)
        header = messages.encode(Close(**self.talk.common, recorded=recorded), self.talk.coordinator)
        missing = tuple(sorted(sites - set(self.folder.closings(self.talk.roster))))
        question = self._question(number, "closing", missing, 0)

        def accept(answer: messages.Answer, arrival: Arrival) -> None:
            if not isinstance(answer, Closing) or answer.round != number:
                raise PeerError("not an answer to this question")
            self.talk.countersignature(answer, recorded)
            self.folder.keep_closing(answer.site, arrival.header)

        self._ask(question, number, header, b"", 0, accept)
        closings = {site: closing for site, (_, closing) in self.folder.closings(self.talk.roster).items()}
        return registry.publish(self.home, self.study, self.talk.roster, self.packed, records, closings)

    def _evaluate(
        self, point: Checkpoint
    ) -> tuple[dict[str, Any] | None, dict[str, str], dict[str, float | None]]:
        """The metrics; and by site the digest of each answer that went into them, and what the study then cost."""
        model = self.packed
        evaluate = Evaluate(**self.talk.common, round=point.round, payload=Payload.of(model))
        header = messages.encode(evaluate, self.talk.coordinator)
        layout = Layout.of(self.study)
        total = CountSum(layout.width, noised=layout.noised)
        asked = tuple(site for site in point.record["participants"] if self.recruitment.standing[site] == "approved")
        question = self._question(point.round, "evaluation", asked, 1)
        counts: dict[str, str] = {}
        spent: dict[str, float | None] = {}

        def accept(answer: messages.Answer, arrival: Arrival) -> None:
            if not isinstance(answer, Counts) or answer.round != point.round:
                raise PeerError("not an answer to this question")
            total.fold(answer.site, arrival.payload.read())
            counts[answer.site] = digest(arrival.header)
            spent[answer.site] = answer.epsilon

        self._ask(question, point.round, header, model, total.payload_bytes, accept)
        if not question.answered:
            return None, {}, {}
        values = metrics(total.total, layout)
        kept: dict[str, Any] = {name: values[name] for name in self.study.evaluation.metrics}
        return {**kept, "sites": len(question.answered)}, counts, spent

    def _question(self, number: int, phase: str, sites: tuple[str, ...], minimum: int) -> Question:
        self.folder.event("round", round=number, phase=phase, sites=list(sites))
        timeout = seconds(self.study.aggregation.round_timeout)
        return Question(sites, minimum, time.monotonic(), timeout)

    def _ask(
        self,
        question: Question,
        number: int,
        header: bytes,
        payload: bytes,
        answer_bytes: int,
        accept: Callable[[messages.Answer, Arrival], None],
    ) -> None:
        """Until the question is done: ask who is open, take answers one by one, say for whom it waits."""
        began = time.monotonic()
        said: dict[str, Any] = {}

        def look(status: Mapping[str, str]) -> None:
            late = time.monotonic() - question.opened > question.timeout
            offline = {site: what for site, what in status.items() if late or what == "offline"}
            now = {"sites": offline, "have": len(question.answered), "minimum": question.minimum}
            if offline and now != said:
                self.folder.event("waiting", **now)
            said.update(now)

        def abort() -> bool:
            self.talk.check_wanted()
            return question.done(time.monotonic())

        while not question.done(time.monotonic()):
            for site in question.open():
                if site not in self.talk.nodes:
                    question.problem(site, "its SuperNode is not registered")
            requests = {site: (header, payload) for site in question.open() if site in self.talk.nodes}
            for arrival in ask(
                self.talk.grid,
                requests,
                self.talk.nodes,
                WEEK_SECONDS,
                spool=self.folder.root,
                payload_bytes=answer_bytes,
                on_wait=look,
                abort=abort,
            ):
                self._take(question, number, arrival, header, accept, time.monotonic() - began)
            if not question.done(time.monotonic()):
                self.talk.pause(RETRY_SECONDS)

    def _take(
        self,
        question: Question,
        number: int,
        arrival: Arrival,
        header: bytes,
        accept: Callable[[messages.Answer, Arrival], None],
        took: float,
    ) -> None:
        site = arrival.site
        if arrival.problem is not None:
            if arrival.problem != "aborted":
                question.problem(site, arrival.problem)
                self.folder.event("problem", round=number, site=site, what=arrival.problem)
            return
        try:
            answer = self.talk.decode(arrival, header)
            if not isinstance(answer, Refusal):
                accept(answer, arrival)
        except PeerError as error:
            question.refuse(site, "malformed", str(error))
            self.folder.event("refusal", round=number, site=site, reason="malformed", detail=str(error))
            return
        if isinstance(answer, Refusal):
            question.refuse(site, answer.reason, answer.detail)
            if site in question.open():
                self.folder.event("problem", round=number, site=site, what=answer.detail)
                return
            self.folder.event("refusal", round=number, site=site, reason=answer.reason, detail=answer.detail)
            if answer.reason in ("pending", "unknown-study"):
                self.recruitment.standing[site] = "pending"
            return
        question.answer(site)
        size = arrival.payload.size
        self.folder.event("answer", round=number, site=site, seconds=round(took, 3), bytes=size)

    def _has_record(self, number: int) -> bool:
        return self.folder.record_file(number).exists()


def conduct(home: Home, name: str) -> int:
    """Run one study to its end; returns the exit status (0: nothing more to do, ``AGAIN``: start again)."""
    folder = studies.folder(home, name)
    folder.study()
    with os.fdopen(os.open(folder.root / "lock", os.O_RDWR | os.O_CREAT, 0o600), "r+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(f"study {name} runs already") from error
        if folder.state()[0] not in ("wanted", "running"):
            return 0  # stopped between up's look and now
        link = settings(home)
        try:
            folder.set_state("running")
            with open_grid(link) as grid:
                StudyRun(Conversation(home, folder, grid, node_names(link))).run()
        except Halted as halt:
            folder.set_state("stopped", str(halt))
        except TransportError as error:
            log.warning("%s", error)
            return AGAIN
        except ConsiliumError as error:
            folder.set_state("failed", str(error))
            log.error("%s", error)
        except Exception as error:
            folder.set_state("failed", f"a defect of Consilium ({type(error).__name__}); the study's log has the place")
            log.exception("defect")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Command line of the process that ``up`` starts."""
    parser = argparse.ArgumentParser(prog="consilium_server.app", description="Conduct one study.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--study", required=True)
    options = parser.parse_args(arguments)
    os.umask(0o077)
    logs.configure()
    log.info("%s", READABLE)
    home = Home(options.home)
    try:
        return conduct(home, options.study)
    except TransportError as error:
        log.warning("%s", error)
        return AGAIN
    except ConsiliumError as error:
        log.error("%s", error)
        with contextlib.suppress(ConsiliumError):
            studies.folder(home, options.study).set_state("failed", str(error))
        return 0


if __name__ == "__main__":
    sys.exit(main())
