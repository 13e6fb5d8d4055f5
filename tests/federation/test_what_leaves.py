"""Everything that leaves the agents of two studies is recorded, and searched for what stands in the patients' files.

The search also covers all that the other tests of this folder left at the coordinator and beside the agents.
"""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydicom
import pytest
from tests.support.datasets import load
from tests.support.live_files import contents

from consilium_client.data.asset import DicomAsset, TableAsset
from consilium_client.site import Home
from consilium_client.transport.agent_socket import AgentChannel, cut, serve
from consilium_shared.identity import PublicIdentity
from consilium_shared.protocol import messages
from consilium_shared.study import Study

if TYPE_CHECKING:
    from tests.federation.conftest import Hospitals

SITES = ["north", "south", "west"]
SAMPLE = 12
"""Patients of each site whose rows and images are searched for; identifiers and labels are those of all."""


class Recorder:
    """Stands at an agent's socket, hands every message on, and keeps what crossed in both directions."""

    def __init__(self, socket: Path) -> None:
        self.socket, self.behind = socket, socket.with_name("behind.sock")
        self.asked: list[bytes] = []
        self.answered: list[bytes] = []
        socket.rename(self.behind)
        channel = AgentChannel(self.behind)

        def pass_on(header: bytes, payload: bytes) -> tuple[bytes, Iterator[bytes]]:
            answer = channel.exchange(header, payload)
            self.asked += [header, payload]
            self.answered += answer
            return answer[0], cut(answer[1])

        self.service = serve(socket, pass_on)

    def close(self) -> None:
        """Put the agent's own socket back."""
        self.service.stop(grace=None).wait()
        self.behind.rename(self.socket)


@dataclass
class Secrets:
    """What stands in one site's files and must not leave it; each in the forms that it takes in memory."""

    words: set[bytes] = field(default_factory=set)
    """As the table has them."""
    numbers: set[bytes] = field(default_factory=set)
    """As they are in memory."""

    def add(self, values: np.ndarray[Any, Any], *types: str) -> None:
        """An array of numbers: its bytes in each of these types."""
        self.numbers |= {np.ascontiguousarray(values, dtype=each).tobytes() for each in types}


