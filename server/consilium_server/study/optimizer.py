"""Server optimizers: the averaged update is a pseudo-gradient (Reddi et al. 2021, algorithm 2).

Plain numpy in float64 with one rounding to float32 at the end, so that the same updates give the same model bit for bit
wherever the study is resumed.

What one site can move, where no update's norm is above ``norm_bound`` B and its share of the weight is p: fedavg, in a
round, lr · p · B. fedavgm, in each round, lr · p · B / (1 - momentum), and by one update over all later rounds as much:
steps are linear in the updates. fedadam and fedyogi divide by what they have seen, and a small update alone makes a
large step; they are held by ``step_limit`` K: no step is longer than K times the running mean of the updates, to whose
length the site adds p · B at most. So where the others send nothing, it moves the model by K · p · B in a round; where
they do, it can turn the step within its length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from consilium_shared import study
from consilium_shared.errors import ConfigurationError

Vector = npt.NDArray[np.float64]
Model = npt.NDArray[np.float32]

_STATE = {"fedavg": (), "fedavgm": ("velocity",), "fedadam": ("first", "second"), "fedyogi": ("first", "second")}


PIECE = 1 << 20
"""Coordinates stepped at a time."""


class ServerOptimizer:
    """Steps the global model. Its state is empty before the first step, then float64 vectors ``[t]`` by name."""

    def __init__(self, spec: study.ServerOptimizer) -> None:
        self._spec = spec
        self._state: dict[str, Vector] = {}

    @classmethod
    def from_study(cls, spec: study.ServerOptimizer) -> ServerOptimizer:
        """The optimizer that ``study.aggregation.optimizer`` names, before its first step."""
        return cls(spec)

    def step(self, model: Model, mean_update: npt.NDArray[np.floating[Any]]) -> Model:
        """The next global model, computed piece by piece: besides it nothing of its size is made.

        What the state becomes is computed once for each thing that needs it, and written last, in place.

        Args:
            model: float32 ``[t]``; not changed.
            mean_update: weighted mean of (local − global), float32 or float64 ``[t]``; not changed.

        Raises:
            ValueError: shapes that differ, or a result that is not finite (the state is then as before).

        >>> fedavg = ServerOptimizer.from_study(study.ServerOptimizer(name="fedavg"))
        >>> fedavg.step(np.array([1.0, 2.0], np.float32), np.array([0.5, -0.5])).tolist()
        [1.5, 1.5]
        """
        if model.ndim != 1 or mean_update.shape != model.shape:
            raise ValueError(f"the model is {model.shape}, the update {mean_update.shape}")
        if any(part.shape != model.shape for part in self._state.values()):
            raise ValueError("the optimizer's state belongs to a model of another size")
        after = np.empty_like(model)
        pieces = [slice(start, start + PIECE) for start in range(0, model.size, PIECE)]

        def moved(part: slice) -> dict[str, Vector]:
            before = {name: values[part] for name, values in self._state.items()}
            return self._next_state(mean_update[part].astype(np.float64), before)

        with np.errstate(over="ignore", invalid="ignore"):
            rate = self._spec.lr * self._shortening(moved, pieces)
            for part in pieces:
                direction = self._direction(moved(part), mean_update[part].astype(np.float64))
                after[part] = (model[part].astype(np.float64) + rate * direction).astype(np.float32)
            if not all(np.isfinite(after[part]).all() for part in pieces):
                raise ConfigurationError(
                    "the next model is not finite: the study needs a lower aggregation.optimizer.lr"
                )
            state = self._state or {name: np.empty(model.size) for name in _STATE[self._spec.name]}
            for part in pieces:
                for name, values in moved(part).items():
                    state[name][part] = values
        self._state = state
        return after

    def _shortening(self, moved: Callable[[slice], dict[str, Vector]], pieces: list[slice]) -> float:
        """Factor that holds a step to ``step_limit``; 1 where it is shorter, or is not held.

        It is rounded down to 20 bits, so that what another processor's sums differ by does not reach the model.
        """
        limit = self._spec.step_limit
        if limit is None or "first" not in _STATE[self._spec.name]:
            return 1.0
        step, mean = 0.0, 0.0
        for part in pieces:
            state = moved(part)
            step += float(np.square(self._spec.lr * self._direction(state, state["first"])).sum())
            mean += float(np.square(state["first"]).sum())
        if not step > limit * limit * mean:
            return 1.0
        factor = limit * math.sqrt(mean / step)
        bits = 20 - math.frexp(factor)[1]
        return math.ldexp(math.floor(math.ldexp(factor, bits)), -bits)

    def _next_state(self, update: Vector, before: dict[str, Vector]) -> dict[str, Vector]:
        """Momentum as Hsu et al. 2019; moments as Reddi et al. 2021, with v starting at τ² and no bias correction."""
        spec = self._spec
        if spec.name == "fedavg":
            return {}
        if spec.name == "fedavgm":
            return {"velocity": spec.momentum * before["velocity"] + update if before else update}
        first = before["first"] if before else np.zeros_like(update)
        second = before["second"] if before else np.full_like(update, spec.tau**2)
        square = update * update
        if spec.name == "fedadam":
            second = spec.beta2 * second + (1.0 - spec.beta2) * square
        else:
            second = second - (1.0 - spec.beta2) * square * np.sign(second - square)
        return {"first": spec.beta1 * first + (1.0 - spec.beta1) * update, "second": second}

    def _direction(self, state: dict[str, Vector], update: Vector) -> Vector:
        if self._spec.name == "fedavg":
            return update
        if self._spec.name == "fedavgm":
            return state["velocity"]
        return state["first"] / (np.sqrt(state["second"]) + self._spec.tau)

    def state(self) -> dict[str, Vector]:
        """The state itself, for a checkpoint; the next step changes it in place, whoever keeps it longer copies it."""
        return dict(self._state)

    def restore(self, state: dict[str, Vector]) -> None:
        """Go on from a checkpoint's state, which belongs to this optimizer from here on.

        Raises:
            ValueError: not a state of this optimizer.
        """
        if state and tuple(sorted(state)) != tuple(sorted(_STATE[self._spec.name])):
            raise ValueError(f"not a state of {self._spec.name}: {sorted(state)}")
        if any(part.dtype != np.float64 or part.ndim != 1 for part in state.values()):
            raise ValueError("the optimizer's state is not float64 vectors")
        if len({part.shape for part in state.values()}) > 1:
            raise ValueError("the parts of the optimizer's state differ in length")
        self._state = dict(state)
