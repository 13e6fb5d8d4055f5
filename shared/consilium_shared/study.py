"""The study contract: what is trained, on what, at which privacy cost. Data, never a program.

Its digest is what a hospital approves and what every message of the study carries. How contracts of older and newer
releases are read, and how to add a key: ``schema.py``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from consilium_shared import limits, private_sums, task
from consilium_shared.architecture import SEED_LIMIT, Architecture
from consilium_shared.canonical import canonical_bytes, digest
from consilium_shared.config import Strict
from consilium_shared.errors import PeerError
from consilium_shared.evaluation import Evaluation
from consilium_shared.fields import Column as Column
from consilium_shared.fields import Duration as Duration
from consilium_shared.fields import Fraction as Fraction
from consilium_shared.fields import Name as Name
from consilium_shared.fields import Positive as Positive
from consilium_shared.fields import seconds as seconds
from consilium_shared.inputs import AssetData
from consilium_shared.learning_rate import Schedule
from consilium_shared.printable import printable
from consilium_shared.private_sums import PrivateSums
from consilium_shared.schema import SCHEMA, Since, check_known, later_keys, written_out
from consilium_shared.task import TaskName

ThreatModel = Literal["malicious-server", "honest-but-curious"]


class LocalOptimizer(Strict):
    """The optimizer of a site's private steps."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0, le=1000)]
    momentum: Fraction = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decay of the weights: of sgd and adam in the gradient, of adamw beside it (Loshchilov & Hutter 2019)."""
    l1: Annotated[float, Field(ge=0, le=1000), Since(2)] = 0.0
    """Weight of the L1 norm: after each step every weight goes ``lr`` times this much towards 0, and not beyond. It
    comes after the noise and reads no patient's data."""
    schedule: Annotated[Schedule | None, Since(2)] = None


class AdaptiveClipping(Strict):
    """A clipping norm that each site moves after each step, by a noised count (Andrew et al. 2021, equation 2)."""

    quantile: Annotated[float, Field(ge=0.05, le=0.95)] = 0.5
    """Fraction of patients whose gradient is to be shorter than the norm."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Rate of change in a step: the norm is multiplied by exp(-rate · (fraction - quantile))."""


class Training(Strict):
    """Training of one round at a site."""

    rounds: Annotated[int, Field(ge=1, le=limits.ROUNDS)]
    steps_per_round: Annotated[int, Field(ge=1, le=limits.STEPS_PER_ROUND)]
    expected_batch: Annotated[int, Field(ge=1, le=1_000_000)]
    """Expected number of patients in a Poisson-sampled step: of a site, or with ``privacy.sums`` of all together."""
    records_per_patient: Annotated[int, Field(ge=1, le=limits.RECORDS_PER_PATIENT)] = 1
    """Most records of a drawn patient in a step: their mean is that patient's gradient. 1 draws a single one."""
    optimizer: LocalOptimizer
    proximal: Annotated[float, Field(ge=0)] = 0.0
    """FedProx mu (Li et al. 2020, eq. 2): pulls local weights towards the round's global ones; 0 is FedAvg."""
    augment: Name = "none"
    """Augmentation of inputs, of those that the task has."""
    augment_multiplicity: Annotated[int, Field(ge=1, le=limits.AUGMENT_MULTIPLICITY)] = 1
    """Augmented copies of each drawn record in a step; the mean of their gradients is the record's, before clipping."""
    adaptive_clipping: AdaptiveClipping | None = None
    """Lets the clipping norm follow the gradients, from ``privacy.clipping_norm`` on; the count's noise is in the ε."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of sites' passes through the model. Weights, losses, norms and sums are float32 or float64 in any
    case: a clipped gradient's norm is measured on what is added."""
    class_weights: tuple[Positive, ...] | None = None
    """Constant loss weight per class. Constants of the study, so each patient's loss stays their own."""
    class_sampling: Annotated[tuple[Positive, ...] | None, Since(2)] = None
    """Rates per class, relative to each other, at which patients are drawn; a patient of several has the largest. The
    largest of all is ``expected_batch`` over the patients; everybody is charged for it, also who is drawn less."""
    focal: Annotated[Annotated[float, Field(ge=1, le=5)] | None, Since(2)] = None
    """Exponent of the focal loss (Lin et al. 2017): a record counts (1 - p)^focal times, p what its class was given."""
    seed: Annotated[int, Field(ge=0, le=SEED_LIMIT)] | None = None
    """Makes sites' sampling repeatable. Only without privacy: a known seed would undo the noise."""

    @model_validator(mode="after")
    def _not_too_long(self) -> Training:
        if self.rounds * self.steps_per_round > limits.STEPS:
            raise ValueError(f"rounds times steps_per_round is more than {limits.STEPS} steps in all")
        return self

    @model_validator(mode="after")
    def _copies(self) -> Training:
        if self.augment_multiplicity > 1 and self.augment == "none":
            raise ValueError("augment_multiplicity takes an augmentation: copies that are alike teach nothing")
        if self.records_per_patient * self.augment_multiplicity > limits.RECORDS_PER_PATIENT:
            raise ValueError(
                f"records_per_patient times augment_multiplicity is more than {limits.RECORDS_PER_PATIENT}: "
                "the gradients of a patient are in memory together"
            )
        return self