def spellings(word: bytes) -> set[bytes]:
    """A word as it is, in UTF-16, in hex and in base64 at each of the three positions that it may begin at."""
    found = {word, word.hex().encode(), word.hex().upper().encode()}
    for each in (word, word.decode("latin-1").encode("utf-16-le")):
        found.add(each)
        for shift in range(3):
            encoded = base64.b64encode(bytes(shift) + each)
            whole = encoded[(shift * 8 + 5) // 6 : (shift + len(each)) * 8 // 6]
            found |= {whole, whole.replace(b"+", b"-").replace(b"/", b"_")}
    return found


def secrets_of(hospitals: Hospitals, site: str, tables: Study, images: Study) -> Secrets:
    """Identifiers, notes, column names, rows, labels and pixels of one site."""
    found = Secrets({b"QZSYNTHETIC"})
    home = Home(hospitals.site(site))
    assets = home.config().assets
    cohort, images_of = assets["cohort"], assets["images"]
    assert isinstance(cohort, TableAsset) and isinstance(images_of, DicomAsset)
    with cohort.path.open() as file:
        for row in list(csv.DictReader(file))[:SAMPLE]:
            found.words |= {",".join([row["age"], row["pressure"], row["marker"]]).encode(), row["age"].encode()}
    for study in (tables, images):
        records = load(assets[study.data.asset].at(home.root), study)
        for kept in (records, records.select(held_back=False)):  # those held back are too few to be unmistakable
            found.add(kept.labels[0], "<i8", "<i4", "u1", "<f4")
            found.numbers.add(",".join(map(str, kept.labels[0])).encode())
        for record in records.inputs[0][:SAMPLE].reshape(SAMPLE, -1):
            found.add(record[-64:], "<f4", "<f8")
    for path in sorted(images_of.path.glob("*.dcm"))[:SAMPLE]:
        found.add(pydicom.dcmread(path).pixel_array[12], "u1", "<f4")
    return found


def needles(secrets: Secrets) -> set[bytes]:
    """Everything to search for, in every spelling."""
    return {each for secret in secrets.words | secrets.numbers for each in spellings(secret)}


def hits(haystack: Iterable[tuple[str, bytes]], sought: set[bytes]) -> set[str]:
    """Names of the places in which something is found."""
    return {name for name, content in haystack for each in sought if each in content}


def files(folder: Path, *leave_out: str) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder."""
    for path, content in contents(folder):
        if path.name not in leave_out:
            yield str(path), content


@dataclass
class Capture:
    """What was recorded at each site, and what must not be in it."""

    recorders: dict[str, Recorder]
    secrets: dict[str, Secrets]

    @property
    def carried(self) -> list[tuple[str, bytes]]:
        """Everything that crossed the agents' sockets."""
        return [
            (f"socket of {site}", content)
            for site, recorder in self.recorders.items()
            for content in (*recorder.asked, *recorder.answered)
        ]

    @property
    def sought(self) -> set[bytes]:
        """Everything to search for."""
        return set().union(*(needles(secrets) for secrets in self.secrets.values()))


@pytest.fixture(scope="module")
def capture(hospitals: Hospitals, contract: Callable[..., dict[str, Any]]) -> Iterator[Capture]:
    """A study on tables (without privacy: nothing hides behind noise) and one on images, recorded."""
    recorders = {site: Recorder(hospitals.site(site) / "run" / "agent.sock") for site in SITES}
    try:
        tables = hospitals.run_study(contract("recorded-tables", private=False))
        assert hospitals.ended("recorded-tables") == "finished"
        images = hospitals.run_study(
            image_contract(contract("recorded-images", private=True, rounds=1, steps_per_round=4))
        )
        assert hospitals.ended("recorded-images") == "finished"
        yield Capture(recorders, {site: secrets_of(hospitals, site, tables, images) for site in SITES})
    finally:
        for recorder in recorders.values():
            recorder.close()


def image_contract(contract: dict[str, Any]) -> dict[str, Any]:
    """The same study on the images."""
    label = contract["data"]["label"]
    return {
        **contract,
        "task": "image-classification",
        "model": {"name": "small-cnn"},
        "data": {"asset": "images", "label": label, "image": {"size": 16}},
        "evaluation": {"split": 0.2, "epsilon": 0.5},
    }


@pytest.mark.parametrize("site", SITES)
def test_what_crosses_an_agents_socket_are_signed_answers_of_known_size(
    hospitals: Hospitals, capture: Capture, site: str
) -> None:
    """So the recording is whole: every message that the ledger released, and no other."""
    answers = capture.recorders[site].answered
    identity: PublicIdentity = Home(hospitals.site(site)).identity().public
    decoded = [messages.decode_answer(header, identity) for header in answers[::2]]
    kinds = [answer.kind for answer in decoded]
    assert (kinds.count("update"), kinds.count("counts"), kinds.count("closing")) == (4, 2, 2)
    assert kinds.count("signed") == kinds.count("shares") == 4 + 2
    told = {"standing", "advertised", "handshaken", "update", "counts", "signed", "shares", "closing"}
    assert set(kinds) == told
    carried = list(zip(decoded, answers[1::2], strict=True))
    for answer, payload in carried:
        answer.payload.check(payload)
    parameters = (5 * 8 + 8) + (8 * 2 + 2)
    sealed, commitments = 2 * (3 * 32 + 16), 3 * 32
    first = 4 * parameters + 8 + sealed + commitments  # the masked update, its weight, the shares of the masks' seeds
    assert first in {len(payload) for answer, payload in carried if answer.kind == "update"}
    assert {len(payload) for answer, payload in carried if answer.kind == "shares"} == {3 * 32}
    assert {len(payload) for answer, payload in carried if answer.kind in ("standing", "signed", "closing")} == {0}


def test_no_patient_is_in_what_the_couriers_carried(capture: Capture) -> None:
    assert len(capture.carried) > 60
    assert hits(capture.carried, capture.sought) == set()


def test_no_patient_is_in_the_coordinators_files_and_logs(hospitals: Hospitals, capture: Capture) -> None:
    found = dict(files(hospitals.server))
    assert any(name.endswith("superlink.log") for name in found)
    assert hits(files(hospitals.server), capture.sought) == set()


@pytest.mark.parametrize("site", SITES)
def test_no_patient_is_in_a_sites_logs_ledger_store_and_flower_files(
    hospitals: Hospitals, capture: Capture, site: str
) -> None:
    home = hospitals.site(site)
    assert {path.name for path in (home / "log").iterdir()} >= {"agent.log", "courier.log", "supernode.log"}
    assert (home / "run" / "flwr").is_dir()
    assert hits(files(home, "site.yaml"), capture.sought) == set()


def test_no_patient_is_in_a_temporary_file(hospitals: Hospitals, capture: Capture) -> None:
    assert hits(files(hospitals.root / "tmp"), capture.sought) == set()


@pytest.mark.parametrize("site", SITES)
def test_the_search_finds_every_patient_where_they_are(hospitals: Hospitals, capture: Capture, site: str) -> None:
    """Each secret is one that the site's own files hold, so that the search above was for the right things."""
    own = list(files(hospitals.root / "data"))
    table = next(content for name, content in own if name.endswith(f"synthetic-{site}-cohort.csv"))
    assert all(word in table for word in capture.secrets[site].words)
    assert table.count(b"QZSYNTHETIC") > 160
    images = [content for name, content in own if f"{site}-images" in name and name.endswith(".dcm")]
    pixels = {number for number in capture.secrets[site].numbers if any(number in image for image in images)}
    assert len(pixels) >= SAMPLE


def test_the_search_would_find_a_patient_in_every_spelling(
    hospitals: Hospitals, capture: Capture, tmp_path: Path
) -> None:
    log = (hospitals.site("north") / "log" / "courier.log").read_bytes()
    assert log
    for secrets in capture.secrets.values():
        for secret in secrets.words | secrets.numbers:
            wide = secret.decode("latin-1").encode("utf-16-le")
            for leaked in (
                secret,
                wide,
                secret.hex().encode(),
                base64.b64encode(b"x" + secret),
                base64.b64encode(wide),
            ):
                (tmp_path / "courier.log").write_bytes(log + b"x" + leaked + b"\n")
                assert hits(files(tmp_path), spellings(secret))
