"""The model's page: one HTML file for people, made of the signed card. No script, no font, no network."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from consilium_shared import task
from consilium_shared.identity import PublicIdentity
from consilium_shared.inputs import Feature, Numeric
from consilium_shared.printable import printable
from consilium_shared.recalibration import Recalibration
from consilium_shared.study import Study


def render(
    study: Study, card: dict[str, Any], example: dict[str, Any], key: PublicIdentity, difference: float
) -> bytes:
    """The page, UTF-8.

    Args:
        study: the contract.
        card: body of the model card.
        example: an invented record, as a request has it.
        key: the coordinator's.
        difference: largest difference between the ONNX graph and the trained model.
    """
    environment = Environment(
        loader=PackageLoader("consilium_server.export"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value, keep="\n\t") if type(value) is str else value,
    )
    rounds = Counter(site for each in card["rounds"] for site in each["participants"])
    text = environment.get_template("model.html").render(
        study=study,
        reading=task.reads(study),
        predictions=task.predictions(study),
        card=card,
        fingerprint=key.fingerprint,
        metrics=metrics(card["metrics"], task.of(study).explained),
        recalibration=Recalibration.read(card["metrics"]),
        parts=parts(card["metrics"]),
        noised="interval" in (card["metrics"] or {}),
        rounds=rounds,
        sites=sorted({*card["roster"]["sites"], *rounds}),
        epsilon=max((value for value in card["epsilon"].values() if value is not None), default=None),
        inputs=[_row(feature) for feature in _features(study)],
        example=json.dumps(_short(example), ensure_ascii=False, indent=1),
        difference=f"{difference:.0e}",
    )
    return text.encode()


def metrics(found: dict[str, Any] | None, words: Mapping[str, str]) -> list[tuple[str, str, str, str]]:
    """Rows of the metrics' table: name in ``words`` or as it is, value, interval of the noise, interval of patients."""
    noise, patients = ((found or {}).get(kind, {}) for kind in ("interval", "sampling"))
    rows = []
    for name, value in (found or {}).items():
        if value is None or isinstance(value, float):
            shown = "unknown" if value is None else f"{value:.3f}"
            rows.append((words.get(name, name), shown, _ends(noise.get(name)), _ends(patients.get(name))))
    return rows


def _ends(found: list[float] | None) -> str:
    return f"{found[0]:.3f} – {found[1]:.3f}" if found else "–"


def parts(found: dict[str, Any] | None) -> list[tuple[str, list[str], list[list[str]]]]:
    """Tables of the metrics of parts: the kind of part, the names of the columns, and a row for each part."""
    tables = []
    for kind, rows in (found or {}).get("parts", {}).items():
        names = [name for name in next(iter(rows.values())) if name not in ("interval", "sampling")]
        shown = [
            [part, *(_within(values[name], _widest(values, name)) for name in names)] for part, values in rows.items()
        ]
        tables.append((kind, [kind, *names], shown))
    return tables


def _widest(values: dict[str, Any], name: str) -> list[float] | None:
    """Interval of patients and noise together; of the noise alone where there is no other."""
    found: list[float] | None = values.get("sampling", {}).get(name, values.get("interval", {}).get(name))
    return found


def _within(value: float | None, ends: list[float] | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")


def _features(study: Study) -> tuple[Feature, ...]:
    reading = task.reads(study)
    if reading.series is not None:
        return (*reading.series.variables, *reading.series.statics)
    return reading.features


def _row(feature: Feature) -> tuple[str, str]:
    if not isinstance(feature, Numeric):
        return feature.name, "one of " + ", ".join(feature.categories)
    low = "" if feature.low is None else f"from {feature.low:g} "
    high = "" if feature.high is None else f"to {feature.high:g}"
    return feature.name, (low + high).strip() or "any number"


def _short(record: dict[str, Any]) -> dict[str, Any]:
    """A record that a page can show: the beginning of what is long."""
    if "pixels" in record:
        return {"pixels": [[*record["pixels"][0][:4], "…"], "…"]}
    if "samples" in record:
        return {**record, "samples": [*record["samples"][:3], "…"]}
    return record
