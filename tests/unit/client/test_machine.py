"""A site tests its machine: no private round where a record's result depends on the records beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support import studies
from torch import Tensor, nn

from consilium_client.agent.machine import FindingFiles, Machine
from consilium_client.commands.checks import resources as doctor
from consilium_client.training import evaluation, fit, neighbours
from consilium_client.training.fit import Finding, fitting
from consilium_client.training.neighbours import dependence
from consilium_client.training.rehearsal import largest
from consilium_shared.errors import ConsiliumError, MachineError
from consilium_shared.models import build
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.protocol.messages import Update
from consilium_shared.study import Study
from dpsgd import device

CPU = torch.device("cpu")
VARIABLES = [{"name": f"v{i}"} for i in range(3)]
DATA: dict[str, dict[str, Any]] = {
    "tabular": {"features": [{"name": f"f{i}"} for i in range(7)]},
    "image": {"image": {"size": 16}},
    "sequence": {"series": {"variables": VARIABLES, "bins": 5, "step_minutes": 60, "statics": [{"name": "age"}]}},
}
MODELS = {"logistic": "tabular", "mlp": "tabular", "gru": "sequence", "small-cnn": "image"}


def a_study(name: str = "mlp", **training: Any) -> Study:
    return studies.study(
        {"name": name, "hidden": 13},
        DATA[MODELS[name]],
        training={"expected_batch": 8, **training},
        privacy={"epsilon": 2.0, "delta": 1e-4, "clipping_norm": 1.0},
    )


def a_plan(study: Study) -> PrivacyPlan:
    return PrivacyPlan(0.5, 1.0, 1.0, 1, 1, 1e-4, 2.0, records_per_patient=study.training.records_per_patient)


Kernel = Callable[[Tensor], Tensor]


def with_kernel(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    """Inputs of every model's last layer go through a kernel first."""

    def built(study: Study) -> nn.Module:
        model = build(study)
        model.head.register_forward_pre_hook(lambda _, given: (kernel(given[0]),))  # type: ignore[union-attr]
        return model

    monkeypatch.setattr(neighbours, "build", built)
    monkeypatch.setattr(evaluation, "build", built)


def last_bits(rows: Tensor, chosen: Tensor) -> Tensor:
    """The last bits of the chosen rows are others."""
    return rows * torch.where(chosen, 1.0 + 2.0**-23, 1.0).view(-1, 1)


def by_place(rows: Tensor) -> Tensor:
    return last_bits(rows, torch.arange(len(rows)) >= 16)


def by_neighbours(rows: Tensor) -> Tensor:
    """What one path of a product does where most of its rows are there, and another where they are not."""
    different = len(torch.unique(rows.detach().nan_to_num(), dim=0))
    return last_bits(rows, torch.full((len(rows),), different > 20))


def by_one_large_neighbour(rows: Tensor) -> Tensor:
    return last_bits(rows, (rows.detach().nan_to_num().abs().amax() > 1e20).expand(len(rows)))


TURNS = [0]


def by_turn(rows: Tensor) -> Tensor:
    """Never the same twice, as sums without an order are."""
    TURNS[0] += 1
    return last_bits(rows, (torch.arange(len(rows)) + TURNS[0]) % 3 == 0)


