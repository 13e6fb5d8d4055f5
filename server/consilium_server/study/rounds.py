"""Rounds of a study, from its checkpoint to the registry: recruit, sum, step, record, and in the end publish."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from consilium_server import registry
from consilium_server.state.checkpoint import Checkpoint, CheckpointFile
from consilium_server.study.context import Halted, StudyContext
from consilium_server.study.convening import NotOpened
from consilium_server.study.exchanges import Exchange, Exchanges
from consilium_server.study.figures import Figures, length, noised_weight
from consilium_server.study.optimizer import ServerOptimizer
from consilium_server.study.recruitment import Recruitment
from consilium_server.study.secure_sum import Contribution, Summation, SumResult, SumSpec, counted
from consilium_server.transport.exchange import Answer as Arrival
from consilium_shared import keeping
from consilium_shared.averaging import averaged
from consilium_shared.errors import PeerError
from consilium_shared.keeping import Kept
from consilium_shared.models import start
from consilium_shared.models.vector import Vector, pack, packed, packed_digest, trained, width, with_trained
from consilium_shared.privacy.measured_noise import MeasuredNoise, doubt, empty_coordinates
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import Close, Closing, Evaluate, Payload, Recorded, Train, Update
from consilium_shared.protocol.summand import Opened
from consilium_shared.secagg.handshake import Encapsulated
from consilium_shared.secagg.terms import Advert, fewest_sites
from consilium_shared.transport.upload import Upload

log = logging.getLogger("consilium.study")


def _published(checkpoint: Checkpoint) -> npt.NDArray[np.float32]:
    """Model ``[d]`` that is published where no further round comes."""
    return checkpoint.model if checkpoint.kept is None else checkpoint.kept


EVALUATION_ATTEMPTS = 2
"""Attempts at the sum of counts on the last model; where none is opened, the model is published unevaluated."""


class StudyRun:
    """A study under way. Everything that it must not lose is in its folder; it asks the sites for the rest again."""

    def __init__(self, context: StudyContext) -> None:
        self.context = context
        self.folder, self.home, self.study = context.folder, context.home, context.study
        self.recruitment = Recruitment(context)
        self.exchanges = Exchanges(context, self.recruitment)
        self.figures = Figures(self.study, fewest_sites(self.study, context.roster.members))
        self.optimizer = ServerOptimizer.from_study(self.study.aggregation.optimizer)
        self.checkpoints = CheckpointFile(self.folder.root)
        found = self.checkpoints.read(self.study.digest)
        if found is None:
            found = Checkpoint(self.study.digest, 0, start.of(self.study, self.folder.start()), {}, {})
        else:
            self.optimizer.restore(found.optimizer)
        self.checkpoint = found
        self.sums = Summation(self.exchanges, width(self.study))

    def run(self) -> None:
        """Run the study from its checkpoint to the registry; raises Halted or ConsiliumError."""
        # Before round 1 it waits for every site; after a restart for those that took part in the last round.
        awaited = frozenset(self.checkpoint.record.get("participants", self.recruitment.attendance.standing))
        # A crash between checkpoint and record: the round is over, and its record is signed now.
        if self.checkpoint.record and not self._has_record(self.checkpoint.round):
            self.recruitment.gather(awaited)
            self._close(self.checkpoint)
        self._check_noise()
        while not self._over(self.checkpoint):
            if self.checkpoint.round:  # who refuses now is out for the next round, and was not "since before round 1"
                self.recruitment.attendance.begin(self.checkpoint.round + 1)
            self.recruitment.gather(awaited)
            awaited = frozenset()
            self._check_moved()
            self._train(self.checkpoint.round + 1)
            self._close(self.checkpoint)
            self._check_noise()
        # All rounds are recorded: publish, unless a crash came after that.
        sha256 = packed_digest(_published(self.checkpoint), self.study)
        model = registry.find(self.home, self.study, sha256) or self._end()
        self.folder.event("published", folder=str(model.folder))
        self.folder.set_state("finished")

    def _check_moved(self) -> None:
        """Raises Halted where the next round would begin with a model that the sites have seen, without privacy.

        No site adds the same numbers to a second sum, which over other sites would show whose are whose.
        """
        record = self.checkpoint.record
        if record and record["model_before"] == record["model_after"] and self.study.privacy.mode == "none":
            why = record["implausible"] or "the sites' updates have left the model as it was"
            raise Halted(
                f"round {self.checkpoint.round}: {why}; without privacy no second round begins with the same model"
            )

    def _check_noise(self) -> None:
        """Raises Halted where the sums opened so far have other noise in them than the contract's."""
        records = self.folder.records(self.context.coordinator) if empty_coordinates(self.study) else ()
        why = doubt(MeasuredNoise.model_validate(each["noise"]) for each in records if each.get("noise") is not None)
        if why is not None:
            raise Halted(f"round {self.checkpoint.round}: {why}")

    def _train(self, number: int) -> None:
        """One round: the sum of the updates, the optimizer's step, the record, the checkpoint."""
        began, before = time.monotonic(), self.checkpoint
        self.recruitment.attendance.begin(number)
        recorded = self.folder.recorded(number - 1, self.context.coordinator) if number > 1 else None
        summed = self._sum(number, recorded)
        opened = summed.opened
        if opened.implausible is not None:
            self.folder.event("implausible", round=number, why=opened.implausible)
        stepped, average, moved = self._step(number, opened)
        record = self._record(number, recorded, summed) | {
            "model_before": summed.model,
            "model_after": packed_digest(stepped, self.study),
            "step_norm": moved,
            "seconds": round(time.monotonic() - began, 3),
        }
        record |= self._metrics(opened, number - 1, "metrics_before", record, last=False)
        kept = self._keep(before, record)
        self.checkpoint = Checkpoint(self.study.digest, number, stepped, self.optimizer.state(), record, average, kept)
        self.checkpoints.write(self.checkpoint)

    def _keep(self, before: Checkpoint, record: dict[str, Any]) -> npt.NDArray[np.float32] | None:
        """The best model so far ``[d]``; ``record``, of the round after ``before``, is told which one that is."""
        rule, number = self.study.evaluation.keep, before.round
        if rule is None:
            return None
        best = Kept.model_validate(before.record["kept"]) if before.record.get("kept") else None
        if number in self.study.evaluated_rounds:
            best = keeping.kept(rule, best, number, record["model_before"], record["metrics_before"])
        record["kept"] = None if best is None else best.model_dump(mode="json")
        return before.model if best is not None and best.round == number else before.kept

    def _over(self, checkpoint: Checkpoint) -> bool:
        """True where no further round comes."""
        found = checkpoint.record.get("kept")
        best = Kept.model_validate(found) if found else None
        return checkpoint.round > 0 and keeping.ends(self.study, checkpoint.round, best)

    def _sum(self, number: int, recorded: Recorded | None) -> SumResult:
        """The opened sum of the round's updates. Raises Halted where too few sites are left for one."""
        model, described = self._packed(self.checkpoint.model)

        def request(attempt: int, adverts: dict[str, Advert], encapsulated: dict[str, Encapsulated]) -> Train:
            return Train(
                **self.context.common,
                round=number,
                attempt=attempt,
                adverts=adverts,
                encapsulated=encapsulated,
                payload=described,
                recorded=recorded,
            )

        def check(answer: Contribution) -> None:
            if isinstance(answer, Update):
                self.context.countersignature(answer, recorded)

        before = self.checkpoint.record.get("participants")
        together = frozenset(before or ()) if self.study.aggregation.same_sites else frozenset()
        spec = SumSpec("training", number, model, described.sha256, request, check, together=together or None)
        with model:
            try:
                return self.sums.run(spec, frozenset(before or self.recruitment.attendance.standing))
            except NotOpened as error:
                raise Halted(f"round {number}: {error}; {self.recruitment.too_few()}") from error

    def _packed(self, vector: Vector) -> tuple[Upload, Payload]:
        """The bytes of a model in a file, to be sent from there and then closed; and their description."""
        made = Upload(self.folder.root)
        for piece in packed(vector, self.study):
            made.write(piece)
        return made, Payload(sha256=made.sha256, size=made.size)

    def _step(
        self, number: int, opened: Opened
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64] | None, float]:
        """The next model, the average of the models so far, and how far the model moved; an implausible sum moves none.

        Returns:
            Float32 ``[d]``; float64 ``[t]``, or None where the study has no average; the Euclidean length of the step.
        """
        stepped, moved = self.checkpoint.model, 0.0
        if opened.implausible is None:
            before = trained(self.checkpoint.model, self.study)
            part = self.optimizer.step(before, opened.mean)
            moved = length(part - before)
            stepped = with_trained(self.checkpoint.model, part, self.study)
        decay = self.study.aggregation.weight_average
        if not decay:
            return stepped, None, moved
        average = averaged(self.checkpoint.average, trained(stepped, self.study), decay, number)
        # What is counted on, signed and published from here on; but no model is changed by an implausible sum.
        if number == self.study.training.rounds and opened.implausible is None:
            stepped = with_trained(stepped, average.astype(np.float32), self.study)
        return stepped, average, moved

    def _record(self, number: int, recorded: Recorded | None, summed: SumResult) -> dict[str, Any]:
        """Fields of the round's record about the sites and the sum."""
        attendance, opened = self.recruitment.attendance, summed.opened
        updates = dict(sorted(summed.answers.items()))
        signatures = {site: getattr(answer, "countersignature", None) for site, (answer, _) in updates.items()}
        attendance.took_part(updates)
        away, refused = attendance.absent(updates)
        remarks = attendance.remarks(updates)
        record = {
            "study": self.study.digest,
            "federation": self.context.roster.federation,
            "roster": self.context.roster.digest,
            "round": number,
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
            **({} if opened.noise is None else {"noise": opened.noise.model_dump(mode="json")}),
            "update_norm": None if opened.norm is None else float(f"{opened.norm:.6g}"),
        }
        if self.study.schema_version > 1:
            record["protocol"] = self.study.schema_version
        return record

    def _close(self, checkpoint: Checkpoint) -> None:
        """Evaluate after the last round, sign the record, and write the event that people see."""
        found: dict[str, Any] = {"metrics": None}
        if self._over(checkpoint) and self.study.evaluated_rounds:
            found = self._evaluate(checkpoint)
        self.recruitment.attendance.begin(checkpoint.round)
        remarks = self.recruitment.attendance.remarks(checkpoint.record["participants"])
        record = {**checkpoint.record, **found, **({"remarks": remarks} if remarks else {})}
        self.folder.write_record(record, self.context.coordinator)
        about = {key: record.get(key) for key in ("seconds", "away", "refused", "epsilon", "update_norm")}
        self.folder.event("closed", round=checkpoint.round, **about)
        log.info("round %d closed with %d sites", checkpoint.round, len(record["participants"]))

    def _end(self) -> registry.Model:
        """Show the last record to everybody who took part, for at most ``round_timeout``; then publish the model."""
        number, records = self.checkpoint.round, self.folder.records(self.context.coordinator)
        sites = {site for record in records for site in record["participants"]}
        recorded = self.folder.recorded(number, self.context.coordinator)
        header = self.context.encode(Close(**self.context.common, recorded=recorded))
        missing = tuple(sorted(sites - set(self.folder.closings(self.context.roster))))

        def accept(answer: messages.Answer, arrival: Arrival) -> None:
            if not isinstance(answer, Closing) or answer.round != number:
                raise PeerError("not an answer to this question")
            self.context.countersignature(answer, recorded)
            self.folder.keep_closing(answer.site, arrival.header)

        self.exchanges.run(Exchange("closing", number, dict.fromkeys(missing, (header, b"")), accept, minimum=0))
        closings = {site: closing for site, (_, closing) in self.folder.closings(self.context.roster).items()}
        model = pack(_published(self.checkpoint), self.study)
        return registry.publish(self.home, self.study, self.context.roster, model, records, closings)

    def _evaluate(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Fields of the last round's record about the model that is published."""
        number = checkpoint.round
        model, described = self._packed(_published(checkpoint))

        def request(attempt: int, adverts: dict[str, Advert], encapsulated: dict[str, Encapsulated]) -> Evaluate:
            return Evaluate(
                **self.context.common,
                round=number,
                attempt=attempt,
                adverts=adverts,
                encapsulated=encapsulated,
                payload=described,
            )

        together = None
        if self.study.aggregation.same_sites:  # those whose counts were added up before, and no others
            least = fewest_sites(self.study, self.context.roster.members)
            records = [*self.folder.records(self.context.coordinator), checkpoint.record]
            together = counted(self.study, records, least) or None
        try:
            spec = SumSpec(
                "evaluation", number, model, described.sha256, request, lambda _: None, EVALUATION_ATTEMPTS, together
            )
            with model:
                summed = self.sums.run(spec, frozenset(checkpoint.record["participants"]))
        except NotOpened as error:
            log.warning("the last model is not evaluated: %s", error)
            return {"metrics": None}
        spent = {site: answer.epsilon for site, (answer, _) in summed.answers.items()}
        known = set(summed.answers) <= set(checkpoint.record["participants"])
        found = self._metrics(summed.opened, number, "metrics", checkpoint.record if known else None, last=True)
        if found["metrics"] is not None and (recalibration := self._of_kept(checkpoint).get("recalibration")):
            found["metrics"]["recalibration"] = recalibration
        return {
            **found,
            "epsilon": {
                **checkpoint.record["epsilon"],
                **{s: e for s, e in spent.items() if s in checkpoint.record["epsilon"]},
            },
            "counts": {site: sha256 for site, (_, sha256) in sorted(summed.answers.items())},
            "opened_counts": summed.record,
        }

    def _of_kept(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Metrics on the patients for validation of the model that is kept; empty where none is."""
        best = checkpoint.record.get("kept")
        if best is None:
            return {}
        records = [*self.folder.records(self.context.coordinator), checkpoint.record]
        return next((each["metrics_before"] for each in records if each["round"] == best["round"] + 1), None) or {}

    def _metrics(
        self, opened: Opened, number: int, key: str, training: dict[str, Any] | None, *, last: bool
    ) -> dict[str, Any]:
        """Metrics that a record has of the model after a round, by that key, or why there are none."""
        found, why = self.figures.of(opened, training, last=last)
        if why is not None:
            self.folder.event("no_metrics", round=number, why=why)
        if found is not None:
            self.folder.event("evaluated", round=number, metrics=found)
        return {key: found, f"no_{key}": why}

    def _has_record(self, number: int) -> bool:
        return self.folder.record_file(number).exists()
