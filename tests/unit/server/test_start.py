"""A study may start from weights in a file: just those that its contract names, and every site sees to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tests.support.site import CONTRACT

from consilium_client.commands import screen
from consilium_client.commands.baseline import start_from
from consilium_server.commands import cli
from consilium_server.federation import Home
from consilium_server.state import study_folder
from consilium_shared.errors import ConfigurationError, IntegrityError
from consilium_shared.models import build, start
from consilium_shared.models.vector import fingerprint, pack, to_vector, trained, with_trained
from consilium_shared.protocol.messages import Counts, Refusal, Update
from consilium_shared.study import Study


def study(**model: Any) -> Study:
    return Study.model_validate({**CONTRACT, "model": {"name": "mlp", "hidden": 3, **model}})


def named(given: Study, vector: np.ndarray) -> Study:
    """The study, starting from these weights."""
    model = {**given.contract["model"], "start": {"sha256": fingerprint(vector, given)}}
    return Study.from_contract({**given.contract, "model": model})


def tensors(given: Study, add: float = 1.0) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() + np.float32(add) for name, p in build(given).named_parameters()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pretrained.safetensors"


def write(file: Path, content: dict[str, np.ndarray]) -> None:
    file.write_bytes(safetensors.numpy.save({name: np.ascontiguousarray(part) for name, part in content.items()}))


def test_a_whole_file_is_the_whole_start(file: Path) -> None:
    given = study()
    write(file, tensors(given))
    found = start.read(file, given)
    assert found.vector.tobytes() == (to_vector(build(given)) + np.float32(1)).tobytes()
    assert found.seeded == ()


def test_a_model_that_was_exported_is_a_start_of_another_study(file: Path) -> None:
    vector = to_vector(build(study(seed=7)))
    file.write_bytes(pack(vector, study(seed=7)))
    assert start.read(file, study(seed=8)).vector.tobytes() == vector.tobytes()


def test_what_a_file_lacks_starts_from_the_seed_and_is_told(file: Path) -> None:
    given = study(seed=3)
    write(file, {name: part for name, part in tensors(given).items() if not name.startswith("head.")})
    found = start.read(file, given)
    assert found.seeded == ("head.weight", "head.bias")
    assert "head.weight, head.bias" in found.lines()[-1]
    own, size = to_vector(build(given)), 3 * 2 + 2
    assert found.vector[-size:].tobytes() == own[-size:].tobytes()
    assert np.array_equal(found.vector[:-size], own[:-size] + np.float32(1))


def test_a_new_head_leaves_the_files_head_out_whatever_its_classes(file: Path) -> None:
    given = study()
    write(file, {**tensors(given), "head.weight": np.zeros((9, 3), np.float32), "head.bias": np.zeros(9, np.float32)})
    with pytest.raises(ConfigurationError, match=r"head.weight is F32 \[9, 3\] there .* --new-head"):
        start.read(file, given)
    assert start.read(file, given, new_head=True).seeded == ("head.weight", "head.bias")


def test_a_file_of_the_plain_model_starts_one_with_additions_of_low_rank(file: Path) -> None:
    plain, given = study(), study(trainable="lora", lora_rank=2)
    write(file, tensors(plain))
    found = start.read(file, given)
    assert found.seeded == ()
    model = build(given)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    parts = dict(zip(sizes, np.split(found.vector, np.cumsum(list(sizes.values()))[:-1]), strict=True))
    assert np.array_equal(parts["hidden.0.base.weight"], tensors(plain)["hidden.0.weight"].ravel())
    assert not parts["hidden.0.up.weight"].any()
    assert parts["hidden.0.down.weight"].any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tail.weight": np.zeros(3, np.float32)}, "the study's model has no tail.weight"),
        ({"head.bias": np.zeros(3, np.float32)}, r"head.bias is F32 \[3\] there and F32 \[2\] in the study's model"),
        ({"head.bias": np.zeros(2, np.float64)}, r"head.bias is F64 \[2\] there"),
        ({"head.bias": np.array([0, np.nan], np.float32)}, "head.bias has a number that is not finite"),
        ({"head.bias": np.array([0, np.inf], np.float32)}, "head.bias has a number that is not finite"),
    ],
)
def test_a_file_of_another_model_is_refused_with_what_differs(
    file: Path, change: dict[str, np.ndarray], said: str
) -> None:
    write(file, {**tensors(study()), **change})
    with pytest.raises(ConfigurationError, match=said):
        start.read(file, study())


def test_a_file_that_is_missing_empty_or_no_safetensors_is_refused(file: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read"):
        start.read(file, study())
    file.write_bytes(b"weights")
    with pytest.raises(ConfigurationError, match="safetensors"):
        start.read(file, study())
    write(file, {})
    with pytest.raises(ConfigurationError, match="nothing of it"):
        start.read(file, study())


# -- the coordinator


def test_the_coordinator_is_told_the_line_that_names_the_weights(file: Path) -> None:
    given = study()
    write(file, tensors(given))
    vector = start.read(file, given).vector
    with pytest.raises(ConfigurationError, match=f"start: {{sha256: {fingerprint(vector, given)}}}"):
        cli._weights(Path("study.yaml"), given, file, new_head=False)
    packed = cli._weights(Path("study.yaml"), named(given, vector), file, new_head=False)
    assert packed == pack(vector, named(given, vector))


def test_a_study_that_names_weights_starts_with_no_others(file: Path) -> None:
    given = named(study(), to_vector(build(study())))
    with pytest.raises(ConfigurationError, match="--weights FILE"):
        cli._weights(Path("study.yaml"), given, None, new_head=False)
    write(file, tensors(given))
    with pytest.raises(ConfigurationError, match=r"starts from .* \(model.start\)"):
        cli._weights(Path("study.yaml"), given, file, new_head=False)


def test_a_new_head_of_no_weights_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match="add --weights FILE, or leave --new-head out"):
        cli._weights(Path("study.yaml"), study(), None, new_head=True)


def test_the_studys_process_begins_with_the_weights_that_were_kept(coordinator: Any) -> None:
    vector = to_vector(build(study())) + np.float32(1)
    given, home = named(study(), vector), coordinator.home
    folder = study_folder.folder(home, given.study)
    folder.create(given, home.roster_file.read_bytes(), pack(vector, given))
    assert start.of(given, folder.start()).tobytes() == vector.tobytes()


def test_weights_that_were_changed_or_lost_on_the_disk_stop_the_study(coordinator: Any) -> None:
    vector = to_vector(build(study())) + np.float32(1)
    given, home = named(study(), vector), coordinator.home
    folder = study_folder.folder(home, given.study)
    folder.create(given, home.roster_file.read_bytes(), pack(vector, given))
    file = Home(home.root).studies / given.study / "start.safetensors"
    file.write_bytes(pack(vector + np.float32(1), given))
    with pytest.raises(IntegrityError, match="not those"):
        start.of(given, folder.start())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="safetensors"):
        start.of(given, folder.start())
    file.unlink()
    with pytest.raises(IntegrityError, match="backup"):
        folder.start()


def test_a_study_that_names_no_weights_begins_with_its_seeds(coordinator: Any) -> None:
    given, home = study(seed=4), coordinator.home
    folder = study_folder.folder(home, given.study)
    folder.create(given, home.roster_file.read_bytes())
    assert start.of(given, folder.start()).tobytes() == to_vector(build(given)).tobytes()


# -- a site


def begun(site: Any) -> tuple[Study, np.ndarray]:
    """A study that starts from weights, approved at the site."""
    vector = to_vector(build(study())) + np.float32(1)
    given = named(study(), vector)
    site.approve(given)
    site.coordinator.study = given
    return given, vector


def test_a_site_trains_in_round_one_from_the_named_weights_alone(site: Any) -> None:
    given, vector = begun(site)
    c = site.coordinator
    for other in (c.pack(given), pack(vector + np.float32(1), given)):
        answer = site.ask(c.train(1, other), other)
        assert isinstance(answer, Refusal) and answer.reason == "model"
    assert site.charges() == 0
    model = pack(vector, given)
    assert isinstance(site.ask(c.train(1, model), model), Update)
    assert site.charges() == 1


def test_a_site_trains_in_round_one_from_nothing_but_what_the_contracts_seed_gives(site: Any) -> None:
    given, c = study(seed=3), site.coordinator
    site.approve(given)
    c.study = given
    seeds = to_vector(build(given))
    crafted = seeds.copy()
    crafted[7] += np.float32(1e-4)
    for other in (pack(crafted, given), pack(to_vector(build(study(seed=4))), given)):
        answer = site.ask(c.train(1, other), other)
        assert isinstance(answer, Refusal) and answer.reason == "model"
    assert site.charges() == 0
    rounded = pack(np.nextafter(seeds, np.float32(2)), given)  # as a processor with other instructions may have it
    assert isinstance(site.ask(c.train(1, rounded), rounded), Update)
    assert site.charges() == 1


PARTS = [{"trainable": "head"}, {"trainable": "lora", "lora_rank": 2}]


def moved(vector: np.ndarray, given: Study, *, frozen: float = 0.0) -> bytes:
    """A model whose trained part is another, and of the rest one number by so much."""
    found = with_trained(vector, trained(vector, given) + np.float32(0.5), given)
    place = np.flatnonzero(with_trained(vector, trained(vector, given) + np.float32(1), given) == vector)[3]
    found[place] += np.float32(frozen)
    return pack(found, given)


@pytest.mark.parametrize("named_start", [True, False], ids=["of a file", "of the seed"])
@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_trained_cannot_be_exchanged_in_a_later_round(
    site: Any, part: dict[str, Any], named_start: bool
) -> None:
    """An attack: approved was the training of a part of known weights, and round two comes with other weights."""
    given, c = study(**part), site.coordinator
    vector = to_vector(build(given)) + np.float32(named_start)
    given = named(given, vector) if named_start else given
    site.approve(given)
    c.study, model = given, pack(vector, given)
    assert isinstance(site.ask(c.train(1, model), model), Update)
    charges = site.charges()
    for other in (moved(vector, given, frozen=1e-3), moved(vector, given, frozen=100.0)):
        answer = site.ask(c.train(2, other), other)
        assert isinstance(answer, Refusal) and answer.reason == "model"
    site.restart()
    swapped = moved(vector, given, frozen=1.0)
    answer = site.ask(c.train(2, swapped, attempt=2), swapped)
    assert isinstance(answer, Refusal) and answer.reason == "model"
    assert site.charges() == charges
    honest = moved(vector, given)
    assert isinstance(site.ask(c.train(2, honest, attempt=3), honest), Update)
    assert site.charges() > charges


@pytest.mark.parametrize("part", PARTS)
def test_a_model_to_count_on_has_what_is_not_trained_as_it_was_too(site: Any, part: dict[str, Any]) -> None:
    vector = to_vector(build(study(**part))) + np.float32(1)
    given, c = named(study(**part), vector), site.coordinator
    site.approve(given)
    c.study, model = given, pack(vector, given)
    assert isinstance(site.ask(c.train(1, model), model), Update)
    for number in (2, 3):
        model = moved(vector, given)
        assert isinstance(site.ask(c.train(number, model), model), Update)
    charges, swapped = site.charges(), moved(vector, given, frozen=1.0)
    answer = site.ask(c.evaluate(3, swapped), swapped)
    assert isinstance(answer, Refusal) and answer.reason == "model"
    assert site.charges() == charges
    honest = moved(vector, given)
    assert isinstance(site.ask(c.evaluate(3, honest, attempt=2), honest), Counts)


@pytest.mark.parametrize("part", PARTS)
def test_a_site_that_joins_later_holds_what_is_not_trained_against_the_contracts_seed(
    site: Any, part: dict[str, Any]
) -> None:
    given, c = study(**part), site.coordinator
    vector = to_vector(build(given))
    site.approve(given)
    c.study, swapped = given, moved(vector, given, frozen=1e-3)
    answer = site.ask(c.train(2, swapped), swapped)
    assert isinstance(answer, Refusal) and answer.reason == "model"
    assert site.charges() == 0
    honest = moved(vector, given)
    assert isinstance(site.ask(c.train(2, honest, attempt=2), honest), Update)


def test_from_round_two_on_the_model_is_what_training_made_of_it(site: Any) -> None:
    given, vector = begun(site)
    c, model = site.coordinator, pack(vector, given)
    assert isinstance(site.ask(c.train(1, model), model), Update)
    after = pack(vector + np.float32(0.5), given)
    assert isinstance(site.ask(c.train(2, after), after), Update)


def test_a_site_compares_itself_from_the_same_weights(file: Path) -> None:
    given = study()
    assert start_from(given, None) is None
    write(file, tensors(given))
    vector = start.read(file, given).vector
    found = start_from(named(given, vector), file)
    assert found is not None and found.tobytes() == vector.tobytes()
    with pytest.raises(ConfigurationError, match="--weights FILE"):
        start_from(named(given, vector), None)
    with pytest.raises(ConfigurationError, match="starts from"):
        start_from(named(given, vector + np.float32(1)), file)


def test_what_a_hospital_approves_says_what_is_trained_and_from_which_weights() -> None:
    given = study(trainable="lora", lora_rank=2, start={"sha256": "ab" * 32})
    said = "mlp, its last layer and rank 2, starting from weights abababababab"
    assert screen._model(given.contract["model"]) == said
    assert screen._model(study(trainable="head").contract["model"]) == "mlp, its last layer alone"
    assert screen._model(study().contract["model"]) == "mlp"
