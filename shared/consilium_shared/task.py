"""Task: all that the system knows of one kind of study, behind one interface.

``consilium_tasks`` has a folder for each. Contract, readers, training, evaluation, audit and pages ask the task of a
study (``of``) and name no task themselves. Which tasks there are is a closed table in code (``consilium_tasks.TASKS``):
a contract can only choose from it. The table is imported when a study is first read, so that this package imports none
of the tasks.

A task's module imports no torch; what computes with tensors is imported where it is called.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator

from consilium_shared.architecture import Architecture
from consilium_shared.errors import ConfigurationError
from consilium_shared.inputs import AssetData, Feature, Image, Label, Missing, Numeric, Series
from consilium_shared.metrics import Counts, Layout
from consilium_shared.prediction import Predictions

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from consilium_shared.answer import Answer
    from consilium_shared.study import Study
    from consilium_shared.suggestion import Asked, Suggestion

    Loss = Callable[..., torch.Tensor]
    """Outputs ``[B, …]`` and targets, each ``[B, …]``, to losses ``[B]``."""
    Measure = Callable[..., torch.Tensor]
    """Outputs ``[B, …]`` and targets, each ``[B, …]``, to what is counted of each record, float64 ``[B, m]``."""


class Examples(NamedTuple):
    """Some records, prepared for a model.

    Attributes:
        inputs: arrays ``[n, …]``, one for each of the model's inputs.
        targets: arrays ``[n, …]`` that the loss holds the model's outputs against.
    """

    inputs: tuple[NDArray[Any], ...]
    targets: tuple[NDArray[Any], ...]


class Augmentation(Protocol):
    """Random moves of records, each by its own draw; targets move with the inputs."""

    def draw(self, count: int, generator: np.random.Generator) -> tuple[NDArray[np.float64], ...]:
        """Moves of so many records, each array ``[count, …]``; zeros are no move at all."""

    def apply(
        self,
        inputs: tuple[torch.Tensor, ...],
        targets: tuple[torch.Tensor, ...],
        moves: tuple[NDArray[np.float64], ...],
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Inputs and targets, each ``[B, …]``, after the moves, each ``[B, …]``; no record sees another's."""


@dataclass(frozen=True)
class Reading:
    """Declaration of what a study reads of a site's asset. Readers (``consilium_client.data``) follow it.

    Attributes:
        kind: of the asset, as in site.yaml.
        targets: columns of the label table: one of classes gives int64 ``[N]``, one of numbers float32 ``[N]``.
        image: of an asset of images; one input ``[N, C, S, S]``.
        series: of an asset of series; one input ``[N, bins, 3 V]``, and statics ``[N, K]`` where there are any.
        features: of a table; one input ``[N, F]``.
        missing: whether a record with a missing value is set aside.
        optional: columns of targets that a record may lack: its target is then -1, or NaN. Where every target is
            optional, a record that lacks all of them is set aside.
    """

    kind: str
    targets: tuple[Label | Numeric, ...]
    image: Image | None = None
    series: Series | None = None
    features: tuple[Feature, ...] = ()
    missing: Missing = "refuse"
    optional: frozenset[str] = frozenset()

    @property
    def columns(self) -> tuple[str, ...]:
        """Study's name of each target's column."""
        return tuple(each.column if isinstance(each, Label) else each.name for each in self.targets)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model's inputs, in order."""
        if self.series is not None:
            return ("series", "statics") if self.series.statics else ("series",)
        return ("record",) if self.image is None else ("image",)


@dataclass(frozen=True)
class ModelKind:
    """One model of a task.

    Attributes:
        options: class of the contract's ``model``.
        builder: ``module:function`` that makes it (``nn.Module``) from a study; imported only then.
        low_rank: whether it has linear or convolutional layers besides the head, for ``trainable: lora``.
        stepwise: whether it waits from step to step of a sequence, so that larger microbatches pay.
        since: contract schema that brought it.
    """

    options: type[Architecture]
    builder: str
    low_rank: bool = True
    stepwise: bool = False
    since: int = 1


