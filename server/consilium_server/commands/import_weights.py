"""consilium-server import-weights: published weights become a study's start, with a card of whose data made them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from consilium_shared import console
from consilium_shared.errors import ConfigurationError
from consilium_shared.files import write_atomically


def add_to(app: typer.Typer) -> None:
    """Give consilium-server the command."""
    app.command("import-weights")(import_weights)


def import_weights(
    file: Annotated[Path, typer.Argument(help="Safetensors, ONNX (.onnx), or what torch.save wrote of a state dict.")],
    study: Annotated[Path, typer.Argument(help="STUDY.yaml; what its model.start names need not exist yet.")],
    target: Annotated[Path, typer.Argument(help="Safetensors file to write; the card is written beside it, as .yaml.")],
    source: Annotated[str, typer.Option(help="Who published the weights, and under which name.")],
    licence: Annotated[str, typer.Option(help="Licence of the weights.")],
    data: Annotated[str, typer.Option(help="Which data made them, and whose data these are.")],
    by: Annotated[str, typer.Option(help="Who imports them: a person's name.")],
    url: Annotated[str | None, typer.Option(help="Where they were published.")] = None,
    rename: Annotated[list[str] | None, typer.Option(help="OLD=NEW: what names begin with, there and here.")] = None,
    leave_out: Annotated[list[str] | None, typer.Option(help="Pattern of names that are left out, as 'fc.*'.")] = None,
    fold: Annotated[list[str] | None, typer.Option(help="NORM=LAYER: the layer that a batch norm follows.")] = None,
    in_order: Annotated[bool, typer.Option("--in-order", help="Pair what no name pairs by its place.")] = False,
    grey: Annotated[bool, typer.Option("--grey", help="Add up the first layer's colours for grey images.")] = False,
) -> None:
    """Import published weights for a study's model: the mapping is shown, batch norms are folded, no code is run.

    The card says whose data made them. With its digest it goes into the contract, so that every hospital approves both.
    """
    from consilium_shared import study_file  # torch is slow to load
    from consilium_shared.graphs import importing, weights
    from consilium_shared.models import start
    from consilium_shared.models.vector import fingerprint

    card_file = target.with_suffix(".yaml")
    if target.suffix != ".safetensors":
        raise ConfigurationError(f"{target}: give it a name that ends in .safetensors")
    for taken in (target, card_file):
        if taken.exists():
            raise ConfigurationError(f"{taken} exists already; choose another name")
    contract, given = study_file.read(study, with_start=False), weights.read(file)
    words = {"source": source, "licence": licence, "data": data, "url": url, "imported_by": by}
    card = _card({**words, "imported": f"{datetime.now(UTC):%Y-%m-%d}", "file": given.sha256})
    wishes = importing.Wishes(_pairs("--rename", rename), leave_out or (), _pairs("--fold", fold), in_order, grey)
    found = importing.imported(given, contract, wishes)
    weights.write(found.weights, target)
    sha256 = fingerprint(start.read(target, contract).vector, contract)
    content = {"sha256": sha256, "card": card}
    write_atomically(card_file, yaml.safe_dump(content, allow_unicode=True, sort_keys=False).encode(), mode=0o644)
    console.table(
        "mapping",
        ["in the file", "in the model", "shape", "how"],
        [(row.there, row.here, "×".join(map(str, row.shape)), row.how) for row in found.rows],
    )
    say = console.console.print
    if found.left_out:
        say(f"left out: {', '.join(found.left_out)}", markup=False)
    if found.seeded:
        say(f"from the study's seed, because the file lacks them: {', '.join(found.seeded)}", markup=False)
    say(f"weights {sha256}", markup=False)
    say(
        f"write under model in {study}: start: {card_file} (a path from the study's file), and start it with: "
        f"consilium-server run {study} --weights {target}",
        markup=False,
    )


def _card(words: dict[str, Any]) -> dict[str, Any]:
    from pydantic import ValidationError

    from consilium_shared.origin import Origin

    try:
        return Origin.model_validate(words).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        option = {"imported_by": "by"}.get(str(first["loc"][0]), str(first["loc"][0]))
        raise ConfigurationError(f"--{option}: {first['msg'].removeprefix('Value error, ')}") from error


def _pairs(option: str, texts: list[str] | None) -> dict[str, str]:
    found = {}
    for text in texts or ():
        before, sign, after = text.partition("=")
        if not (before and sign):
            raise ConfigurationError(f"{option} {text}: write OLD=NEW")
        found[before] = after
    return found