class Privacy(Strict):
    """Differential privacy of one site's contribution over the whole study; ``privacy/plan.py`` states it."""

    mode: Literal["dp", "none"] = "dp"
    unit: Literal["patient"] = "patient"
    epsilon: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    clipping_norm: Positive | None = None
    noise_multiplier: Literal["auto"] | Positive = "auto"
    count_noise: Positive = 10.0
    """Standard deviation, in patients, of the noise on a site's number of patients; with privacy no other form of it
    is used outside the site (sampling rate, weight). Without privacy, or with ``sums``, it is not used."""
    sums: Annotated[PrivateSums | None, Since(2)] = None
    """Every opened sum is one private step of all sites together; None: a round is steps of each site's own."""

    @model_validator(mode="after")
    def _complete(self) -> Privacy:
        given = [self.epsilon, self.delta, self.clipping_norm]
        if self.mode == "dp" and None in given:
            raise ValueError("privacy needs epsilon, delta and clipping_norm (or, said openly, mode: none)")
        if self.mode == "none" and (given != [None] * 3 or self.noise_multiplier != "auto"):
            raise ValueError("mode: none has no epsilon, delta, clipping_norm or noise_multiplier")
        return self

    @model_validator(mode="after")
    def _within_reason(self) -> Privacy:
        little, much = "less noise is no privacy", "more noise leaves nothing else"
        noise = (limits.SMALL_NOISE, limits.MOST_NOISE)
        for name, (least, most), too_little, too_much in (
            ("delta", (limits.LEAST_DELTA, 1.0), "no generator of random numbers keeps such a promise", ""),
            ("noise_multiplier", noise, little, much),
            ("count_noise", noise, little, much),
            (
                "clipping_norm",
                (limits.LEAST_CLIPPING_NORM, limits.MOST_CLIPPING_NORM),
                "nothing is left of a gradient",
                "no gradient is clipped and the noise is beyond all measure",
            ),
        ):
            value = getattr(self, name)
            if isinstance(value, float) and not least <= value <= most:
                why = too_little if value < least else too_much
                raise ValueError(f"{name} is between {least:g} and {most:g}, not {value:g}: {why}")
        return self


class ServerOptimizer(Strict):
    """The coordinator's step on the averaged update (Reddi et al. 2021, algorithm 2; Hsu et al. 2019 for momentum)."""

    name: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = "fedavg"
    lr: Annotated[float, Field(gt=0, le=1000)] = 1.0
    momentum: Fraction = 0.9
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    tau: Positive = 1e-3
    step_limit: Annotated[Positive | None, Since(2, fresh=2.0)] = None
    """Longest step of fedadam and fedyogi, in lengths of the running mean of the updates; None holds none. A site adds
    at most its share of ``norm_bound`` to that length, so that this is what holds it. Steps of fedavg and fedavgm are
    sums of the updates, times ``lr``: there a site's part is held by ``norm_bound`` as it is."""


