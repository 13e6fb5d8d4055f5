"""A study's file becomes its contract: what it leaves open and follows from the rest is written in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from consilium_server import studies
from consilium_server.federation import Home
from consilium_shared.config import load_yaml, read_yaml
from consilium_shared.errors import ConfigurationError
from consilium_shared.study import Study


def read(file: Path, home: Home) -> Study:
    """The contract of a study file.

    ``aggregation.norm_bound`` follows from the plan where the file names none (``norm_bound.py``). The file of a study
    that was started here before, perhaps by another release, is that study where it says nothing else.

    Raises:
        ConfigurationError: as ``config.load_yaml``.
    """
    study, given = load_yaml(file, Study), read_yaml(file)
    names_bound = "norm_bound" in given.get("aggregation", {})
    started = _started(home, study.study)
    if started is not None:
        before = {"schema_version": started.schema_version, **given}
        if not names_bound:
            before = _with_norm_bound(before, started.aggregation.norm_bound)
        if _same(before, started):
            return started
    if names_bound:
        return study
    from consilium_server.norm_bound import derived_norm_bound

    return Study.model_validate(_with_norm_bound(study.contract, derived_norm_bound(study)))


def _started(home: Home, name: str) -> Study | None:
    try:
        return studies.folder(home, name).study()
    except ConfigurationError:
        return None


def _same(content: dict[str, Any], started: Study) -> bool:
    try:
        return Study.model_validate(content).digest == started.digest
    except ValidationError:  # the older schema lacks a key of the file
        return False


def _with_norm_bound(content: dict[str, Any], bound: float) -> dict[str, Any]:
    return {**content, "aggregation": {**content.get("aggregation", {}), "norm_bound": bound}}
