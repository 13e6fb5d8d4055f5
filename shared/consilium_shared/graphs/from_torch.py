"""Scientist's own module, traced on the scientist's machine into a graph. Only a person's own code is run here.

``torch.fx`` follows the module's ``forward``; every step becomes a node of the graph, or is refused with its line in
the file and what to use instead. In the end the graph is held against the module on random records.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import fx, nn

from consilium_shared.errors import ConfigurationError
from consilium_shared.graphs import network, weights
from consilium_shared.graphs.conversion import Conversion, Refused
from consilium_shared.graphs.graph import Graph
from consilium_shared.graphs.node import Shape

BatchNorm = Literal["refuse", "group", "frozen"]

TOLERANCE = 1e-4
"""Largest difference between the graph and the module, for each unit of the largest output."""


class Traced(NamedTuple):
    """Module as a graph.

    Attributes:
        graph: the graph.
        weights: the module's present weights, under the graph's names.
        notes: what a person should know of the conversion.
    """

    graph: Graph
    weights: dict[str, np.ndarray[Any, np.dtype[np.float32]]]
    notes: tuple[str, ...]


class _Tracer(fx.Tracer):
    record_stack_traces = True


def load(file: Path, name: str | None = None) -> nn.Module:
    """Module that a person's file defines: runs the file.

    Args:
        file: Python.
        name: of a class without arguments, a function that gives the module, or the module; None: the only class.

    Raises:
        ConfigurationError: there is none such, or the file fails; with the file's own error.
    """
    spec = importlib.util.spec_from_file_location("_a_scientists_module", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ConfigurationError(f"{file} is no Python file that can be read")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as dataclasses and inspect ask for it
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
        found = getattr(module, name, None) if name else _only(module, file)
        if found is None:
            raise ConfigurationError(f"{file} has no {name}")
        made = found if isinstance(found, nn.Module) else found()
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(f"{file}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    finally:
        sys.path.remove(str(file.parent))
    if not isinstance(made, nn.Module):
        raise ConfigurationError(f"{file}: {name} gives a {type(made).__name__}, not a torch module")
    return made


def _only(module: Any, file: Path) -> type[nn.Module]:
    own = [
        each
        for _, each in inspect.getmembers(module, inspect.isclass)
        if issubclass(each, nn.Module) and each.__module__ == module.__name__
    ]
    if len(own) != 1:
        names = ", ".join(each.__name__ for each in own) or "none"
        raise ConfigurationError(f"{file} has not one module ({names}); name it with --module NAME")
    return own[0]


def trace(
    module: nn.Module, inputs: Mapping[str, Shape], *, batch_norm: BatchNorm = "refuse", file: Path | None = None
) -> Traced:
    """Graph of a module.

    Args:
        module: the scientist's.
        inputs: shape of one record in each of the task's inputs, in the order of ``forward``.
        batch_norm: ``group`` puts a group norm in the place of each, ``frozen`` folds in the statistics that it has.
        file: where it is written, for errors.

    Raises:
        ConfigurationError: a step that a graph has not, with its line and what to use instead.
    """
    try:
        traced = _Tracer().trace(module.train())  # so that a dropout's ``self.training`` is true
    except Exception as error:  # of the tracer, or of the person's own code
        raise ConfigurationError(
            f"{_where(error, file)}the module cannot be followed ({' '.join(str(error).split())[:200]}). What forward "
            "does must not depend on the numbers of a record: no if, no loop over them"
        ) from error
    module.eval()
    conversion = Conversion(module, inputs, batch_norm)
    for node in traced.nodes:
        try:
            conversion.step(node)
        except (Refused, ValueError) as error:
            line = _line(node, file)
            raise ConfigurationError(f"{line}{_called(node)}: {error}") from error
    graph, found = conversion.finished()
    if batch_norm != "group":
        _same(module, graph, found, inputs, conversion.changed)
    return Traced(graph, found, tuple(conversion.notes))


def _same(
    module: nn.Module,
    graph: Graph,
    found: Mapping[str, np.ndarray[Any, Any]],
    inputs: Mapping[str, Shape],
    changed: str,
) -> None:
    """Raises ConfigurationError where the graph, with the module's weights, answers otherwise than the module."""
    model = network.Network(graph, list(inputs)).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in found.items()})
    draw = torch.Generator().manual_seed(0)
    records = [torch.randn(3, *shape, generator=draw) for shape in inputs.values()]
    with torch.no_grad():
        there, here = module(*records), model(*records)
        if changed == "softmax":
            here = torch.softmax(here, -1)
        elif changed == "log_softmax":
            here = torch.log_softmax(here, -1)
        elif changed == "sigmoid of one":
            here = torch.softmax(here, -1)[:, 1:]
        elif changed == "sigmoid":
            here = torch.sigmoid(here)
    worst = float((there - here).abs().max()) / max(1.0, float(there.abs().max()))
    if there.shape != here.shape or not worst <= TOLERANCE:
        raise ConfigurationError(
            f"the graph does not compute what the module computes (they differ by {worst:.1g}); please report it"
        )


def put(module: nn.Module, file: Path) -> None:
    """Load a file of weights into the module; raises ConfigurationError where it is of another module."""
    found = weights.read(file).weights
    own = module.state_dict()
    values = {
        name: torch.from_numpy(found[name]).to(own[name].dtype).reshape(own[name].shape)
        for name in own
        if name in found and found[name].size == own[name].numel()
    }
    missing = [name for name in own if name not in values and not name.endswith("num_batches_tracked")]
    if missing:
        raise ConfigurationError(f"{file} has not what the module has: {weights.listed(missing)}")
    module.load_state_dict(values, strict=False)


def _line(node: fx.Node, file: Path | None) -> str:
    places = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    own = [place for place in places if file is not None and Path(place[0]).resolve() == file.resolve()]
    return f"{own[-1][0]}:{own[-1][1]}: " if own else ""


def _where(error: BaseException, file: Path | None) -> str:
    found, here = "", error.__traceback__
    while here is not None:
        if file is not None and Path(here.tb_frame.f_code.co_filename).resolve() == file.resolve():
            found = f"{file}:{here.tb_lineno}: "
        here = here.tb_next
    return found


def _called(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{node.op.removeprefix('call_').replace('_', ' ')} {target}"