class Aggregation(Strict):
    """Aggregation of updates into one model: which sums are opened, and what one site may add to them."""

    optimizer: ServerOptimizer = ServerOptimizer()
    weight_average: Fraction = 0.0
    """Decay of the average over rounds that the study's last model is; 0 takes the last round's as it is."""
    weighting: Literal["patients", "equal"] = "patients"
    max_weight: Annotated[int, Field(ge=1, le=limits.WEIGHT)] = 65_536
    """Largest weight of one site; a site with more patients counts as so many. The smaller, the finer the encoding."""
    min_sites: Annotated[int, Field(ge=2, le=limits.SITES)] = 2
    """Fewest sites whose sum is opened."""
    threat_model: ThreatModel = "malicious-server"
    """Threat model of a coordinator; it decides how many sites it takes to open a sum (``secagg.terms.threshold``)."""
    corrupt_sites: Annotated[
        Literal["third"] | Annotated[int, Field(ge=0, le=limits.SITES - 2)] | None, Since(2, fresh="third")
    ] = None
    """Number of sites of the study's roster that may help a ``malicious-server``, or ``third`` for fewer than a third
    of them. None, in older contracts, means fewer than a third of a round's cohort, whoever is in it."""
    same_sites: Annotated[bool, Since(2)] = False
    """Demand that every round sums up the same sites, those of the first one: else two rounds with other sites show
    what the difference had, which without privacy nothing bounds."""
    norm_bound: Annotated[float, Field(gt=0, le=limits.NORM_BOUND)] = 100.0
    """Largest L2 norm of a site's update; a larger one is scaled down to it."""
    coordinate_bound: Annotated[float, Field(gt=0, le=limits.NORM_BOUND)] = 8.0
    """Largest absolute coordinate of a site's update; a larger one is cut off. The smaller, the finer the encoding."""
    ring_bits: Literal[16, 32] = 32
    """Width of the integers in which updates are added up: 32 sends what float32 would, 16 half of it, coarser."""
    round_timeout: Duration = "30m"
    """Longest wait of a round for a site that is away, once there are enough others."""

    @model_validator(mode="after")
    def _encodable(self) -> Aggregation:
        if self.ring_bits == 16 and self.weighting != "equal":
            raise ValueError("ring_bits: 16 is too coarse for weights; it takes weighting: equal")
        return self


