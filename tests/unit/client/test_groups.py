"""Evaluation by groups that the contract lists: whose record is in which, and no small group shows alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.support import studies
from tests.support.datasets import load
from tests.support.records import dataset

from consilium_client.commands import screen
from consilium_client.data.asset import TableAsset
from consilium_client.data.groups import groups_of, merged
from consilium_client.data.report import SetAside
from consilium_client.training.evaluation import evaluate, noised_counts
from consilium_server.study.figures import Figures
from consilium_shared.groups import NOT_GIVEN
from consilium_shared.metrics import Layout
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.protocol.summand import Opened
from consilium_shared.study import Study

CPU = torch.device("cpu")
SEX: dict[str, Any] = {"column": "sex", "groups": ["f", "m"]}
AGE: dict[str, Any] = {"column": "age", "borders": [40, 65], "unit": "a"}
PRIVATE = {"epsilon": 2.0, "delta": 1e-4, "clipping_norm": 1.0}


def study(*by: dict[str, Any], private: bool = False, **evaluation: Any) -> Study:
    return studies.study(
        privacy=PRIVATE if private else studies.OPEN,
        evaluation={"by": by, **({"epsilon": 1.0} if private else {}), **evaluation},
    )


ROWS = {
    "patient": ["1", "2", "3", "4", "5", "6"],
    "a": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
    "b": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
    "y": ["0", "1", "0", "1", "0", "1"],
    "Geschlecht": ["w", "m", "", "x", "w", "99"],
    "months": ["479", "480", "779.5", "780", "unknown", ""],
}


def test_a_record_is_in_the_group_that_its_sites_own_words_and_units_say(tmp_path: Path) -> None:
    pd.DataFrame(ROWS).to_csv(tmp_path / "t.csv", index=False)
    asset = TableAsset(
        kind="table",
        path=tmp_path / "t.csv",
        columns={"sex": "Geschlecht", "age": "months"},
        values={"sex": {"w": "f"}},
        missing_in={"sex": ("99",)},
        units={"age": "mo"},
    )
    found = load(asset, study(SEX, AGE))
    assert found.groups is not None
    assert found.groups.tolist() == [[0, 0], [1, 1], [2, 1], [2, 2], [0, 3], [2, 3]]
    assert found.report.notes.counts["sex: not given, or none of the study's groups"] == 3
    assert load(asset, study()).groups is None


def test_who_has_no_such_column_has_given_nothing() -> None:
    """As pictures whose table is made of their paths."""
    asset = TableAsset(kind="table", path=Path("t.csv"))
    found = groups_of(pd.DataFrame({"patient": ["1", "2"]}), study(SEX, AGE), asset, SetAside())
    assert found is not None
    assert found.tolist() == [[2, 3], [2, 3]]


@pytest.mark.parametrize(
    ("by", "said"),
    [
        ([{"column": "sex"}], "give groups"),
        ([{**SEX, "borders": [1]}], "give groups"),
        ([{"column": "sex", "groups": ["f", NOT_GIVEN]}], "always there"),
        ([{"column": "age", "borders": [65, 40]}], "borders ascend"),
        ([SEX, SEX], "each column once"),
        ([{"column": f"c{n}", "groups": [str(g) for g in range(20)]} for n in range(3)], "more than 60 groups"),
    ],
)
def test_groups_that_are_none_are_refused(by: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        study(*by)


# -- small groups


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=60),
    st.integers(1, 12),
)
def test_without_privacy_nobody_shows_in_a_group_of_few(records: list[tuple[int, int, int]], least: int) -> None:
    """But where all of the site's patients together are few: then they are one group, and nothing is told apart."""
    patients, *columns = (np.array(each) for each in zip(*records, strict=True))
    groups = np.stack(columns, axis=1)
    found = merged(groups, patients, study(SEX, AGE), least)
    for column, names in enumerate((3, 4)):
        sizes = [len(set(patients[found[:, column] == group])) for group in range(names)]
        assert all(size == 0 or size >= least for size in sizes) or sizes.count(0) == names - 1
        kept = found[:, column] == groups[:, column]
        assert (kept | (found[:, column] == names - 1)).all()


