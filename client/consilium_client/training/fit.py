"""Fit of a study to this machine: the device and the size of a microbatch; tried before anything is charged."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from consilium_client.training import invented
from consilium_client.training.neighbours import dependence
from consilium_client.training.rehearsal import rehearse
from consilium_client.training.trainer import physical_batch, private_rows
from consilium_shared import task
from consilium_shared.errors import MachineError
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.study import Study
from dpsgd import device
from dpsgd.engines import Engine
from dpsgd.isolation import ROWS

_LARGE = 4 * ROWS
"""Rows of a microbatch on a GPU, where its kernels pass the neighbour test at that size and steps are as large."""

MOST_THREADS = 16
"""Most threads that compute microbatches side by side: each takes as much memory as one alone."""

_SETTINGS = ("ATEN_", "CUDNN_", "DNNL_", "MKL_", "NVIDIA_TF32", "ONEDNN_", "OPENBLAS_", "TORCH_")
"""Beginnings of the names of environment variables by which libraries choose their kernels."""

log = logging.getLogger("consilium.agent")


class Fit(NamedTuple):
    """Device of a study's steps; ``rows``: with privacy, of a microbatch of several patients; ``workers``: threads
    that compute microbatches side by side."""

    device: torch.device
    rows: int | None
    workers: int = 1


class Finding(NamedTuple):
    """Finding of the neighbour test: the size of microbatch that passed, or 0; what the other sizes showed."""

    rows: int
    failed: str


class Findings(Protocol):
    """Store of the findings of earlier neighbour tests."""

    def get(self, about: dict[str, Any]) -> Finding | None:
        """The finding about exactly this, or None."""

    def put(self, about: dict[str, Any], finding: Finding) -> None:
        """Keep it."""


class Marks(Protocol):
    """Marks of trials under way; a mark outlives a program that the trial ends (``state/trials.py``)."""

    def trying(self, about: dict[str, Any]) -> AbstractContextManager[None]:
        """Context of a trial of exactly this; its mark is taken away at the end."""

    def gone_wrong(self, about: dict[str, Any]) -> str:
        """Reason why exactly this is not tried again, or nothing."""


def sizes(study: Study, where: torch.device) -> list[int]:
    """Sizes of a microbatch in rows, the best first; at size 1 each patient has a microbatch alone."""
    one = invented.records(study, [1])
    found = {private_rows(study, one), 1}
    batch = study.training.expected_batch * study.training.augment_multiplicity
    if where.type != "cpu" and min(physical_batch(one), batch) >= _LARGE:
        found.add(_LARGE)
    return sorted(found, reverse=True)


def fitting(
    study: Study,
    plan: PrivacyPlan,
    device_name: str,
    engine: Engine,
    findings: Findings | None = None,
    marks: Marks | None = None,
) -> Fit:
    """First size of microbatch at which no record depends on another (``neighbours``) and this machine can compute.

    Where a GPU passes at no size, ``auto`` falls back on the CPU. What ended the program before is not tried again.

    Raises:
        MachineError: no size is both.
        ConfigurationError: there is no such device.
    """
    where = device.choose(device_name)
    finding = _tested(study, where, engine, findings, marks)
    if not finding.rows and device_name == "auto" and where.type != "cpu":
        log.warning("study %s: computed on the CPU, not on %s: %s", study.study, where, finding.failed)
        return fitting(study, plan, "cpu", engine, findings, marks)
    if not finding.rows:
        raise MachineError(
            f"study {study.study}: on this machine ({where}, torch {torch.__version__}) {finding.failed}, so clipping "
            "bounds less than the study promises, and no private round runs here. Set device: cpu in site.yaml, or "
            "use another processor or build of torch"
        )
    failed = ""
    for rows, workers in _candidates(finding.rows, threads(study, where, engine)):
        what = "largest pieces" if workers == 1 else f"largest pieces, {workers} at once"
        with _tried(study, where, engine, rows, what, marks) as gone:
            failed = gone or _rehearsed(study, plan, where, engine, rows, workers)
        if not failed:
            return Fit(where, rows, workers)
        log.warning(
            "study %s: pieces of %d records, %d at once, are too much for this machine: %s",
            study.study,
            rows,
            workers,
            failed,
        )
    numbers = " and ".join("×".join(map(str, each)) for each in task.of(study).shapes(study))
    raise MachineError(
        f"study {study.study}: this machine ({where}) cannot compute the largest piece of a step, "
        f"{plan.records_per_patient * study.training.augment_multiplicity} records of {numbers} numbers ({failed}). It "
        "needs more memory, or the study smaller inputs or fewer records_per_patient"
    )


def threads(study: Study, where: torch.device, engine: Engine) -> int:
    """Threads that may compute microbatches side by side: one for each core that torch would use, where they can."""
    able = where.type == "cpu" and engine == "book-keeping" and study.training.precision == "float32"
    return min(torch.get_num_threads(), MOST_THREADS) if able else 1


def _candidates(rows: int, workers: int) -> list[tuple[int, int]]:
    """Sizes of a microbatch and numbers of threads, in the order of trial; each takes less memory than the last."""
    return list(dict.fromkeys([(rows, workers), (rows, 1), (1, 1)]))


def fails(study: Study, device_name: str, engine: Engine, findings: Findings) -> bool:
    """True where a kept finding says that no size of microbatch passes, on the device and on its fallback."""
    where = device.choose(device_name)
    found = findings.get(_about(study, where, engine))
    if found is None or found.rows:
        return False
    instead = device_name == "auto" and where.type != "cpu"
    return not instead or fails(study, "cpu", engine, findings)


def machine(where: torch.device) -> dict[str, Any]:
    """Description of what a device computes with here: processor, libraries, driver, our own release."""
    about: dict[str, Any] = {
        "release": metadata.version("consilium"),
        "processor": _processor(),
        "paths": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "libraries": hashlib.sha256(torch.__config__.show().encode()).hexdigest(),
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_SETTINGS)},
        "device": where.type,
    }
    if where.type == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        about |= {
            "gpu": [torch.cuda.get_device_name(where), list(torch.cuda.get_device_capability(where))],
            "driver": driver.read_text(errors="replace").splitlines()[0] if driver.exists() else "",
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        }
    return about


def _processor() -> str:
    """Model of the processor and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    parts = [line.partition(":")[::2] for line in reversed(lines)]
    found = {name.strip(): value.strip() for name, value in parts}  # of the first processor
    sets = found.get("flags", found.get("Features", ""))
    return f"{platform.machine()} {found.get('model name', '')} {hashlib.sha256(sets.encode()).hexdigest()[:16]}"