@pytest.mark.parametrize("engine", ["book-keeping", "opacus"])
@pytest.mark.parametrize("name", MODELS)
def test_kernels_here_give_a_record_the_same_bits_everywhere(name: str, engine: Any) -> None:
    for rows in (32, 1):
        assert dependence(a_study(name), CPU, engine, rows) == ""


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("mlp", {"records_per_patient": 5}),
        ("gru", {"precision": "bfloat16"}),
        ("small-cnn", {"augment": "light", "augment_multiplicity": 2, "records_per_patient": 3}),
    ],
)
def test_so_they_do_where_patients_have_several_rows_and_in_other_precisions(name: str, training: Any) -> None:
    assert dependence(a_study(name, **training), CPU, "book-keeping", 32) == ""


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kernel", [by_place, by_neighbours])
def test_the_last_bit_of_one_number_that_follows_place_or_neighbours_is_seen(
    name: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_kernel(monkeypatch, kernel)
    assert dependence(a_study(name), CPU, "book-keeping", 32) == "a record's gradient depends on the records beside it"
    assert dependence(a_study(name), CPU, "book-keeping", 1) == ""


def test_what_only_predictions_show_is_seen_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernel(monkeypatch, by_place)
    monkeypatch.setattr(neighbours, "_of_gradients", lambda *_: "")
    assert dependence(a_study(), CPU, "book-keeping", 32) == "a record's prediction depends on the records beside it"


def test_the_study_is_then_computed_one_patient_at_a_time_and_refused_where_not_even_that_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = a_study("logistic")
    assert fitting(study, a_plan(study), "cpu", "book-keeping")[:2] == (CPU, 32)
    with monkeypatch.context() as patch:
        with_kernel(patch, by_one_large_neighbour)
        assert fitting(study, a_plan(study), "cpu", "book-keeping")[:2] == (CPU, 1)
    with_kernel(monkeypatch, by_turn)
    with pytest.raises(MachineError, match=r"even with each patient alone .* no private round runs here.*device: cpu"):
        fitting(study, a_plan(study), "cpu", "book-keeping")


def test_a_device_that_may_be_chosen_freely_gives_way_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of another kind stands for a GPU: what it computes is never asked."""
    other, tested = torch.device("meta"), []

    def chosen(name: str = "auto") -> torch.device:
        return CPU if name == "cpu" else other

    def test(study: Study, where: torch.device, engine: str, rows: int) -> str:
        tested.append((where.type, rows))
        return "its rows differ" if where == other else ""

    monkeypatch.setattr(device, "choose", chosen)
    monkeypatch.setattr(fit, "dependence", test)
    study = a_study(expected_batch=200)
    assert fitting(study, a_plan(study), "auto", "book-keeping")[:2] == (CPU, 32)
    assert tested == [("meta", 128), ("meta", 32), ("meta", 1), ("cpu", 32)]
    with pytest.raises(MachineError, match="its rows differ"):
        fitting(study, a_plan(study), "cuda", "book-keeping")
    monkeypatch.setattr(fit, "rehearse", lambda *_: None)
    monkeypatch.setattr(fit, "dependence", lambda _, where, engine, rows: "its rows differ" if rows > 32 else "")
    assert fitting(study, a_plan(study), "cuda", "book-keeping")[:2] == (other, 32)
    monkeypatch.setattr(fit, "dependence", lambda *_: "")
    assert fitting(study, a_plan(study), "cuda", "book-keeping")[:2] == (other, 128)
    assert fitting(a_study(), a_plan(a_study()), "cuda", "book-keeping").rows == 32  # its steps are not as large


def test_a_finding_is_kept_until_anything_that_it_depends_on_is_another(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = []

    def test(study: Study, where: torch.device, engine: str, rows: int) -> str:
        tested.append(study.model.name)
        return ""

    monkeypatch.setattr(fit, "dependence", test)

    def run(study: Study) -> int:
        tested.clear()
        for _ in range(2):
            assert Machine(tmp_path).fit(study, a_plan(study), "cpu", "book-keeping").rows == 32
        return len(tested)

    assert run(a_study()) == 1
    assert run(a_study()) == 0
    assert run(a_study(rounds=7)) == 0
    assert run(a_study(precision="bfloat16")) == 1
    assert run(a_study(focal=2.0)) == 1
    assert run(a_study(records_per_patient=2)) == 1
    assert run(a_study("logistic")) == 1
    for name in ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "NVIDIA_TF32_OVERRIDE"):
        monkeypatch.setenv(name, "another")
        assert run(a_study()) == 1
    monkeypatch.setenv("LANG", "another")
    assert run(a_study()) == 0
    monkeypatch.setattr(fit, "_processor", lambda: "another")
    assert run(a_study()) == 1
    for file in tmp_path.glob("*.json"):
        file.write_bytes(b"{}")
    assert run(a_study()) == 1


def test_a_test_that_broke_off_is_made_again_once_there_is_memory(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any) -> str:
        raise MemoryError("of 3 GiB")

    study, machine = a_study(), Machine(tmp_path)
    with monkeypatch.context() as today:
        today.setattr(fit, "dependence", short)
        with pytest.raises(MachineError, match="MemoryError: of 3 GiB"):
            machine.fit(study, a_plan(study), "cpu", "book-keeping")
    assert machine.fit(study, a_plan(study), "cpu", "book-keeping").rows == 32


def test_a_finding_reads_as_it_was_written_and_is_nobodys_elses(tmp_path: Any) -> None:
    files, machine = FindingFiles(tmp_path), {"device": "cpu"}
    about = {"machine": machine, "model": {"name": "mlp"}}
    assert files.get(about) is None
    files.put(about, Finding(32, "in pieces of 64 it did not"))
    assert files.get(about) == (32, "in pieces of 64 it did not")
    assert [*files.all(machine)] == [("mlp", (32, "in pieces of 64 it did not"))]
    assert [*files.all({"device": "cuda"})] == []


def test_a_site_whose_kernels_fail_is_charged_nothing_and_doctor_says_why(
    site: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    c, home = site.coordinator, site.coordinator.site
    site.approve()
    assert doctor._rows(home) == "no private study yet; before the first, its model is tested here"
    with_kernel(monkeypatch, by_turn)
    refusal = site.ask(c.train(), c.model)
    said = "the site's machine cannot compute the study with privacy; its log says why"
    assert (refusal.reason, refusal.detail) == ("internal", said)
    assert "a record's gradient depends on the records beside it" in caplog.text
    assert site.charges() == 0
    with pytest.raises(ConsiliumError, match=r"logistic: .*depends on the records beside it"):
        doctor._rows(home)
    monkeypatch.undo()
    for file in (home.store / "machine").glob("*.json"):
        file.unlink()
    assert isinstance(site.ask(c.train(), c.model), Update)
    assert doctor._rows(home) == "no record's result depends on another's, with logistic"


def test_what_is_rehearsed_is_what_is_used() -> None:
    assert largest(1, 1, 1) == [[1]]
    assert largest(32, 4, 1) == [[1] * 32, [1] * 28 + [4]]
    assert largest(32, 64, 1)[-1] == [64]
