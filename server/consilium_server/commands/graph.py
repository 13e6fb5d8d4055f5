"""consilium-server graph: a scientist's own network as a graph, and what is in one. Runs on the scientist's machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consilium_shared import console
from consilium_shared.errors import ConfigurationError
from consilium_shared.files import write_atomically

app = typer.Typer(no_args_is_help=True, help="Graphs: models as data.")

BATCH_NORMS = ("refuse", "group", "frozen")


@app.command("from-torch")
def from_torch(
    file: Annotated[Path, typer.Argument(help="Python file with the module. It is run: take your own.")],
    target: Annotated[Path, typer.Argument(help="YAML file to write")],
    inputs: Annotated[list[str], typer.Option("--input", help="image=1x28x28: an input of the task, of one record.")],
    module: Annotated[str | None, typer.Option(help="Class, function or module in the file.")] = None,
    batch_norm: Annotated[str, typer.Option(help="Batch norms: refuse, group (norm in place), frozen (folded).")] = (
        "refuse"
    ),
    state: Annotated[Path | None, typer.Option(help="State dict or safetensors to load into the module first.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Safetensors file to write the module's weights to.")] = None,
) -> None:
    """Trace a torch module of yours into a graph, which is held against it; with --weights its weights too."""
    from consilium_shared.graphs import from_torch as tracing  # torch is slow to load
    from consilium_shared.graphs.weights import write

    if batch_norm not in BATCH_NORMS:
        raise ConfigurationError(f"--batch-norm is one of {', '.join(BATCH_NORMS)}")
    for taken in (target, *([weights] if weights else [])):
        if taken.exists():
            raise ConfigurationError(f"{taken} exists already; choose another name")
    shapes = dict(map(_input, inputs))
    made = tracing.load(file, module)
    if state is not None:
        tracing.put(made, state)
    found = tracing.trace(made, shapes, batch_norm=batch_norm, file=file)  # type: ignore[arg-type]  # looked at above
    write_atomically(target, found.graph.text().encode(), mode=0o644)
    if weights is not None:
        write(found.weights, weights)
    for note in found.notes:
        console.console.print(note, markup=False)
    console.console.print(f"{target}: {_size(found.graph.parameters, len(found.graph.nodes))}", markup=False)


@app.command()
def show(file: Annotated[Path, typer.Argument(help="YAML file of a graph")]) -> None:
    """Show a graph's layers with what comes out of them, their parameters, and the memory of a private step."""
    from consilium_shared.config import load_yaml
    from consilium_shared.graphs.graph import Graph

    graph = load_yaml(file, Graph)
    console.table("layers", ["name", "layer", "gives", "parameters"], list(graph.described()))
    size = _size(graph.parameters, len(graph.nodes))
    memory = f"a step of 32 records takes at least {graph.step_bytes(32) / 2**20:,.0f} MiB"
    console.console.print(f"{size}; {memory}", markup=False)


def _size(parameters: int, nodes: int) -> str:
    return f"{nodes} nodes, {parameters:,} parameters"


def _input(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, shape = text.partition("=")
    try:
        sides = tuple(int(side) for side in shape.split("x"))
    except ValueError as error:
        raise ConfigurationError(f"--input {text}: write NAME=SHAPE, such as image=1x28x28") from error
    if not name or min(sides) < 1:
        raise ConfigurationError(f"--input {text}: write NAME=SHAPE, such as image=1x28x28")
    return name, sides