class Task(ABC):
    """One task. A folder of ``consilium_tasks`` has a subclass, and an instance of it called ``TASK``.

    Attributes:
        name: in a contract's ``task``.
        since: contract schema that brought it.
        data: class of the contract's ``data``.
        models: kinds of model by name, beside those that every task has (``kinds``).
        metrics: names that ``evaluation.metrics`` may have.
        augmentations: names that ``training.augment`` may have besides ``none``.
        one_class: whether a record has one class, int64 ``[N]``, as its first target.
        explained: metric to what it says, for people; others stand under their own name.
        answers: whether a study is a question, whose weights are no model but its ``answer``.
    """

    name: ClassVar[str]
    since: ClassVar[int]
    data: ClassVar[type[AssetData]]
    models: ClassVar[Mapping[str, ModelKind]]
    metrics: ClassVar[tuple[str, ...]]
    augmentations: ClassVar[tuple[str, ...]] = ()
    one_class: ClassVar[bool] = False
    explained: ClassVar[Mapping[str, str]] = MappingProxyType({})
    answers: ClassVar[bool] = False

    # -- the contract

    @abstractmethod
    def check(self, study: Study) -> None:
        """Check that the parts of a contract fit together, as far as only this task knows.

        Raises:
            ValueError: with what to change in the study's file.
        """

    @abstractmethod
    def reads(self, study: Study) -> Reading:
        """Declaration of what the study reads of a site's asset."""

    # -- records

    @abstractmethod
    def invented(self, study: Study, count: int, draw: np.random.Generator, *, small: bool = False) -> Examples:
        """Invented records in the shape of a study's: nobody's, the same for the same state of ``draw``.

        Canaries, the tests of a machine and of independence, and this project's own tests run on them.

        Args:
            study: the study.
            count: number of records; every kind of target occurs as soon as there are enough of them.
            draw: source of everything random.
            small: short sides, where the number of steps or pixels changes nothing of how a model computes.
        """

    def shapes(self, study: Study) -> tuple[tuple[int, ...], ...]:
        """Shape of one record in each of the model's inputs."""
        return tuple(each.shape[1:] for each in self.invented(study, 1, np.random.default_rng(0)).inputs)

    @abstractmethod
    def groups(self, study: Study, targets: Sequence[NDArray[Any]]) -> dict[str, NDArray[np.bool_]]:
        """Name of a group of records (a class, say) to which of them are in it, bool ``[N]``: for ``data check``."""

    # -- training

    def construct(self, study: Study) -> nn.Module:
        """The study's model, its weights drawn from torch's global generator. ``models.build`` calls it."""
        module, _, function = kinds(self.name)[study.model.name].builder.partition(":")
        model: nn.Module = getattr(import_module(module), function)(study)
        return model

    def prior(self, study: Study) -> tuple[float, ...] | None:
        """Rates of the outputs that the untrained model is to predict; None leaves its last bias as it is drawn."""
        return None

    @abstractmethod
    def loss(self, study: Study, device: torch.device) -> Loss:
        """Loss of each record on its own: outputs and targets to ``[B]``. It never averages over a batch."""

    def augmentation(self, study: Study) -> Augmentation | None:
        """Augmentation that ``training.augment`` asks for; None where it asks for none."""
        return None

    # -- evaluation

    @abstractmethod
    def layout(self, study: Study, *, local: bool = False) -> Layout:
        """Layout of the counts that leave a site; ``local``: everything, exactly, for the site's own eyes."""

    @abstractmethod
    def outputs(self, study: Study) -> tuple[str, ...]:
        """Names of the m numbers that are measured of each record."""

    def output_shape(self, study: Study) -> tuple[int, ...]:
        """Shape of the model's output for one record: a number for each of ``outputs``, where a task says no other."""
        return (len(self.outputs(study)),)

    @abstractmethod
    def measure(self, study: Study) -> Measure:
        """Model's outputs and the targets to the numbers that are counted of each record, float64 ``[B, m]``."""

    @abstractmethod
    def unknown(self, study: Study) -> NDArray[np.float64]:
        """Measured numbers ``[m]`` that stand for a record of which the model's numbers are not finite."""

    @abstractmethod
    def count(self, layout: Any, measured: NDArray[np.float64], targets: Sequence[NDArray[Any]]) -> Counts:
        """Exact counts int64 ``[k]`` of records, of each of which one patient moves what the layout's blocks say.

        Args:
            layout: of ``layout``.
            measured: ``[N, m]``.
            targets: each ``[N, …]``.
        """

    # -- predictions

    def predictions(self, study: Study) -> Predictions | None:
        """Predictions of a finished model; None where it leaves as no bundle."""
        return None

    def answer(self, study: Study, weights: NDArray[np.float32], sites: int) -> Answer | None:
        """Tables that a study's weights ``[d]`` are, of a sum of so many sites; None where they are a model."""
        return None

    # -- documents

    def suggestion(self, asked: Asked) -> Suggestion | None:
        """Settings that did best on public data for so many patients and hospitals; None where none were measured.

        Raises:
            ConfigurationError: numbers for which there is no study.
        """
        return None

    @property
    def folder(self) -> Path:
        """Folder of the task."""
        return Path(str(import_module(type(self).__module__).__file__)).parent

    @property
    def sample(self) -> Path:
        """File of the sample study: small, with privacy, valid as it is."""
        return self.folder / "sample_study.yaml"


@cache
def table() -> Mapping[str, str]:
    """Task to the module that has it."""
    found: Mapping[str, str] = import_module("consilium_tasks").TASKS
    return found


def names() -> tuple[str, ...]:
    """Names of all tasks of this release."""
    return tuple(table())


def studies() -> Mapping[str, Path]:
    """Folders of whole studies in the tasks' folders, by the study's name, each with its ``study.yaml``."""
    return {file.parent.name: file.parent for name in names() for file in get(name).folder.glob("studies/*/study.yaml")}


@cache
def get(name: str) -> Task:
    """The task of that name; raises ValueError where this release has none."""
    if name not in table():
        raise ValueError(f"this release has no task {name!r} ({', '.join(names())})")
    found: Task = import_module(table()[name]).TASK
    return found


def of(study: Study) -> Task:
    """The task of a study."""
    return get(study.task)


@cache
def kinds(name: str) -> Mapping[str, ModelKind]:
    """Kinds of model of the task of that name: its own, and those that every task has (``consilium_tasks.MODELS``)."""
    everywhere: Mapping[str, str] = import_module("consilium_tasks").MODELS
    return {**get(name).models, **{each: import_module(module).KIND for each, module in everywhere.items()}}


def kind(study: Study) -> ModelKind:
    """Kind of a study's model."""
    return kinds(study.task)[study.model.name]


def reads(study: Study) -> Reading:
    """Declaration of what a study reads of a site's asset."""
    return of(study).reads(study)


def predictions(study: Study) -> Predictions:
    """Predictions of a study's finished model; raises ConfigurationError where it leaves as no bundle."""
    found = of(study).predictions(study)
    if found is None:
        raise ConfigurationError(f"a model of task {study.task} does not leave as a bundle; registry/ has its weights")
    return found


def _known(name: str) -> str:
    return get(name).name


TaskName = Annotated[str, AfterValidator(_known)]