def data(count: int = 300) -> Any:
    draw = np.random.default_rng(0)
    inputs = draw.standard_normal((count, 2)).astype(np.float32)
    found = dataset(
        inputs=inputs,
        statics=None,
        labels=(inputs[:, 0] > 0).astype(np.int64),
        patients=np.arange(count),
        patient_count=count,
        train=np.arange(count) % 3 == 0,
    )
    groups = np.stack([np.arange(count) % 2, np.minimum(np.arange(count) // 100, 3)], axis=1)
    groups[1] = [2, 3]  # the only one who has given nothing
    return dataclasses.replace(found, groups=groups)


def test_with_privacy_nobodys_group_depends_on_who_else_is_there() -> None:
    asked, records = study(SEX, AGE, private=True), data()
    start = pack(to_vector(build(asked)), asked)
    layout: Any = Layout.of(asked)
    everybody = noised_counts(start, asked, records, CPU, noise_multiplier=1e-9, seed=bytes(32))
    fewer = dataclasses.replace(records, train=records.train | (np.arange(len(records)) == 1))
    without = noised_counts(start, asked, fewer, CPU, noise_multiplier=1e-9, seed=bytes(32))
    moved = (everybody - without)[layout.at]
    assert {tuple(row) for row in np.argwhere(moved)} == {
        (group, cell) for group in (2, 3 + 3) for cell in np.flatnonzero(moved[2])
    }
    for block, numbers in layout.parts(everybody - without).items():
        assert np.linalg.norm(numbers) <= next(b.moved for b in layout.blocks if b.name == block) + 1e-9


def test_the_record_has_each_groups_metrics_and_share_and_of_all_what_it_had_without() -> None:
    asked, plain, records = study(SEX, AGE), study(), data()
    start = pack(to_vector(build(asked)), asked)
    found, why = of(asked, evaluate(start, asked, records, CPU, Layout.of(asked), least=10))
    other, _ = of(plain, evaluate(pack(to_vector(build(plain)), plain), plain, records, CPU, Layout.of(plain)))
    assert why is None
    assert found is not None and other is not None
    assert {name: found[name] for name in ("auroc", "accuracy")} == pytest.approx(
        {name: other[name] for name in ("auroc", "accuracy")}
    )
    sex, age = found["parts"]["by sex"], found["parts"]["by age"]
    assert list(sex) == ["f", "m", "not given"]
    # One has given nothing: fewer than 10, so the smaller of the others is moved there, too.
    assert sorted(each["share"] for each in sex.values()) == pytest.approx([0.0, 0.5, 0.5], abs=0.01)
    assert sum(each["share"] for each in age.values()) == pytest.approx(1)
    assert all(set(each) >= {"share", "auroc", "accuracy"} for each in (*sex.values(), *age.values()))


def of(asked: Study, counts: Any) -> Any:
    return Figures(asked).of(Opened(np.zeros(0, np.float32), 0, 4, counts, None))


def test_noised_metrics_of_a_group_have_intervals_that_hold_the_true_one() -> None:
    asked, records, held = study(SEX, private=True, metrics=["auroc", "ece"]), data(9000), 0
    start = pack(np.array([-1, 0, 1, 0, 0, 0], np.float32), asked)
    noise = Figures(asked).noise
    assert noise is not None
    exact = noised_counts(start, asked, records, CPU, noise_multiplier=1e-9, seed=bytes(32))
    sharp, _ = of(asked, exact)
    for run in range(12):
        found, _ = of(
            asked, noised_counts(start, asked, records, CPU, noise_multiplier=2.0 * noise, seed=bytes([run] * 32))
        )
        for name in ("f", "m"):
            low, high = found["parts"]["by sex"][name]["interval"]["auroc"]
            held += low <= sharp["parts"]["by sex"][name]["auroc"] <= high
    assert held >= 22


def test_a_hospital_reads_the_groups_before_it_approves() -> None:
    shown = [line[0] for line in screen.groups(study(SEX, AGE).contract["evaluation"])]
    assert shown == [
        "             also by sex: f, m, not given",
        "             also by age: below 40, 40 to below 65, 65 and above, not given",
    ]
    assert not [*screen.groups({})]
