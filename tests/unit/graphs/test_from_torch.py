"""A scientist's module becomes a graph that computes the same; what a graph has not is refused with its line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import Result
from typer.testing import CliRunner

from consilium_server.commands.cli import app
from consilium_shared.config import load_yaml
from consilium_shared.errors import ConfigurationError
from consilium_shared.graphs import from_torch, network
from consilium_shared.graphs.graph import Graph

FILE = Path(__file__).parent / "modules.py"
LINES = FILE.read_text().splitlines()

MODULES: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "TwoConvolutions": ({"image": (1, 28, 28)}, "log_softmax"),
    "LeNet": ({"image": (3, 32, 32)}, ""),
    "Table": ({"record": (10,)}, "sigmoid"),
    "SmallResNet": ({"image": (3, 16, 16)}, ""),
    "Recurrent": ({"series": (7, 6), "statics": (3,)}, ""),
    "Transformer": ({"series": (7, 6)}, ""),
    "UNet": ({"image": (1, 8, 8)}, ""),
}


def traced(name: str, batch_norm: Any = "frozen") -> tuple[torch.nn.Module, from_torch.Traced]:
    torch.manual_seed(3)
    module = from_torch.load(FILE, name)
    return module, from_torch.trace(module, MODULES[name][0], batch_norm=batch_norm, file=FILE)


@pytest.mark.parametrize("name", MODULES)
def test_the_graph_computes_what_the_module_does(name: str) -> None:
    module, found = traced(name)
    inputs, last = MODULES[name]
    again = Graph.model_validate(found.graph.model_dump(mode="json"))
    model = network.Network(again, list(inputs)).eval()
    model.load_state_dict({key: torch.from_numpy(value) for key, value in found.weights.items()})
    records = [torch.randn(5, *shape) for shape in inputs.values()]
    with torch.no_grad():
        here, there = model(*records), module.eval()(*records)
    if last == "log_softmax":
        here = torch.log_softmax(here, 1)
    elif last == "sigmoid":
        here = torch.softmax(here, 1)[:, 1:]
    assert torch.allclose(here, there, atol=1e-5)
    assert sum(each.size for each in found.weights.values()) == again.parameters
    network.check(again, list(inputs))
    assert any(node.name == "head" for node in again.nodes) == (name != "UNet")


def test_a_last_activation_is_left_to_the_loss_and_said() -> None:
    _, found = traced("TwoConvolutions")
    assert found.notes == ("the last softmax is left out: the study's loss and counts apply it",)
    assert [node.layer for node in found.graph.nodes].count("dropout") == 2
    _, found = traced("Table")
    assert found.graph.output == (2,)


def test_a_batch_norm_is_refused_replaced_or_folded() -> None:
    with pytest.raises(ConfigurationError, match=r"modules.py:\d+: .*--batch-norm group.*--batch-norm frozen") as error:
        traced("SmallResNet", "refuse")
    assert "self.before(x)" in LINES[int(str(error.value).split(":")[1]) - 1]
    _, found = traced("SmallResNet", "group")
    layers = [node.layer for node in found.graph.nodes]
    assert layers.count("group_norm") == 7
    assert any("in place of the batch norm" in note for note in found.notes)
    _, found = traced("SmallResNet", "frozen")
    layers = [node.layer for node in found.graph.nodes]
    assert "group_norm" not in layers
    assert sum("folded into" in note for note in found.notes) == 6
    assert sum("a scale and a shift" in note for note in found.notes) == 1


@pytest.mark.parametrize(
    ("name", "shape", "line", "why"),
    [
        ("Shared", (4,), "return self.layer(x)", "no shared weights"),
        ("Branching", (4,), "if x.sum() > 0:", "must not depend on the numbers of a record"),
        ("MixesByMean", (4,), "x.mean(0)", "along the batch, which would mix records"),
        ("MixesByShape", (4,), "x.view(4, -1)", "reshapes the batch away"),
        ("WithBuffer", (4,), None, "constant of the module.*use affine"),
        ("WithEmbedding", (4,), "self.words(x)", "a graph has no Embedding; no task gives whole numbers"),
        ("WithUpsampling", (1, 4, 4), "bilinear", "upsamples by bilinear; use nearest"),
    ],
)
def test_what_a_graph_has_not_is_refused_with_its_line_and_what_to_use_instead(
    name: str, shape: tuple[int, ...], line: str | None, why: str
) -> None:
    module = from_torch.load(FILE, name)
    with pytest.raises(ConfigurationError, match=why) as error:
        from_torch.trace(module, {"record": shape}, file=FILE)
    if line is not None:
        assert line in LINES[int(str(error.value).split(":")[1]) - 1]


def test_a_file_without_one_module_or_with_an_error_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has not one module \(.*LeNet.*--module NAME"):
        from_torch.load(FILE)
    with pytest.raises(ConfigurationError, match="has no Nothing"):
        from_torch.load(FILE, "Nothing")
    with pytest.raises(ConfigurationError, match="is no Python file"):
        from_torch.load(tmp_path / "none.py")
    broken = tmp_path / "broken.py"
    broken.write_text("import not_there_at_all\n")
    with pytest.raises(ConfigurationError, match="ModuleNotFoundError"):
        from_torch.load(broken)
    one = tmp_path / "one.py"
    one.write_text("from torch import nn\nclass Net(nn.Linear):\n    def __init__(self): super().__init__(3, 2)\n")
    assert isinstance(from_torch.load(one), torch.nn.Linear)


# -- the command


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["graph", *arguments])


def test_the_command_writes_a_graph_that_a_person_can_read_and_weights_to_start_from(tmp_path: Path) -> None:
    graph, weights, state = tmp_path / "net.yaml", tmp_path / "net.safetensors", tmp_path / "state.pt"
    torch.manual_seed(1)
    module = from_torch.load(FILE, "SmallResNet")
    torch.save(module.state_dict(), state)
    given = ["from-torch", str(FILE), str(graph), "--module", "SmallResNet", "--input", "image=3x16x16"]
    done = run(*given, "--batch-norm", "frozen", "--state", str(state), "--weights", str(weights))
    assert done.exit_code == 0, done.output
    assert "folded into" in done.output
    read = load_yaml(graph, Graph)
    assert re.search(r"  - \{name: avgpool, layer: mean, of: \w+, axes: \[1, 2\], keep: true\}", graph.read_text())
    model = network.Network(read, ["image"]).eval()
    model.load_state_dict(safetensors.torch.load_file(weights))
    pictures = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(model(pictures), module.eval()(pictures), atol=1e-5)
    shown = run("show", str(graph))
    assert shown.exit_code == 0
    assert f"{read.parameters:,} parameters" in shown.output
    assert isinstance(run(*given).exception, ConfigurationError), "a file that is there is not written over"


@pytest.mark.parametrize("given", ["image", "image=", "image=3xa", "image=0x3", "=3"])
def test_an_input_that_is_no_shape_is_told_as_such(given: str, tmp_path: Path) -> None:
    done = run("from-torch", str(FILE), str(tmp_path / "net.yaml"), "--module", "LeNet", "--input", given)
    assert "write NAME=SHAPE" in str(done.exception)


@pytest.mark.parametrize("name", MODULES)
def test_a_graph_written_for_people_is_the_same_graph(name: str, tmp_path: Path) -> None:
    _, found = traced(name)
    (tmp_path / "net.yaml").write_text(found.graph.text())
    assert load_yaml(tmp_path / "net.yaml", Graph) == found.graph
