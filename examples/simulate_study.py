"""A federated study in one process: four hospitals, private training, masked sums, and an audit of what was spent.

    python examples/simulate_study.py

The parts are those of the real programs: records are read from files, every use of the data is charged in a signed
ledger, updates are masked before they are added, and the audit verifies the ledgers and recomputes ε. The transport and
the people who approve are left out; `make demo` has both. All patients are invented.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from consilium_audit.budget import account, check_limits
from consilium_client.agent.accounts import Account
from consilium_client.agent.spending import Spending
from consilium_client.commands.baseline import test as metrics_of
from consilium_client.data import load
from consilium_client.data.asset import TableAsset
from consilium_client.state.draw_seeds import Use
from consilium_client.state.ledger_file import LedgerFile
from consilium_client.state.patient_count import PatientCounts
from consilium_client.training.trainer import train
from consilium_server.study.optimizer import ServerOptimizer
from consilium_shared.canonical import digest
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.ledger.verify import verify_ledger
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector, trained, width, with_trained
from consilium_shared.privacy.budget import Budget
from consilium_shared.privacy.plan import PrivacyPlan, plan_of
from consilium_shared.protocol.summand import bound, fixed_point, largest_weight, read, segments
from consilium_shared.secagg import prg, ring
from consilium_shared.secagg.handshake import SessionKeys
from consilium_shared.secagg.server import ServerSum
from consilium_shared.secagg.site import SitePart
from consilium_shared.secagg.terms import Slot, Terms, tolerated
from consilium_shared.study import Study

Vector = npt.NDArray[np.float32]
STUDY = Study.model_validate(
    {
        "study": "readmission",
        "task": "tabular-classification",
        "model": {"name": "logistic"},
        "data": {
            "asset": "stays",
            "label": {"column": "readmitted", "classes": ["no", "yes"]},
            "features": [{"name": "age", "center": 60, "scale": 15}, {"name": "marker", "center": 2, "scale": 1}],
        },
        "training": {"rounds": 4, "steps_per_round": 5, "expected_batch": 100, "optimizer": {"lr": 0.5}},
        "privacy": {"epsilon": 2.0, "delta": 1e-4, "clipping_norm": 1.0},
        "aggregation": {"min_sites": 3},
    }
)
PATIENTS = {"aarhus": 420, "bergen": 300, "lund": 510, "turku": 360}
"""Hospital to its number of patients; they differ in age, too."""
BUDGET = Budget(4.0, 1e-4)
"""Each hospital's budget: the largest ε that all studies together may spend."""
AWAY = {2: "lund"}
"""Round to the hospital whose update never arrives in it."""


class Hospital:
    """A site: records, ledger, keys and plan."""

    def __init__(self, folder: Path, name: str, number: int) -> None:
        folder.mkdir()
        draw = np.random.default_rng(number)
        age = draw.normal(50 + 5 * number, 12, PATIENTS[name])
        marker = draw.normal(2, 1, PATIENTS[name])
        risk = draw.random(PATIENTS[name]) < 1 / (1 + np.exp(-(age - 60) / 8 - 1.5 * (marker - 2)))
        label = np.where(risk, "yes", "no")
        rows = [f"P{i},{age[i]:.1f},{marker[i]:.2f},{label[i]}" for i in range(PATIENTS[name])]
        (folder / "stays.csv").write_text("patient,age,marker,readmitted\n" + "\n".join(rows) + "\n")
        self.name, self.identity = name, Identity.generate()
        self.records = load(TableAsset(kind="table", path=folder / "stays.csv"), STUDY)
        self.count = PatientCounts(folder).noised(STUDY, int(self.records.train.sum()), least=20)
        plan = plan_of(STUDY, self.count)
        if not isinstance(plan, PrivacyPlan):
            raise TypeError("a plan without privacy; this study has privacy")
        self.plan = plan
        self.account = Account(STUDY.digest, STUDY.study, "stays", plan, BUDGET)
        self.ledger = LedgerFile(folder / "ledger.jsonl", name, self.identity)
        self.spending = Spending(self.ledger)
        self.spending.open_asset("stays", BUDGET, policy_digest=digest(b"the policy"))

    def approve(self) -> None:
        """Write the decision of the hospital's people, which charges the noised number of patients."""
        self.spending.approve(self.account, epsilon=self.plan.epsilon, by="Dr Ono")

    def update(self, model: bytes, number: int) -> tuple[Vector, int]:
        """Charge the round, train it, and return the bounded update (float32 [d]) with its weight."""
        seed = secrets.token_bytes(32)  # decides who is drawn, and the noise; at a site it is on the disk before
        charged = self.spending.reserve(self.account, Use("training", number, digest(model)), seed)
        device = torch.device("cpu")
        result = train(model, STUDY, self.records, self.plan, round=number, site=self.name, device=device, seed=seed)
        self.spending.settle(charged, result.steps)
        bound(result.update, STUDY)
        return result.update, min(self.count, largest_weight(STUDY))


