"""The prediction service behind its interfaces: predict, record, answer; and the change of versions under it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from consilium_serve.home import Home
from consilium_serve.model import Model, answer
from consilium_serve.record import Record
from consilium_serve.versions import State, Versions, studies
from consilium_shared.canonical import canonical_bytes
from consilium_shared.errors import ConfigurationError, ConsiliumError, DataError
from consilium_shared.files import received_halves
from consilium_shared.preparation.record import Prepared

log = logging.getLogger("consilium.predict")

_SHADOWS = 64
"""Requests that wait for a shadow's answer; of more the shadow sees nothing."""


@dataclass(frozen=True)
class Case:
    """One record to predict on.

    Attributes:
        prepared: the model's inputs.
        patient: identifier, of which the record keeps a pseudonym alone; None where none was given.
    """

    prepared: Prepared
    patient: str | None = None


@dataclass(frozen=True)
class _Loaded:
    state: State
    active: Model
    shadow: Model | None


class Service:
    """The models of a home, answering. Safe to use from several threads."""

    def __init__(self, home: Home, record: Record) -> None:
        """Loads and verifies the active versions; raises as ``Versions.bundle`` and ``Model``."""
        self.home, self.record, self.settings = home, record, home.settings()
        for leftover in received_halves(home.asked):  # of a service that was killed while it read an image
            leftover.unlink()
        self._loaded: dict[str, _Loaded] = {}
        self._problems: dict[str, str] = {}
        self._reload = threading.Lock()
        self._shadows = ThreadPoolExecutor(1, thread_name_prefix="shadow")
        self._waiting = threading.Semaphore(_SHADOWS)
        self.reload()
        for problem in self._problems.values():
            raise ConfigurationError(problem)

    @property
    def studies(self) -> tuple[str, ...]:
        """Studies that are answered for."""
        return tuple(sorted(self._loaded))

    @property
    def problems(self) -> dict[str, str]:
        """Study to why its newest state could not be taken up; the version before goes on answering."""
        return dict(self._problems)

    def model(self, study: str, version: str | None = None) -> Model:
        """The version that answers; raises DataError for an unknown study, or another version than that."""
        loaded = self._loaded.get(study)
        if loaded is None or (version is not None and version != loaded.active.version):
            raise DataError("no such model, or not in this version")
        return loaded.active

    def threshold(self, study: str) -> float:
        """Probability of the second class from which on it is the answer."""
        return self.settings.thresholds.get(study, 0.5)

    def reload(self) -> None:
        """Take up what activate, rollback, shadow and add have changed. Requests under way end as they began."""
        with self._reload:
            for study in studies(self.home):
                versions, loaded = Versions(self.home, study), self._loaded.get(study)
                try:
                    state = versions.state()
                    if state.active is None or (loaded is not None and loaded.state == state):
                        continue
                    known = {m.version: m for m in (loaded.active, loaded.shadow) if m} if loaded else {}
                    active = known.get(state.active) or Model(versions.bundle(state.active))
                    shadow = None
                    if state.shadow is not None:
                        shadow = known.get(state.shadow) or Model(versions.bundle(state.shadow))
                    self._loaded[study] = _Loaded(state, active, shadow)
                    self._problems.pop(study, None)
                    body = {"study": study, "active": active.sha256, "shadow": shadow.sha256 if shadow else None}
                    self.record.append("answering", body)
                    log.info("%s is answered by %s", study, active.version)
                except ConsiliumError as error:
                    if self._problems.get(study) != str(error):
                        log.error("%s: %s", study, error)
                    self._problems[study] = str(error)

    def predict(self, model: Model, cases: Sequence[Case], client: str) -> list[dict[str, Any]]:
        """Answers to cases, in order; they stand in the record when this returns.

        Args:
            model: of ``model``.
            cases: at most ``limits.records``.
            client: who asks, for the record.

        Raises:
            DataError: too many cases.
            IntegrityError: the record cannot be written; nothing is answered then.
        """
        if len(cases) > self.settings.limits.records:
            raise DataError(f"more than {self.settings.limits.records} records in one request")
        told = self._answers(model, cases, client, "predictions")
        loaded = self._loaded.get(model.study.study)
        if loaded is not None and loaded.shadow is not None and self._waiting.acquire(blocking=False):
            self._shadows.submit(self._shadow, loaded.shadow, cases, client)
        return told

    def close(self) -> None:
        """Wait for shadows and free the record."""
        self._shadows.shutdown()
        self.record.close()

    def _answers(self, model: Model, cases: Sequence[Case], client: str, kind: str) -> list[dict[str, Any]]:
        asked = [number for number, case in enumerate(cases) if not case.prepared.abstain]
        scores = dict(zip(asked, model.scores([cases[number].prepared for number in asked]), strict=True))
        threshold = self.threshold(model.study.study)
        told = [answer(model, case.prepared, scores.get(number), threshold) for number, case in enumerate(cases)]
        self.record.append(
            kind,
            {
                "model": model.sha256,
                "study": model.study.study,
                "client": client,
                "threshold": threshold,
                "predictions": [self._entry(model, case, each) for case, each in zip(cases, told, strict=True)],
            },
        )
        return told

    def _entry(self, model: Model, case: Case, told: Mapping[str, Any]) -> dict[str, Any]:
        shape = {name: list(values.shape) for name, values in case.prepared.inputs.items()}
        inputs = b"".join(np.ascontiguousarray(v, dtype="<f4").tobytes() for v in case.prepared.inputs.values())
        return {
            "patient": None if case.patient is None else self._pseudonym("patient", case.patient.encode()),
            "input": self._pseudonym("input", canonical_bytes(shape) + inputs),
            **model.predictions.recorded(told["prediction"]),
            "abstained": bool(told["abstained"]),
        }

    def _pseudonym(self, what: str, data: bytes) -> str:
        return self.home.pseudonym(what.encode() + b"\0" + data)

    def _shadow(self, model: Model, cases: Sequence[Case], client: str) -> None:
        try:
            self._answers(model, cases, client, "shadow")
        except Exception as error:
            log.error("the shadow %s broke off: %s", model.version, type(error).__name__)  # its text may quote data
        finally:
            self._waiting.release()


def watch(service: Service, stop: threading.Event, seconds: float = 1.0) -> None:
    """Take up new states until ``stop`` is set; a thread of its own runs it."""
    while not stop.wait(seconds):
        try:
            service.reload()
        except Exception as error:
            log.error("looking for new versions broke off: %s", type(error).__name__)
