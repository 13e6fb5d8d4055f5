"""What one site trained is nowhere at the coordinator: not in its programs' memory, not on its disk."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.support.live_files import contents, found

from consilium_client import data
from consilium_client.site import Home
from consilium_client.training.trainer import train
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector, unpack
from consilium_shared.privacy.plan import NonPrivatePlan
from consilium_shared.protocol.summand import bound, fixed_point, largest_weight
from consilium_shared.secagg.ring import DTYPES
from consilium_shared.study import Study

if TYPE_CHECKING:
    from tests.federation.conftest import Hospitals

SITES = ["north", "south", "west"]
WINDOW = 6
"""Coordinates that are searched for together: 24 bytes and more, which chance does not repeat."""


def updates(hospitals: Hospitals, study: Study) -> dict[str, tuple[np.ndarray[Any, Any], int]]:
    """Every site's bounded update of round 1 and its weight: the study's seed makes them again here."""
    model, found = pack(to_vector(build(study)), study), {}
    plan = NonPrivatePlan(study.training.steps_per_round, study.training.rounds)
    for site in SITES:
        home = Home(hospitals.site(site))
        records = data.load(home.config().assets[study.data.asset].at(home.root), study)
        result = train(model, study, records, plan, round=1, site=site, device=torch.device("cpu"), seed=bytes(32))
        bound(result.update, study)
        found[site] = result.update, result.patients
    return found


def forms(study: Study, update: np.ndarray[Any, Any], weight: int) -> set[bytes]:
    """Pieces of an update as it could lie in memory: plain, weighted, in other types, encoded."""
    encoded = np.empty(update.size, dtype=DTYPES[32])
    fixed_point(study, len(SITES)).encode(update, encoded, weight / largest_weight(study))
    vectors = [update, update * weight, update.astype("<f8"), update.astype("<f8") * weight, encoded]
    return {
        vector[start : start + WINDOW].tobytes()
        for vector in vectors
        for start in range(0, vector.size - WINDOW, WINDOW)
        if np.count_nonzero(vector[start : start + WINDOW]) == WINDOW
    }


def memory(pid: int) -> Iterator[bytes]:
    """Everything that a process can write to."""
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", 0) as content:
        for line in maps:
            span, rights = line.split()[:2]
            if "rw" in rights:
                start, end = (int(each, 16) for each in span.split("-"))
                content.seek(start)
                try:
                    yield content.read(end - start)
                except OSError:  # the kernel's own
                    continue


def files(folder: Path) -> Iterator[bytes]:
    """Every file below a folder."""
    return (content for _, content in contents(folder))


def test_the_model_is_that_of_plain_averaging_but_for_the_error_of_the_encoding(
    hospitals: Hospitals, contract: Callable[..., dict[str, Any]]
) -> None:
    asked = contract("averaged", private=False, rounds=1, steps_per_round=200)
    asked["aggregation"]["optimizer"] = {"name": "fedavg"}
    study = hospitals.run_study(asked)  # as the coordinator's program wrote it out
    trained = updates(hospitals, study).values()
    weight = sum(patients for _, patients in trained)
    mean = sum(update.astype(np.float64) * patients for update, patients in trained) / weight
    plain = to_vector(build(study)).astype(np.float64) + mean

    assert hospitals.ended("averaged") == "finished"
    (file,) = (hospitals.server / "models" / "averaged").glob("*/model.safetensors")
    model = unpack(file.read_bytes(), build(study), study).astype(np.float64)
    stated = len(SITES) * fixed_point(study, len(SITES)).error * largest_weight(study) / weight
    rounding = 2**-24 * (np.abs(mean) + np.abs(plain))  # the sum and the model are float32
    assert (np.abs(model - plain) <= stated + rounding).all()
    assert np.abs(mean).max() > 100 * stated


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may read another process's memory everywhere")
def test_no_sites_update_is_in_the_coordinators_memory_or_on_its_disk(
    hospitals: Hospitals, contract: Callable[..., dict[str, Any]]
) -> None:
    asked = contract("masked", private=False, rounds=2, steps_per_round=200)
    study = Study.model_validate(asked)
    sought = {site: forms(study, *each) for site, each in updates(hospitals, study).items()}
    assert all(len(each) > 20 for each in sought.values())
    hospitals.run_study(asked)
    hospitals.until_phase(study.study, 1, "survivors")  # all vectors are in, and the sites still keep what they trained
    app = _stop(hospitals)
    try:
        for site in SITES:
            here = found(sought[site], files(hospitals.site(site) / "store" / "results"))
            assert len(here) > 5, "what is sought for is not what the site trained"
        closed = _search(hospitals, app, sought)
    finally:
        os.kill(app, signal.SIGCONT)
    assert closed == dict.fromkeys(SITES, 0)

    hospitals.until_phase(study.study, 2, "survivors")
    app = _stop(hospitals)
    try:
        opened = _search(hospitals, app, sought)
    finally:
        os.kill(app, signal.SIGCONT)
    assert opened == dict.fromkeys(SITES, 0)
    assert hospitals.ended("masked") == "finished"
    assert _sites(files(hospitals.server), sought) == dict.fromkeys(SITES, 0)
    for site in SITES:
        assert not list((hospitals.site(site) / "store" / "results").glob("*")), "results go when the study is closed"


def test_a_piece_is_found_wherever_it_begins_and_no_part_of_it() -> None:
    piece, other = os.urandom(48), os.urandom(48)
    for shift in range(20):
        assert found({piece, other}, [os.urandom(shift) + piece[:47], os.urandom(shift) + piece]) == {piece}
        assert found({piece}, [piece[:47] + other, b"", piece[:7]]) == set()


def _stop(hospitals: Hospitals) -> int:
    """The study's process, stopped."""
    running = hospitals.processes("server").items()
    (app,) = (pid for pid, words in running if {"consilium_server.study", "masked"} <= set(words))
    os.kill(app, signal.SIGSTOP)
    return app


def _search(hospitals: Hospitals, app: int, sought: dict[str, set[bytes]]) -> dict[str, int]:
    """Site to how many pieces of its update are in the study's process, in the SuperLink, or on the disk."""
    superlink = hospitals.pid("server", "consilium_server.superlink")
    return _sites([*memory(app), *memory(superlink), *files(hospitals.server)], sought)


def _sites(places: Iterable[bytes], sought: dict[str, set[bytes]]) -> dict[str, int]:
    """Site to how many pieces of its update are there."""
    there = found(set().union(*sought.values()), places)
    return {site: len(each & there) for site, each in sought.items()}
