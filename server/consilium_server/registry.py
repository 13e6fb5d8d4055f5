"""Finished models: safetensors beside a signed card that says how each came to be and what it cost.

models/<study>/<first 12 digits of the model's SHA-256>/model.safetensors
                                                        card.json
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilium_server.federation import Home
from consilium_shared import documents, keeping, shared_noise
from consilium_shared.canonical import digest
from consilium_shared.errors import ConfigurationError, IntegrityError, PeerError
from consilium_shared.files import write_atomically
from consilium_shared.identity import PublicIdentity
from consilium_shared.keeping import Kept
from consilium_shared.limits import CARD_BYTES
from consilium_shared.privacy.alone import cost_alone
from consilium_shared.protocol.messages import Closing
from consilium_shared.protocol.records import CARD_DOMAIN, Measured, ModelCard
from consilium_shared.protocol.roster import Roster
from consilium_shared.secagg.terms import fewest_sites
from consilium_shared.study import Study

LIMITS = (
    "The coordinator saw sums over sites alone. What the sums and the model tell about a patient is bounded by "
    "differential privacy, where the study has it. A site may have trained on false data within the contract's bounds; "
    "nothing here shows that. The metrics are as reported by the sites, which nobody has checked. Where counts carry "
    "noise, each metric has the interval that holds the one of the true counts in 95 of 100 cases; that other patients "
    "could have been held back is not in it."
)

SOFTWARE = ("consilium", "flwr", "torch", "opacus", "scipy", "numpy", "cryptography")


@dataclass(frozen=True)
class Model:
    """One entry of the registry."""

    folder: Path
    card: dict[str, Any]


def publish(
    home: Home,
    study: Study,
    roster: Roster,
    model: bytes,
    records: list[dict[str, Any]],
    closings: Mapping[str, Closing],
) -> Model:
    """Write model and card; where they are published already, nothing changes.

    Args:
        model: safetensors bytes of the global model.
        records: the signed records of all rounds, in order.
        closings: by site, what each said at the end.
    """
    sha256 = digest(model)
    published = find(home, study, sha256)
    if published is not None:
        return published
    folder = _folder(home, study, sha256)
    evaluated = [record for record in records if record["metrics"] is not None]
    epsilon: dict[str, float | None] = {}
    for record in records:
        epsilon.update(record["epsilon"])
    epsilon.update({site: closing.epsilon for site, closing in closings.items()})
    card = {
        "study": study.study,
        "version": study.version,
        "study_digest": study.digest,
        "contract": study.contract,
        "federation": roster.federation,
        "roster": {"digest": roster.digest, "version": roster.version, "sites": [m.site for m in roster.members]},
        "model": {"sha256": sha256, "bytes": len(model), "architecture": study.model.name},
        "rounds": [
            {key: record[key] for key in ("round", "participants", "away", "refused", "seconds", "model_after")}
            for record in records
        ],
        "epsilon": epsilon,
        "delta": study.privacy.delta,
        **({} if (alone := cost_alone(study)) is None else {"epsilon_alone": round(alone, 6)}),
        "metrics": evaluated[-1]["metrics"] if evaluated else None,
        "measured": {
            site: Measured.of(each.audit, study.privacy.delta).model_dump()
            for site, each in closings.items()
            if each.audit is not None and study.privacy.delta is not None
        },
        "privacy": _privacy_words(study, roster),
        "limits": LIMITS,
        "software": {name: version for name in SOFTWARE if (version := _version(name))}
        | {"python": platform.python_version()},
    }
    if study.evaluation.keep is not None:
        card["kept"] = records[-1].get("kept")
        best = Kept.model_validate(card["kept"]) if card["kept"] else None
        card["chosen"] = keeping.words(study, best, len(records))
    if study.schema_version > 1:
        card["protocol"] = study.schema_version
    ModelCard.model_validate(card)  # never sign what an auditor's program could not read
    write_atomically(folder / "model.safetensors", model)
    write_atomically(folder / "card.json", documents.seal(card, CARD_DOMAIN, home.coordinator()))
    return Model(folder, card)


def find(home: Home, study: Study, sha256: str) -> Model | None:
    """The entry of the model with this digest, or None while it is not published; raises as ``read``."""
    folder = _folder(home, study, sha256)
    return read(folder, home.coordinator().public) if (folder / "card.json").exists() else None


def _folder(home: Home, study: Study, sha256: str) -> Path:
    return home.models / study.study / sha256[:12]


def read(folder: Path, coordinator: PublicIdentity) -> Model:
    """An entry, verified.

    Raises:
        IntegrityError: the card was edited, or the model is not the one that the card describes.
    """
    try:
        body, signature = documents.parse((folder / "card.json").read_bytes(), CARD_BYTES)
        documents.verify(body, signature, CARD_DOMAIN, coordinator)
        model = (folder / "model.safetensors").read_bytes()
    except (OSError, PeerError) as error:
        raise IntegrityError(f"{folder}: {error}") from error
    if digest(model) != body["model"]["sha256"]:
        raise IntegrityError(f"{folder}/model.safetensors is not the model that card.json describes")
    return Model(folder, body)


def all_models(home: Home) -> list[Model]:
    """Every entry, by study; raises IntegrityError at the first damaged one."""
    coordinator = home.coordinator().public
    return [read(file.parent, coordinator) for file in sorted(home.models.glob("*/*/card.json"))]


def newest(home: Home, study: str) -> Model:
    """The newest model of a study, verified.

    Raises:
        ConfigurationError: there is none.
        IntegrityError: as ``read``.
    """
    found = sorted((home.models / study).glob("*/card.json"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise ConfigurationError(f"no finished model of {study!r}; consilium-server models lists what there is")
    return read(found[-1].parent, home.coordinator().public)


def _privacy_words(study: Study, roster: Roster) -> str:
    if study.privacy.mode == "none":
        return "Trained without differential privacy: the model may reveal what it was trained on."
    said = (
        f"Everything that a site sent is differentially private for that site's patients (add or remove one patient), "
        f"updates, weight and evaluation counts together: at most ε = {study.privacy.epsilon:g} at "
        f"δ = {study.privacy.delta:g} for the whole study, as each site's own ledger shows."
    )
    alone, liars = cost_alone(study), study.aggregation.corrupt_sites
    if alone is None or study.privacy.epsilon is None or not isinstance(liars, int):
        return said
    return " ".join(
        (
            said,
            "The noise is shared.",
            *shared_noise.words(
                sites=len(roster.members),
                least=fewest_sites(study, roster.members),
                colluding=liars,
                epsilon=study.privacy.epsilon,
                alone=alone,
            ),
        )
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
