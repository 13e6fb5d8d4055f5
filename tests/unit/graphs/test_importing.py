"""Published weights become those of a study's model: by their names, with batch norms folded, said what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from tests.support.studies import contract
from torch import nn
from typer.testing import CliRunner

from consilium_client.commands import screen
from consilium_server.commands import cli
from consilium_shared import study_file
from consilium_shared.errors import ConfigurationError
from consilium_shared.graphs import from_torch, weights
from consilium_shared.graphs.importing import Imported, Wishes, imported
from consilium_shared.models import build
from consilium_shared.models.vector import fingerprint, load_vector, to_vector
from consilium_shared.study import Study

SIDE = 8


class Block(nn.Module):
    """Residual block of a published network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.bn2 = nn.BatchNorm2d(width, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))


class Net(nn.Module):
    """Published network: batch norms with statistics of their own, another number of classes."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.block = Block(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.fc(self.block(self.stem(image)).mean((2, 3)))


def published(channels: int = 1) -> Net:
    torch.manual_seed(channels)
    net = Net(channels)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.2, 3.0)  # type: ignore[union-attr]
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return net.eval()


def study(**model: Any) -> Study:
    """A study whose graph is the network without its norms."""
    graph = from_torch.trace(published(), {"image": (1, SIDE, SIDE)}, batch_norm="frozen").graph
    content = yaml.safe_load(graph.text())
    return Study.model_validate(
        contract({"name": "graph", "graph": content, **model}, {"image": {"size": SIDE}}, name="imports")
    )


def given(state: dict[str, torch.Tensor], folder: Path) -> weights.Source:
    torch.save(state, folder / "net.pt")
    return weights.read(folder / "net.pt")


def answers(found: Imported, of: Study, images: torch.Tensor) -> torch.Tensor:
    """Answers of the study's model with the weights put in."""
    model = build(of)
    own = [found.weights.get(name, p.detach().numpy()).ravel() for name, p in model.named_parameters()]
    load_vector(model, np.concatenate(own))
    with torch.no_grad():
        out: torch.Tensor = model.eval()(images)
        return out


