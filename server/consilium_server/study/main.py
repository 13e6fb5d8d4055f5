"""One study's process, a Flower ServerApp: the composition root that ties rounds, exchange, aggregation and checkpoint.

Started by ``up`` for each wanted study and started again when it dies; it goes on at the round where it stood.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from consilium_server import registry
from consilium_server.commands.up import settings
from consilium_server.federation import Home
from consilium_server.state import study_folder
from consilium_server.state.checkpoint import Checkpoint, CheckpointFile
from consilium_server.study.asking import Asking
from consilium_server.study.convening import NotOpened
from consilium_server.study.conversation import Conversation, Halted
from consilium_server.study.figures import Figures, length, noised_weight
from consilium_server.study.optimizer import ServerOptimizer
from consilium_server.study.recruitment import Recruitment
from consilium_server.study.secure_sum import Asked, Contribution, Summation, counted
from consilium_server.superlink.control import node_names
from consilium_server.transport.exchange import Answer as Arrival
from consilium_server.transport.exchange import open_grid
from consilium_shared.averaging import averaged
from consilium_shared.canonical import digest
from consilium_shared.errors import ConsiliumError, PeerError, TransportError
from consilium_shared.models import start
from consilium_shared.models.vector import pack, trained, width, with_trained
from consilium_shared.process import logs
from consilium_shared.process.process_lock import LockHeld, ProcessLock
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import Close, Closing, Evaluate, Payload, Train, Update
from consilium_shared.protocol.summand import Opened
from consilium_shared.secagg.handshake import Encapsulated
from consilium_shared.secagg.terms import Advert, least_sites

log = logging.getLogger("consilium.study")

AGAIN = 75
"""Exit status: the transport failed, start again and resume (EX_TEMPFAIL of sysexits.h)."""
EVALUATION_ATTEMPTS = 2
"""At the sum of counts on the last model; without it the model is published unevaluated."""


class StudyRun:
    """A study under way. Everything it must not lose is in its folder; the rest is found out again."""

    def __init__(self, talk: Conversation) -> None:
        self.talk = talk
        self.folder, self.home, self.study = talk.folder, talk.home, talk.study
        self.recruitment = Recruitment(talk)
        self.asking = Asking(talk, self.recruitment)
        self.figures = Figures(self.study, least_sites(self.study.aggregation, len(talk.roster.members)))
        self.optimizer = ServerOptimizer.from_study(self.study.aggregation.optimizer)
        self.checkpoints = CheckpointFile(self.folder.root)
        found = self.checkpoints.read(self.study.digest)
        if found is None:
            found = Checkpoint(self.study.digest, 0, start.of(self.study, self.folder.start()), {}, {})
        else:
            self.optimizer.restore(found.optimizer)
        self.point = found
        self.sums = Summation(self.asking, width(self.study))
        self.packed = pack(found.model, self.study)
        """The model of ``point`` as it is sent: packed once, asked for in evaluation and in the next round."""

    def run(self) -> None:
        """From the checkpoint to the registry; raises Halted or ConsiliumError."""
        # Before round 1 everybody is waited for; after a restart those who took part in the last round.
        awaited = frozenset(self.point.record.get("participants", self.recruitment.attendance.standing))
        if self.point.record and not self._has_record(self.point.round):
            self.recruitment.gather(awaited)
            self._close(self.point)
        while self.point.round < self.study.training.rounds:
            if self.point.round:  # who refuses now is out for the next round, and was not "since before round 1"
                self.recruitment.attendance.begin(self.point.round + 1)
            self.recruitment.gather(awaited)
            awaited = frozenset()
            self._check_moved()
            self._train(self.point.round + 1)
            self._close(self.point)
        model = registry.find(self.home, self.study, self.packed) or self._end()
        self.folder.event("published", folder=str(model.folder))
        self.folder.set_state("finished")

    def _check_moved(self) -> None:
        """Raises Halted where the next round would begin with a model that the sites have seen, without privacy.

        No site adds the same numbers to a second sum, which over other sites would show whose are whose.
        """
        record = self.point.record
        if record and record["model_before"] == record["model_after"] and self.study.privacy.mode == "none":
            why = record["implausible"] or "the sites' updates have left the model as it was"
            raise Halted(f"round {self.point.round}: {why}; without privacy no second round begins with the same model")

    def _train(self, number: int) -> None:
        model, attendance = self.packed, self.recruitment.attendance
        attendance.begin(number)
        recorded = self.folder.recorded(number - 1, self.talk.coordinator) if number > 1 else None

        def request(attempt: int, adverts: dict[str, Advert], encapsulated: dict[str, Encapsulated]) -> Train:
            keys: dict[str, Any] = {"attempt": attempt, "adverts": adverts, "encapsulated": encapsulated}
            return Train(**self.talk.common, **keys, round=number, payload=Payload.of(model), recorded=recorded)

        def check(answer: Contribution) -> None:
            if isinstance(answer, Update):
                self.talk.countersignature(answer, recorded)

        began = time.monotonic()
        awaited = frozenset(self.point.record.get("participants", self.recruitment.attendance.standing))
        try:
            together = (
                frozenset(self.point.record.get("participants", ())) if self.study.aggregation.same_sites else None
            )
            asked = Asked("training", number, model, request, check, together=together or None)
            summed = self.sums.run(asked, awaited)
        except NotOpened as error:
            raise Halted(f"round {number}: {error}; {self.recruitment.too_few()}") from error
        updates = {site: (answer, sha256) for site, (answer, sha256) in sorted(summed.answers.items())}
        opened, stepped, moved = summed.opened, self.point.model, 0.0
        if opened.implausible is None:
            began_with = trained(self.point.model, self.study)
            part = self.optimizer.step(began_with, opened.mean)
            moved = length(part - began_with)
            stepped = with_trained(self.point.model, part, self.study)
        else:
            self.folder.event("implausible", round=number, why=opened.implausible)
        average, decay = None, self.study.aggregation.weight_average
        if decay:
            average = averaged(self.point.average, trained(stepped, self.study), decay, number)
            # What is counted on, signed and published from here on; but no model is changed by an implausible sum.
            if number == self.study.training.rounds and opened.implausible is None:
                stepped = with_trained(stepped, average.astype(np.float32), self.study)
        after = pack(stepped, self.study)
        signatures = {site: getattr(answer, "countersignature", None) for site, (answer, _) in updates.items()}
        attendance.took_part(updates)
        away, refused = attendance.absent(updates)
        remarks = attendance.remarks(updates)
        record = {
            "study": self.study.digest,
            "federation": self.talk.roster.federation,
            "roster": self.talk.roster.digest,
            "round": number,
            "model_before": digest(model),
            "model_after": digest(after),
            "participants": list(updates),
            "away": away,
            "refused": refused,
            **({"remarks": remarks} if remarks else {}),
            "epsilon": {site: answer.epsilon for site, (answer, _) in updates.items()},
            "heads": {site: answer.head.model_dump(mode="json") for site, (answer, _) in updates.items()},
            "previous": recorded.record if recorded is not None else None,
            "answers": {site: sha256 for site, (_, sha256) in updates.items()},
            "countersigned": {site: signature for site, signature in signatures.items() if signature is not None},
            "opened": summed.record,
            "implausible": opened.implausible,
            "weight": noised_weight(self.study, opened),
            "update_norm": None if opened.norm is None else float(f"{opened.norm:.6g}"),
            "step_norm": moved,
            "seconds": round(time.monotonic() - began, 3),
        }
        record |= self._metrics(opened, number - 1, "metrics_before", record)
        if self.study.schema_version > 1:
            record["protocol"] = self.study.schema_version
        self.point = Checkpoint(self.study.digest, number, stepped, self.optimizer.state(), record, average)
        self.packed = after
        self.checkpoints.write(self.point)

    def _close(self, point: Checkpoint) -> None:
        """Evaluate after the last round, sign the record, tell whoever watches."""
        found: dict[str, Any] = {"metrics": None}
        if point.round == self.study.training.rounds and point.round in self.study.evaluated_rounds:
            found = self._evaluate(point)
        self.recruitment.attendance.begin(point.round)
        remarks = self.recruitment.attendance.remarks(point.record["participants"])
        record = {**point.record, **found, **({"remarks": remarks} if remarks else {})}
        self.folder.write_record(record, self.talk.coordinator)
        about = {key: record.get(key) for key in ("seconds", "away", "refused", "epsilon", "update_norm")}
        self.folder.event("closed", round=point.round, **about)
        log.info("round %d closed with %d sites", point.round, len(record["participants"]))

    def _end(self) -> registry.Model:
        """Show the last record to everybody who took part, for at most ``round_timeout``; then publish the model."""
        number, records = self.point.round, self.folder.records(self.talk.coordinator)
        sites = {site for record in records for site in record["participants"]}
        recorded = self.folder.recorded(number, self.talk.coordinator)
        header = self.talk.encode(Close(**self.talk.common, recorded=recorded))
        missing = tuple(sorted(sites - set(self.folder.closings(self.talk.roster))))
        question = self.asking.question(number, "closing", missing, 0)

        def accept(answer: messages.Answer, arrival: Arrival) -> None:
            if not isinstance(answer, Closing) or answer.round != number:
                raise PeerError("not an answer to this question")
            self.talk.countersignature(answer, recorded)
            self.folder.keep_closing(answer.site, arrival.header)

        self.asking.ask(question, number, dict.fromkeys(missing, (header, b"")), 0, accept)
        closings = {site: closing for site, (_, closing) in self.folder.closings(self.talk.roster).items()}
        return registry.publish(self.home, self.study, self.talk.roster, self.packed, records, closings)

    def _evaluate(self, point: Checkpoint) -> dict[str, Any]:
        """Fields of the last round's record about the model that it gave."""
        model, number = self.packed, point.round

        def request(attempt: int, adverts: dict[str, Advert], encapsulated: dict[str, Encapsulated]) -> Evaluate:
            keys: dict[str, Any] = {"attempt": attempt, "adverts": adverts, "encapsulated": encapsulated}
            return Evaluate(**self.talk.common, **keys, round=number, payload=Payload.of(model))

        together = None
        if self.study.aggregation.same_sites:  # those whose counts were added up before, and no others
            least = least_sites(self.study.aggregation, len(self.talk.roster.members))
            records = [*self.folder.records(self.talk.coordinator), point.record]
            together = counted(self.study, records, least) or None
        try:
            asked = Asked("evaluation", number, model, request, lambda _: None, EVALUATION_ATTEMPTS, together)
            summed = self.sums.run(asked, frozenset(point.record["participants"]))
        except NotOpened as error:
            log.warning("the last model is not evaluated: %s", error)
            return {"metrics": None}
        spent = {site: answer.epsilon for site, (answer, _) in summed.answers.items()}
        known = set(summed.answers) <= set(point.record["participants"])
        return {
            **self._metrics(summed.opened, number, "metrics", point.record if known else None),
            "epsilon": {**point.record["epsilon"], **{s: e for s, e in spent.items() if s in point.record["epsilon"]}},
            "counts": {site: sha256 for site, (_, sha256) in sorted(summed.answers.items())},
            "opened_counts": summed.record,
        }

    def _metrics(self, opened: Opened, number: int, key: str, training: dict[str, Any] | None) -> dict[str, Any]:
        """Metrics that a record has of the model after a round, by that key, or why there are none."""
        found, why = self.figures.of(opened, training)
        if why is not None:
            self.folder.event("no_metrics", round=number, why=why)
        if found is not None:
            self.folder.event("evaluated", round=number, metrics=found)
        return {key: found, f"no_{key}": why}

    def _has_record(self, number: int) -> bool:
        return self.folder.record_file(number).exists()


def conduct(home: Home, name: str) -> int:
    """Run one study to its end; returns the exit status (0: nothing more to do, ``AGAIN``: start again)."""
    folder = study_folder.folder(home, name)
    folder.study()
    with ProcessLock(folder.root / "lock", f"study {name} runs already"):
        if folder.state()[0] not in ("wanted", "running"):
            return 0  # stopped between up's look and now
        link = settings(home)
        try:
            folder.set_state("running")
            with open_grid(link, folder.root / "run") as grid:
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
    parser = argparse.ArgumentParser(prog="consilium_server.study", description="Conduct one study.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--study", required=True)
    options = parser.parse_args(arguments)
    os.umask(0o077)
    logs.configure()
    home = Home(options.home)
    try:
        return conduct(home, options.study)
    except (LockHeld, TransportError) as error:  # who runs it, runs it: its state is not ours to set
        log.warning("%s", error)
        return AGAIN
    except ConsiliumError as error:
        log.error("%s", error)
        with contextlib.suppress(ConsiliumError):
            study_folder.folder(home, options.study).set_state("failed", str(error))
        return 0