def _of_its_task(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    """A part of the contract as its class of the study's task reads it."""
    name = info.data.get("task")
    if name is None:  # which is an error of its own
        return (AssetData if info.field_name == "data" else Architecture).model_construct()
    kind: type[BaseModel] = task.get(name).data
    if info.field_name == "model":
        models = task.kinds(name)
        model = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
        if not isinstance(model, str) or model not in models:
            raise ValueError(f"task {name} takes one of the models {', '.join(sorted(models))}")
        kind = models[model].options
    return handler(kind.model_validate(value, context=info.context))


def _brought(study: Study) -> tuple[tuple[int, str], ...]:
    """Schemas that brought the task and the model, and what they brought."""
    return (task.of(study).since, f"task {study.task}"), (task.kind(study).since, f"model {study.model.name}")


_AS_GIVEN = {"as given": True}
"""Validation context of a received contract: nothing is added to it."""


class Study(Strict):
    """A whole study. ``digest`` identifies it everywhere.

    One that is read from a person's file, or made of parts, is written out in full under its schema, the newest by
    default; a received one (``from_contract``) stays exactly as it was written.
    """

    study: Name
    version: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    task: TaskName
    model: Annotated[SerializeAsAny[Architecture], WrapValidator(_of_its_task)]
    data: Annotated[SerializeAsAny[AssetData], WrapValidator(_of_its_task)]
    training: Training
    privacy: Privacy
    aggregation: Aggregation = Aggregation()
    evaluation: Evaluation = Evaluation()
    schema_version: Annotated[int, Field(ge=1, le=SCHEMA), Since(2, fresh=SCHEMA)] = 1
    """Contract schema's number; absent for 1. A file that says 1 gives a study that release 0.1 takes part in."""

    @model_validator(mode="wrap")
    @classmethod
    def _written_out(cls, value: Any, handler: ModelWrapValidatorHandler[Study], info: ValidationInfo) -> Study:
        study = handler(value)
        if info.context is _AS_GIVEN:
            return study
        schema = study.schema_version if "schema_version" in study.model_fields_set else SCHEMA
        for since, what in _brought(study):
            if schema < since:
                raise ValueError(f"schema_version: {schema} has no {what}, which came with {since}")
        later = [f"{key} (schema {number})" for key, number in later_keys(study, schema) if key != "schema_version"]
        if later:
            raise ValueError(f"schema_version: {schema} has no {', '.join(later)}")
        return handler(written_out(study, schema))

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        own, metrics = task.of(self), self.evaluation.metrics
        if self.model.trainable == "lora" and not task.kind(self).low_rank:
            able = ", ".join(sorted(name for name, kind in task.kinds(self.task).items() if kind.low_rank))
            raise ValueError(f"trainable: lora is for {able}; for {self.model.name} take head")
        unknown = sorted(set(metrics) - set(own.metrics))
        if unknown:
            raise ValueError(f"evaluation.metrics: task {self.task} has {', '.join(own.metrics)}, not {unknown[0]}")
        if self.training.augment not in ("none", *own.augmentations):
            known = ", ".join(("none", *own.augmentations))
            raise ValueError(f"training.augment: task {self.task} has {known}, not {self.training.augment}")
        for key in ("focal", "class_sampling"):
            if getattr(self.training, key) is not None and not own.one_class:
                raise ValueError(f"training.{key} is for classifiers of one class a record")
        if self.training.optimizer.name == "adamw" and self.schema_version < 2:
            raise ValueError("training.optimizer.name: adamw came with schema 2")
        own.check(self)
        self.model.check(self)
        private_sums.check(self)
        if self.training.seed is not None and self.privacy.mode == "dp":
            raise ValueError("training.seed is for studies without privacy: a known seed would undo the noise")
        if self.training.adaptive_clipping is not None and self.privacy.mode == "none":
            raise ValueError("training.adaptive_clipping is for studies with privacy: without, nothing is clipped")
        limit = self.privacy.epsilon
        if self.evaluation.epsilon is not None and (limit is None or self.evaluation.epsilon >= limit):
            raise ValueError("evaluation.epsilon is a part of privacy.epsilon, and without privacy there is none")
        chosen = self.training.rounds > 1 and bool(self.evaluated_rounds) and not self.aggregation.weight_average
        if self.evaluation.keep is not None and not chosen:
            raise ValueError(
                "evaluation.keep chooses between rounds by their counts: it takes two rounds or more, with privacy an "
                "evaluation.epsilon, and no aggregation.weight_average"
            )
        return self

    @property
    def evaluated_rounds(self) -> tuple[int, ...]:
        """The rounds after which sites send evaluation counts: none where those would be neither noised nor charged."""
        if self.privacy.mode == "dp" and self.evaluation.epsilon is None:
            return ()
        last, every = self.training.rounds, self.evaluation.every
        if self.evaluation.keep is not None:  # whichever is kept, it is evaluated before the last counts
            return (*sorted(range(last - 1, 0, -every)), last)
        return tuple(sorted({*range(every, last + 1, every), last}))

    def may_end(self, number: int) -> bool:
        """True where round ``number`` may be the last: with ``evaluation.keep.patience`` also an earlier one."""
        keep = self.evaluation.keep
        early = keep is not None and keep.patience is not None and self.evaluated_rounds[0] < number
        return number == self.training.rounds or (early and number < self.training.rounds)

    @property
    def contract(self) -> dict[str, Any]:
        """The study with exactly the keys that it was written with, as canonical JSON carries it."""
        contract: dict[str, Any] = self.model_dump(mode="json", exclude_unset=True)
        return contract

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical contract, 64 hex digits."""
        return digest(canonical_bytes(self.contract))

    @classmethod
    def from_contract(cls, contract: Any) -> Study:
        """The study of a received contract.

        >>> contract = {
        ...     "study": "example",
        ...     "task": "tabular-classification",
        ...     "model": {"name": "logistic"},
        ...     "data": {
        ...         "asset": "stays",
        ...         "label": {"column": "ill", "classes": ["no", "yes"]},
        ...         "features": [{"name": "age"}],
        ...     },
        ...     "training": {"rounds": 4, "steps_per_round": 5, "expected_batch": 50, "optimizer": {"lr": 0.1}},
        ...     "privacy": {"epsilon": 2.0, "delta": 0.0001, "clipping_norm": 1.0},
        ... }
        >>> written_out = Study.model_validate(contract).contract
        >>> Study.from_contract(written_out).digest == digest(canonical_bytes(written_out))
        True
        >>> Study.from_contract({**written_out, "surgery": True})
        Traceback (most recent call last):
        consilium_shared.errors.PeerError: study: surgery: Extra inputs are not permitted

        Raises:
            VersionError: of a schema that came after this release.
            PeerError: not a valid contract, a key that its schema lacks, or a value that is not written as this
                program writes it (its digest would not be its content's).
        """
        check_known(contract)
        try:
            study = cls.model_validate(contract, context=_AS_GIVEN)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PeerError(printable(f"study: {where}: {first['msg']}")) from error
        for since, what in _brought(study):
            if study.schema_version < since:
                raise PeerError(f"study: {what} came with schema {since}")
        for key, number in later_keys(study, study.schema_version):
            raise PeerError(f"study: {key} is a key of schema {number}, the contract is of {study.schema_version}")
        try:
            private_sums.check_contract(study)
        except ValueError as error:
            raise PeerError(f"study: {error}") from error
        if canonical_bytes(study.contract) != canonical_bytes(contract):
            raise PeerError("study: a value of the contract is not written as it is read")
        return study
