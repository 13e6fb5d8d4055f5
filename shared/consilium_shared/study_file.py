"""A study's file becomes its contract: what it leaves open and follows from the rest is written in."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from consilium_shared.architecture import Start
from consilium_shared.config import Strict, load_yaml, read_yaml
from consilium_shared.graphs.graph import Graph
from consilium_shared.models.vector import width
from consilium_shared.norm_bound import UNRULED, derived_norm_bound
from consilium_shared.privacy.plan import PrivacyPlan, plan_of
from consilium_shared.private_sums import Grid
from consilium_shared.schema import SCHEMA
from consilium_shared.study import Study


def read(file: Path, *, with_start: bool = True) -> Study:
    """The contract of a study file; ``aggregation.norm_bound`` follows from the plan where the file names none, and
    with ``privacy.sums`` the noise multiplier from ε.

    Args:
        file: the YAML file.
        with_start: False reads it as if it named no weights to start from.

    Raises:
        ConfigurationError: as ``config.load_yaml``.
    """
    study = load_yaml(file, Study, partial(_complete, file, with_start=with_start))
    content = study.contract
    if study.privacy.sums is not None:  # every site's noise is the contract's
        plan = plan_of(study, 0)
        assert isinstance(plan, PrivacyPlan)  # noqa: S101  (sums are for studies with privacy)
        Grid.of(study, width(study)).check_noise(plan.own_noise_multiplier * plan.clipping_norm, plan.honest_sites)
        content["privacy"] = {**content["privacy"], "noise_multiplier": plan.noise_multiplier}
    if not _names_bound(read_yaml(file)):
        content = _with_bound(content, derived_norm_bound(study))
    return Study.model_validate(content)


def read_as(file: Path, digest: str | None, bound: float = UNRULED) -> Study:
    """The contract of a study file as another release may have written it: the one with that digest.

    Where a file is silent releases differ in what they write; where it speaks they do not. So a file that gives this
    digest by any of their rules is the file of that study.

    Args:
        file: the YAML file.
        digest: of the contract that the file is perhaps of.
        bound: a norm bound that contracts of such a file had.

    Returns:
        That contract, or as ``read`` where no rule gives its digest.

    Raises:
        ConfigurationError: as ``config.load_yaml``.
    """
    found = read(file)
    if found.digest == digest:
        return found
    return next((each for each in _as_written_before(file, bound) if each.digest == digest), found)


def _as_written_before(file: Path, bound: float) -> Iterator[Study]:
    given = _complete(file, read_yaml(file))
    if not _names_bound(given):
        given = _with_bound(given, bound)
    for schema in range(SCHEMA, 0, -1):
        try:
            yield Study.model_validate({"schema_version": schema, **given})
        except ValidationError:  # the file has a key that this schema lacks
            continue


def _complete(file: Path, given: dict[str, Any], *, with_start: bool = True) -> dict[str, Any]:
    """Content of a study's file with what it names as files beside it: ``graph: net.yaml``, ``start: weights.yaml``."""
    model = given.get("model")
    if not isinstance(model, dict):
        return given
    kinds: dict[str, type[Strict]] = {"graph": Graph, "start": Start}
    if not with_start:
        model = {key: value for key, value in model.items() if key != "start"}
    named = {
        key: load_yaml(file.parent / model[key], kind).model_dump(mode="json")
        for key, kind in kinds.items()
        if isinstance(model.get(key), str)
    }
    return {**given, "model": {**model, **named}}


def _names_bound(given: dict[str, Any]) -> bool:
    return "norm_bound" in given.get("aggregation", {})


def _with_bound(content: dict[str, Any], bound: float) -> dict[str, Any]:
    return {**content, "aggregation": {**content.get("aggregation", {}), "norm_bound": bound}}
