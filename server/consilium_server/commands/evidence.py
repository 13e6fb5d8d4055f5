"""Evidence on one study for an auditor, copied into a folder; each site adds its own ledger to it. No secret is in it.

coordinator.json      the coordinator's public key
roster.json           who took part, with their keys, as pinned when the study began (signed)
contract.json         the study as every hospital approved it
rounds/NNNN.json      signed record of each finished round
closing/<site>.json   what each site signed about the last record, once the study has ended
card.json             signed card of the finished model, if there is one
"""

from __future__ import annotations

import json
from pathlib import Path

from consilium_server import registry
from consilium_server.federation import Home
from consilium_server.state import study_folder
from consilium_shared.canonical import canonical_bytes
from consilium_shared.errors import ConfigurationError
from consilium_shared.files import write_atomically


def collect(home: Home, name: str, target: Path) -> list[str]:
    """Copy one study's evidence into ``target``, verified first.

    Returns:
        The files written, by name within ``target``.

    Raises:
        ConfigurationError: no such study, or ``target`` holds other evidence already.
        IntegrityError: a record, a closing or the card was edited, or a record is missing.
    """
    folder = study_folder.folder(home, name)
    coordinator, study = home.coordinator(), folder.study()
    roster = folder.roster(home)
    files = {
        "coordinator.json": _readable({"coordinator": coordinator.public.hex()}),
        "roster.json": _readable(folder.roster_document()),
        "contract.json": canonical_bytes(study.contract),
    }
    for record in folder.records(coordinator):
        file = f"rounds/{record['round']:04d}.json"
        files[file] = (folder.root / file).read_bytes()
    for site, (header, _) in folder.closings(roster).items():
        files[f"closing/{site}.json"] = header
    models = [
        model
        for path in sorted((home.models / name).glob("*/card.json"))
        if (model := registry.read(path.parent, coordinator.public)).card["study_digest"] == study.digest
    ]
    if models:
        files["card.json"] = (models[-1].folder / "card.json").read_bytes()
    for file in ("coordinator.json", "roster.json", "contract.json", "rounds", "closing", "card.json"):
        if (target / file).exists():
            raise ConfigurationError(f"{target / file} exists already; choose another folder")
    for file, data in files.items():
        write_atomically(target / file, data, mode=0o644)
    return sorted(files)


def _readable(value: object) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