def _about(study: Study, where: torch.device, engine: Engine) -> dict[str, Any]:
    """Everything that a finding depends on, as a key."""
    training = study.training
    return {
        "machine": machine(where),
        "model": study.model.model_dump(mode="json", exclude={"seed", "start"}),
        "task": study.task,
        "inputs": [list(each) for each in task.of(study).shapes(study)],
        "outputs": len(task.of(study).outputs(study)),
        "class_weights": training.class_weights is not None,
        **({} if training.focal is None else {"focal": training.focal}),  # it goes through kernels of its own
        "precision": training.precision,
        "records_per_patient": training.records_per_patient,
        "augment": [training.augment, training.augment_multiplicity],
        "way": engine,
        "sizes": sizes(study, where),
    }


@contextmanager
def _tried(
    study: Study, where: torch.device, engine: Engine, rows: int, what: str, marks: Marks | None
) -> Iterator[str]:
    """Context of one trial; gives the reason why it must not be made, or ""."""
    about = {
        "study": study.digest,
        "name": study.study,
        "device": where.type,
        "way": engine,
        "rows": rows,
        "what": what,
    }
    if marks is None:
        yield ""
    elif gone := marks.gone_wrong(about):
        yield gone
    else:
        with marks.trying(about):
            yield ""


def _tested(
    study: Study, where: torch.device, engine: Engine, findings: Findings | None, marks: Marks | None = None
) -> Finding:
    about = _about(study, where, engine)
    found = None if findings is None else findings.get(about)
    if found is None:
        log.info("study %s: testing on %s that no record's result depends on another's", study.study, where)
        found, whole = _test(study, where, engine, about["sizes"], marks)
        if findings is not None and whole:
            findings.put(about, found)
    if found.failed:
        log.warning("study %s, pieces on %s: %s", study.study, where, found.failed)
    return found


def _test(
    study: Study, where: torch.device, engine: Engine, tried: list[int], marks: Marks | None
) -> tuple[Finding, bool]:
    """Finding, and whether it is to be kept: not where a test broke off, as for memory that is short today."""
    failed: list[str] = []
    whole = True
    for rows in tried:
        with _tried(study, where, engine, rows, "neighbours", marks) as gone:
            whole = whole and not gone
            try:
                said = gone or dependence(study, where, engine, rows)
            except Exception as error:  # such as memory: of invented records, so it may be quoted
                whole = False
                said = f"the test broke off ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        if not said:
            return Finding(rows, "; ".join(failed)), whole
        failed.append(f"in pieces of {rows} {said}" if rows > 1 else f"even with each patient alone {said}")
    return Finding(0, "; ".join(failed)), whole


def _rehearsed(study: Study, plan: PrivacyPlan, where: torch.device, engine: Engine, rows: int, workers: int) -> str:
    """Reason why the largest microbatches cannot be computed, or "". May quote an error: no patient's data is there."""
    try:
        rehearse(study, plan, where, engine, rows, workers)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""