class SecureSums:
    """Secure sums over the hospitals, with both ends of the protocol."""

    def __init__(self, hospitals: Sequence[Hospital]) -> None:
        self.identities = {each.name: each.identity for each in hospitals}
        self.public: dict[str, PublicIdentity] = {name: each.public for name, each in self.identities.items()}
        self.roster = digest("|".join(f"{name} {each.fingerprint}" for name, each in self.public.items()).encode())
        pairwise: dict[str, dict[str, bytes]] = {name: {} for name in self.identities}
        session = {
            name: SessionKeys(secrets.token_bytes(32), STUDY.digest, self.roster, name, identity)
            for name, identity in self.identities.items()
        }
        for low, high in combinations(sorted(session), 2):  # X25519 and ML-KEM-768, once a study
            sent, pairwise[low][high] = session[low].encapsulate(high, session[high].bundle, self.public[high])
            pairwise[high][low] = session[high].decapsulate(low, session[low].bundle, sent, self.public[low])
        self.parts = {
            name: SitePart(identity, self.public, STUDY.aggregation.min_sites, pairwise[name])
            for name, identity in self.identities.items()
        }

    def mean(self, model: bytes, number: int, updates: dict[str, tuple[Vector, int]]) -> Vector:
        """The weighted mean of these updates; every hospital is in the cohort, those without an update drop out."""
        slot = Slot(
            federation=digest(b"nordic"),
            study=STUDY.digest,
            roster=self.roster,
            purpose="training",
            round=number,
            attempt=1,
        )
        states, adverts = {}, {}
        for name, part in self.parts.items():
            states[name], adverts[name] = part.advertise(slot, name, secrets.token_bytes(32))
        terms = Terms(
            slot=slot,
            model=digest(model),
            segments=segments(STUDY, "training", number, width(STUDY)),
            threat_model=STUDY.aggregation.threat_model,
            adverts=adverts,
            corrupt=tolerated(STUDY.aggregation, len(self.parts)),
        )
        total = ServerSum(terms, self.public)
        for name, (update, weight) in updates.items():
            states[name], contribution = self.parts[name].mask(states[name], terms)
            encoded = np.empty(update.size, dtype=ring.DTYPES[STUDY.aggregation.ring_bits])
            fixed_point(STUDY, len(self.parts)).encode(update, encoded, weight / largest_weight(STUDY))
            sent = b""
            for segment, vector in zip(terms.segments, (encoded, np.asarray([weight], dtype=np.uint64)), strict=True):
                prg.apply(vector, *contribution.mask_keys(segment))
                sent += vector.tobytes()
            total.fold(name, Received(sent + contribution.trailer))
        survivors = total.close(STUDY.aggregation.min_sites)
        for name in survivors:
            states[name], signature = self.parts[name].sign(states[name], survivors, total.sealed_for(name))
            total.sign(name, signature)
        for name in survivors:
            states[name], shares = self.parts[name].release(states[name], total.signatures, total.sealed_for(name))
            total.share(name, shares)
        return read(STUDY, "training", len(self.parts), len(survivors), total.open()).mean


class Received:
    """A whole upload, as the coordinator's end reads it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def pieces(self, size: int) -> Iterator[bytes]:
        """The bytes, at most ``size`` at a time."""
        return (self.data[start : start + size] for start in range(0, self.size, size))


def main() -> None:
    """Run the study and print what each hospital sees and what its ledger says."""
    with tempfile.TemporaryDirectory() as folder:
        hospitals = [Hospital(Path(folder) / name, name, number) for number, name in enumerate(PATIENTS)]
        for hospital in hospitals:
            hospital.approve()
        sums, optimizer = SecureSums(hospitals), ServerOptimizer.from_study(STUDY.aggregation.optimizer)
        vector = to_vector(build(STUDY))
        for number in range(1, STUDY.training.rounds + 1):
            model = pack(vector, STUDY)
            updates = {each.name: each.update(model, number) for each in hospitals if AWAY.get(number) != each.name}
            mean = sums.mean(model, number, updates)
            vector = with_trained(vector, optimizer.step(trained(vector, STUDY), mean), STUDY)
            print(f"round {number}: sum over {len(updates)} hospitals, norm of the mean {np.linalg.norm(mean):.3f}")
        print("\nAt each hospital: the model on held-back patients, and the audit of its ledger.")
        for hospital in hospitals:
            auroc = metrics_of(STUDY, pack(vector, STUDY), hospital.records, "cpu")["auroc"]
            verified = verify_ledger(hospital.ledger.path.read_bytes(), hospital.name, hospital.identity.public)
            check_limits(verified)
            (asset,) = account(verified).assets
            print(
                f"{hospital.name}: AUROC {auroc:.2f}; {len(verified.entries)} signed entries, "
                f"ε spent {asset.epsilon:.2f} of {asset.limit:.1f}, left {asset.left:.2f}"
            )
            hospital.ledger.close()


if __name__ == "__main__":
    main()
