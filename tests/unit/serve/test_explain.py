"""An explanation tells of this model and this record: exact where it can be, gone when the weights are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.support import published
from tests.support.published import IMAGE, SERIES, TABLE, study
from tests.unit.serve.conftest import Bundles

from consilium_serve.explain import explain, parts_of, shapley
from consilium_serve.model import Model
from consilium_shared.preparation.declared import invented
from consilium_shared.protocol.bundle import open_bundle


def model(bundles: Bundles, name: str) -> Model:
    return Model(open_bundle(bundles[name], bundles.fingerprint))


def test_shapley_values_share_out_a_game() -> None:
    """The glove game: the first part needs one of the other two."""
    values, whole = shapley(lambda taken: (taken[:, 0] & (taken[:, 1] | taken[:, 2])).astype(float), 3)
    assert values == pytest.approx([2 / 3, 1 / 6, 1 / 6]) and whole == 1.0


@pytest.mark.parametrize("parts", [4, 20])
def test_the_values_of_a_sum_are_its_terms_and_always_add_up(parts: int) -> None:
    terms = np.random.default_rng(1).normal(size=parts)
    values, whole = shapley(lambda taken: taken @ terms, parts)
    np.testing.assert_allclose(values, terms, atol=1e-12)
    assert whole == pytest.approx(terms.sum())
    values, whole = shapley(lambda taken: (taken @ terms) ** 2, parts)
    assert values.sum() == pytest.approx(whole) == pytest.approx(terms.sum() ** 2)


def test_of_a_linear_model_it_is_exact(bundles: Bundles) -> None:
    made = model(bundles, "table")
    _, prepared = invented(made.study)
    told = explain(made, prepared)
    record, zero = prepared.inputs["record"], np.zeros_like(prepared.inputs["record"])
    sign = 1 if told["class"] == "yes" else -1
    for name, places in (("age", [0]), ("pain", [1, 2, 3]), ("chol", [4])):
        alone = zero.copy()
        alone[places] = record[places]
        logits = made.run({"record": np.stack([alone, zero])})["logits"]
        difference = sign * ((logits[0, 1] - logits[0, 0]) - (logits[1, 1] - logits[1, 0]))
        assert told["parts"][name] == pytest.approx(float(difference), abs=1e-5)


@pytest.mark.parametrize(("name", "data"), [("table", TABLE), ("series", SERIES), ("image", IMAGE)])
def test_the_parts_are_the_whole_record_and_add_up(bundles: Bundles, name: str, data: dict[str, Any]) -> None:
    made = model(bundles, name)
    _, prepared = invented(made.study)
    parts, nothing = parts_of(made.study, prepared.inputs)
    for key, values in prepared.inputs.items():
        covered = np.sum([part.masks[key] for part in parts if key in part.masks], axis=0)
        assert covered.shape == values.shape and (covered == 1).all()
    told = explain(made, prepared)
    shared = np.sum(told["tiles"]) if "tiles" in told else sum(told["parts"].values())
    both = {key: np.stack([values, nothing[key]]) for key, values in prepared.inputs.items()}
    logits = made.run(both)["logits"].astype(float)
    chosen = made.predictions.names.index(told["class"])
    margins = logits[:, chosen] - logits[:, 1 - chosen]
    assert shared == pytest.approx(told["adds_up_to"], abs=1e-6) == pytest.approx(margins[0] - margins[1], abs=1e-5)
    assert explain(made, prepared) == told


def test_taking_away_what_matters_most_changes_the_answer_most(bundles: Bundles) -> None:
    """A deletion curve: tiles in the order of the explanation against the reverse order."""
    made = model(bundles, "image")
    _, prepared = invented(made.study)
    told = explain(made, prepared)
    chosen = made.predictions.names.index(told["class"])
    parts, nothing = parts_of(made.study, prepared.inputs)
    order = np.argsort(-np.ravel(told["tiles"]))

    def area(places: Any) -> float:
        image, found = prepared.inputs["image"].copy(), []
        for place in places:
            image[parts[place].masks["image"]] = nothing["image"][parts[place].masks["image"]]
            logits = made.run({"image": image[None]})["logits"][0]
            found.append(float(logits[chosen] - logits[1 - chosen]))
        return float(np.mean(found))

    assert area(order) < area(order[::-1])


def test_other_weights_give_another_explanation(bundles: Bundles) -> None:
    """A map that did not depend on the weights would show the image and not the model (Adebayo et al. 2018)."""
    given = study("small-cnn", IMAGE)
    home = bundles.coordinator
    _, prepared = invented(given)
    maps = []
    for seed in (0, 11, 12):
        found = published.files(home, given, seed)
        path = bundles.folder / f"image-{seed}"
        path.mkdir(exist_ok=True)
        for name, data in found.items():
            (path / name).write_bytes(data)
        maps.append(np.ravel(explain(Model(open_bundle(path, bundles.fingerprint)), prepared)["tiles"]))
    ranks = [np.argsort(np.argsort(np.abs(each))) for each in maps]
    alike = [abs(float(np.corrcoef(ranks[0], each)[0, 1])) for each in ranks[1:]]
    assert max(alike) < 0.7