IMAGES = torch.randn(3, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
HEAD = Wishes(renames={"fc.": "head."})


@pytest.mark.parametrize("wishes", [HEAD, Wishes(in_order=True)], ids=["by name", "in order"])
@pytest.mark.parametrize("before", ["", "module.encoder."])
def test_the_model_answers_as_the_published_one_with_its_norms_folded_in(
    tmp_path: Path, wishes: Wishes, before: str
) -> None:
    net, own = published(), study()
    state = {before + name: value for name, value in net.state_dict().items()}
    wishes = wishes._replace(renames={before + "fc.": before + "head."} if wishes.renames else {})
    found = imported(given(state, tmp_path), own, wishes)
    assert [row.here for row in found.rows] == [name for name, _ in build(own).named_parameters()]
    assert {f"{before}{norm} folded in" for norm in ("stem.1", "block.bn1", "block.bn2")} == {
        row.how.rpartition("; ")[2] for row in found.rows if "folded" in row.how
    }
    with torch.no_grad():
        assert torch.allclose(answers(found, own, IMAGES), net(IMAGES), atol=1e-5)


def test_an_onnx_file_says_itself_which_layer_a_norm_follows(tmp_path: Path) -> None:
    net, own = published(), study()
    state = net.state_dict()
    names = {"stem.0.weight": "stem.0.weight", "g": "stem.1.weight", "b": "stem.1.bias"}
    names |= {"m": "stem.1.running_mean", "v": "stem.1.running_var"}
    held = [onnx.numpy_helper.from_array(state[there].numpy(), name) for name, there in names.items()]
    nodes = [
        onnx.helper.make_node("Conv", ["x", "stem.0.weight"], ["y"]),
        onnx.helper.make_node("BatchNormalization", ["y", "g", "b", "m", "v"], ["z"], name="norm", epsilon=1e-5),
    ]
    file = tmp_path / "net.onnx"
    for reader, said in ((None, ""), (onnx.helper.make_node("Relu", ["y"], ["also"]), "batch norm norm")):
        graph = onnx.helper.make_graph(nodes + ([reader] if reader else []), "g", [], [], held)
        file.write_bytes(onnx.helper.make_model(graph).SerializeToString())
        if said:  # what else reads the layer would get the norm's output
            with pytest.raises(ConfigurationError, match=said):
                imported(weights.read(file), own, Wishes())
            continue
        found = imported(weights.read(file), own, Wishes())
        expected = imported(given(net.state_dict(), tmp_path), own, HEAD)
        for name in ("stem_0.weight", "stem_0.bias"):
            assert np.allclose(found.weights[name], expected.weights[name], atol=1e-6)
        assert "head.weight" in found.seeded


def test_grey_images_get_what_the_published_model_says_of_them_in_colour(tmp_path: Path) -> None:
    net, own = published(channels=3), study()
    source = given(net.state_dict(), tmp_path)
    with pytest.raises(ConfigurationError, match="--grey adds up the colours"):
        imported(source, own, HEAD)
    found = imported(source, own, HEAD._replace(grey=True))
    with torch.no_grad():
        assert torch.allclose(answers(found, own, IMAGES), net(IMAGES.expand(-1, 3, -1, -1)), atol=1e-5)


def test_what_is_left_out_or_lacking_begins_from_the_seed_and_is_told(tmp_path: Path) -> None:
    found = imported(given(published().state_dict(), tmp_path), study(), Wishes(left_out=["fc.*"]))
    assert found.seeded == ("head.weight", "head.bias")
    assert found.left_out == ("fc.weight", "fc.bias")


def test_the_rank_of_an_addition_changes_nothing_of_what_is_imported(tmp_path: Path) -> None:
    source = given(published().state_dict(), tmp_path)
    plain, low = (imported(source, study(**model), HEAD) for model in ({}, {"trainable": "lora", "lora_rank": 1}))
    assert plain.rows == low.rows


@pytest.mark.parametrize(
    ("change", "wishes", "said"),
    [
        ({}, Wishes(), r"has no fc.weight \[2, 4\], fc.bias \[2\]; .* has not given head.weight \[2, 4\]"),
        ({"fc.weight": torch.zeros(3, 4)}, HEAD, r"fc.weight is \[3, 4\] in the file, and head.weight is \[2, 4\]"),
        ({"head.bias": torch.zeros(2)}, HEAD, "two arrays of the file become head.bias"),
        ({}, HEAD._replace(folds={"stem.7": "stem.0"}), "--fold stem.7: the file has the batch norms stem.1"),
        ({}, HEAD._replace(folds={"stem.1": "fc"}), "stem.1 has 4 channels, and fc has the weight"),
        ({"block.conv1.weight": None}, HEAD, "block.bn1: no layer of its module .* --fold block.bn1=LAYER"),
        ({}, Wishes(left_out=["*"]), "nothing of the study's model"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(
    tmp_path: Path, change: dict[str, torch.Tensor | None], wishes: Wishes, said: str
) -> None:
    state = {**published().state_dict(), **change}
    with pytest.raises(ConfigurationError, match=said):
        imported(given({name: each for name, each in state.items() if each is not None}, tmp_path), study(), wishes)


# -- the command, and what becomes of its card

WORDS = {"source": "A. N. Author, grey net", "licence": "MIT", "data": "radiographs of 3000 patients", "by": "B. Nurse"}


def command(folder: Path, **words: str) -> Any:
    """The command on a study's file that names a card which does not exist yet."""
    own = study().contract
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({**own, "model": {**own["model"], "start": "start.yaml"}}))
    torch.save(published().state_dict(), folder / "net.pt")
    told = [part for name, value in {**WORDS, **words}.items() for part in (f"--{name}", value)]
    named = [str(folder / name) for name in ("net.pt", "study.yaml", "start.safetensors")]
    return CliRunner().invoke(cli.app, ["import-weights", *named, *told, "--rename", "fc.=head."])


def test_the_contract_has_digest_and_card_and_everybody_is_told_them(tmp_path: Path) -> None:
    done = command(tmp_path)
    assert done.exit_code == 0, done.exception
    assert "folded in" in done.output
    contract_ = study_file.read(tmp_path / "study.yaml")
    assert cli._weights(tmp_path / "study.yaml", contract_, tmp_path / "start.safetensors", new_head=False)
    start = contract_.model.start
    assert start is not None and start.card is not None
    assert start.sha256 == fingerprint(to_vector_of(tmp_path), contract_)
    shown = "\n".join(line[0] for line in screen._start(contract_.contract["model"]["start"]))
    for text in (shown, start.said()):
        for word in (*WORDS.values(), start.sha256[:12], start.card.file, "nobody has checked"):
            assert word in text


def to_vector_of(folder: Path) -> np.ndarray:
    own = study()
    found = imported(weights.read(folder / "net.pt"), own, HEAD)
    model = build(own)
    load_vector(model, np.concatenate([found.weights[name].ravel() for name, _ in model.named_parameters()]))
    return to_vector(model)


def test_weights_without_a_card_are_said_to_be_without() -> None:
    start = study(start={"sha256": "ab" * 32}).contract["model"]["start"]
    for given_start in (start, {"sha256": start["sha256"]}):  # as new and as older contracts have it
        assert [*screen._start(given_start)] == [
            ("  weights    abababababab: nothing is said of whose data made them",)
        ]


@pytest.mark.parametrize("words", [{"data": "one\ntwo"}, {"licence": ""}, {"by": "\x1b[2J"}])
def test_a_card_is_plain_lines(tmp_path: Path, words: dict[str, str]) -> None:
    done = command(tmp_path, **words)
    assert isinstance(done.exception, ConfigurationError)
    assert str(done.exception).startswith(f"--{next(iter(words))}: ")
    assert not (tmp_path / "start.safetensors").exists()
