"""Published data sets as hospitals' folders: ``python -m consilium_deploy.real_data NAME --source DIR --out DIR``.

Each set becomes one folder a site, with the files that the tasks' studies (``task.studies``) expect, and a folder
``pooled`` with all sites' rows (same patient identifiers, hence the same patients held back) for comparison. The sets
are not part of the project: ``--source`` (or the variable ``CONSILIUM_DATA``) names the folder where they lie, packed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from consilium_deploy.dicom_files import Scanner, write_radiograph
from consilium_shared.errors import ConfigurationError, ConsiliumError, IntegrityError

POOLED = "pooled"
HEART_COLUMNS = ["age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak"]
HEART_DROPPED = ["slope", "ca", "thal"]
UNITS = {1: "ccu", 2: "csru", 3: "micu", 4: "sicu"}
STATICS = ("RecordID", "Age", "Gender", "Height", "ICUType")
BEATS = "NSVFQ"
BEATS_PER_SECOND, ANNOTATIONS_PER_SECOND, UNITS_PER_MILLIVOLT = 180, 360, 200
BEAT_TESTS = {"site-a": 118, "site-b": 106, "site-c": 223, "site-d": 124}


def heart_disease(source: Path, out: Path) -> None:
    """UCI heart disease, four hospitals: FLamby's rows, columns and split.

    FLamby (Ogier du Terrail et al. 2022) leaves out slope, ca and thal, then every row with a missing value, and splits
    with scikit-learn: two thirds for training, seed 43, stratified where both classes have more than two patients.
    """
    from sklearn.model_selection import train_test_split

    sites = []
    for name, data in _members(source / "heart_disease.tar.xz"):
        if not name.endswith(".data"):
            continue
        site = name.split(".")[-2]
        frame = pd.read_csv(io.BytesIO(data), names=[*HEART_COLUMNS, *HEART_DROPPED, "num"], na_values="?")
        frame.insert(0, "patient", [f"{site}-{row:03d}" for row in range(1, len(frame) + 1)])
        frame = frame.drop(columns=HEART_DROPPED).dropna()
        frame["disease"] = (frame.pop("num") > 0).astype(int)
        enough = frame["disease"].value_counts().reindex([0, 1], fill_value=0).gt(2).all()
        _, test = train_test_split(
            np.arange(len(frame)),
            test_size=1.0 - 0.66,
            train_size=0.66,
            random_state=43,
            stratify=frame["disease"] if enough else None,
        )
        frame["split"] = np.where(np.isin(np.arange(len(frame)), test), "test", "train")
        sites.append((site, frame))
    for site, frame in _with_pooled(sites):
        _write_csv(frame, out / site / "patients.csv")
        _say(site, patients=len(frame), train=int((frame.split == "train").sum()), disease=int(frame.disease.sum()))


SUMMARY: dict[str, tuple[float, float, tuple[str, ...]]] = {
    "GCS": (3, 15, ("last", "min")),
    "HR": (15, 300, ("last", "max", "min")),
    "SysABP": (30, 300, ("last", "min")),
    "MAP": (15, 250, ("last", "min")),
    "RespRate": (2, 80, ("last", "max")),
    "Temp": (25, 43, ("last", "min", "max")),
    "Urine": (0, 5000, ("sum", "mean")),
    "BUN": (0.5, 300, ("last", "max")),
    "Creatinine": (0.05, 30, ("last",)),
    "Lactate": (0.1, 40, ("last", "max")),
    "HCO3": (2, 60, ("last", "min")),
    "pH": (6.6, 7.9, ("last", "min")),
    "PaCO2": (8, 150, ("last",)),
    "PaO2": (20, 700, ("min",)),
    "FiO2": (0.2, 1, ("last", "max")),
    "SaO2": (30, 100, ("min",)),
    "MechVent": (0, 1, ("max",)),
    "WBC": (0.1, 300, ("last",)),
    "Platelets": (2, 2000, ("last",)),
    "HCT": (8, 70, ("last", "min")),
    "Na": (90, 190, ("last",)),
    "K": (1, 12, ("last", "max")),
    "Mg": (0.3, 12, ("last",)),
    "Glucose": (10, 1500, ("last", "max")),
    "Bilirubin": (0.05, 80, ("max",)),
    "Albumin": (0.5, 7, ("min",)),
    "Weight": (25, 300, ("last",)),
}
"""Variables of a stay's summary: range outside which a value is an error of entry, and what of the values counts."""


def physionet2012(source: Path, out: Path) -> None:
    """PhysioNet/CinC 2012, set A: the first 48 hours of 4000 stays in four kinds of intensive care unit."""
    outcomes: dict[str, str] = {}
    statics: list[dict[str, str]] = []
    samples: list[tuple[str, int, str, str]] = []
    for name, data in _members(source / "physionet2012_set_a.tar.xz"):
        lines = [line.split(",") for line in data.decode().splitlines()[1:]]
        if name.endswith("Outcomes-a.txt"):
            outcomes = {fields[0]: fields[-1] for fields in lines}
        elif name.endswith(".txt") and Path(name).stem.isdigit():
            patient, stay = Path(name).stem, dict.fromkeys(STATICS, "")
            for time, variable, value in lines:
                if not variable or not value or float(value) == -1:
                    continue
                if variable in STATICS:
                    stay[variable] = value
                else:
                    hours, minutes = time.split(":")
                    samples.append((patient, 60 * int(hours) + int(minutes), variable, value))
            statics.append(stay)
    table = pd.DataFrame(statics).rename(columns={"RecordID": "patient"})
    table["death"] = table["patient"].map(outcomes)
    unit = table.pop("ICUType").astype(int).map(UNITS)
    series = pd.DataFrame(samples, columns=["patient", "minutes", "variable", "value"])
    summary = table.merge(_summary(series), on="patient", how="left")
    unit_of_sample = series["patient"].map(dict(zip(table["patient"], unit, strict=True)))
    for site in [*UNITS.values(), POOLED]:
        rows = table if site == POOLED else table[unit == site]
        of_site = series if site == POOLED else series[unit_of_sample == site]
        _write_csv(rows, out / site / "outcomes.csv")
        _write_csv(of_site, out / site / "vitals.csv")
        _write_csv(summary if site == POOLED else summary[unit == site], out / site / "summary.csv")
        _say(site, stays=len(rows), samples=len(of_site), deaths=int((rows["death"] == "1").sum()))


def _summary(series: pd.DataFrame) -> pd.DataFrame:
    """One row a stay: what SUMMARY says of each variable, of its values in range; an empty cell where there is none."""
    numbers = series.assign(value=series["value"].astype(float)).sort_values(["patient", "minutes"], kind="stable")
    # A cuff's and an arterial line's pressures are one variable.
    numbers["variable"] = numbers["variable"].replace({"NISysABP": "SysABP", "NIMAP": "MAP"})
    columns = {}
    for variable, (low, high, kinds) in SUMMARY.items():
        of = numbers[(numbers["variable"] == variable) & numbers["value"].between(low, high)].groupby("patient")[
            "value"
        ]
        for kind in kinds:
            columns[f"{variable}_{kind}"] = of.agg(kind)
    return pd.DataFrame(columns).rename_axis("patient").reset_index()


def mitbih(source: Path, out: Path) -> None:
    """MIT-BIH arrhythmia database (training half DS1 of de Chazal 2004): beats of 22 patients, four sites.

    A record of the series is one beat; one patient of each site is held back, so that testing is on new patients.
    """
    path = source / "mitbih_beats_DS1.npz"
    _verify(path)
    with np.load(path, allow_pickle=False) as data:
        beats = {name: data[name] for name in ("x", "y", "record", "rr_prev", "rr_next")}
    x = beats["x"][:, None, :] if beats["x"].ndim == 2 else beats["x"]
    records = np.unique(beats["record"])
    tests = list(BEAT_TESTS.values())
    others = [record for record in records.tolist() if record not in tests]
    groups = {site: [test, *others[place :: len(tests)]] for place, (site, test) in enumerate(BEAT_TESTS.items())}
    for site, members in [*groups.items(), (POOLED, records.tolist())]:
        chosen = np.flatnonzero(np.isin(beats["record"], members))
        record = beats["record"][chosen]
        patients = np.char.add("mitbih-", record.astype(str))
        table = pd.DataFrame(
            {
                "patient": patients,
                "beat": chosen,
                "type": np.array(list(BEATS))[beats["y"][chosen]],
                "rr_before": _seconds(beats["rr_prev"][chosen]),
                "rr_after": _seconds(beats["rr_next"][chosen]),
                "split": np.where(np.isin(record, tests), "test", "train"),
            }
        )
        samples = x.shape[2]
        series = pd.DataFrame(
            {"patient": pd.Categorical(np.repeat(patients, samples)), "beat": np.repeat(chosen, samples)}
        )
        series["seconds"] = np.tile((np.arange(samples) / BEATS_PER_SECOND).astype(np.float32), len(chosen))
        for lead in range(x.shape[1]):
            series[f"lead_{lead + 1}"] = (x[chosen, lead].reshape(-1) / UNITS_PER_MILLIVOLT).astype(np.float32)
        _write_csv(table, out / site / "beats.csv")
        series.to_parquet(out / site / "samples.parquet", index=False)
        _say(site, patients=len(members), beats=len(chosen), test=int(np.isin(record, tests).sum()))


def pneumoniamnist(source: Path, out: Path) -> None:
    """PneumoniaMNIST (28 × 28 chest radiographs of children) written out as DICOM, four sites.

    How many images of each class a site has is drawn from a Dirichlet distribution (concentration 1, fixed seed). The
    published validation images are the ones held back.
    """
    path = source / "pneumoniamnist_trainval.npz"
    _verify(path)
    with np.load(path, allow_pickle=False) as data:
        images = np.concatenate([data["train_images"], data["val_images"]])
        labels = np.concatenate([data["train_labels"], data["val_labels"]]).reshape(-1)
        split = np.repeat(["train", "test"], [len(data["train_images"]), len(data["val_images"])])
    generator = np.random.default_rng(2012)
    site_of = np.zeros(len(labels), dtype=np.int64)
    for label in (0, 1):
        members = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.ones(4))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for site, part in enumerate(np.split(members, cuts)):
            site_of[part] = site
    scanner = Scanner(tags={"StudyDescription": "PneumoniaMNIST (CC BY 4.0)", "ViewPosition": "AP"})
    for number, name_of_site in enumerate(["site-a", "site-b", "site-c", "site-d", POOLED]):
        chosen = np.arange(len(labels)) if name_of_site == POOLED else np.flatnonzero(site_of == number)
        folder = out / name_of_site / "dicom"
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"pneumoniamnist-{place:05d}" for place in chosen]
        for place, name in zip(chosen, names, strict=True):
            write_radiograph(folder / f"{name}.dcm", images[place] / 255.0, name, name, scanner)
        table = pd.DataFrame(
            {"patient": names, "finding": np.where(labels[chosen] == 1, "pneumonia", "normal"), "split": split[chosen]}
        )
        _write_csv(table, out / name_of_site / "labels.csv")
        _say(
            name_of_site,
            images=len(chosen),
            pneumonia=int(labels[chosen].sum()),
            test=int((split[chosen] == "test").sum()),
        )


SETS: dict[str, Callable[[Path, Path], None]] = {
    "heart-disease": heart_disease,
    "physionet2012": physionet2012,
    "mitbih": mitbih,
    "pneumoniamnist": pneumoniamnist,
}


def _verify(path: Path) -> None:
    """Compare a file with the folder's ``MANIFEST.sha256``, if the folder has one."""
    if not path.is_file():
        raise ConfigurationError(f"{path} does not exist; --source names the folder with the packed data sets")
    manifest = path.parent / "MANIFEST.sha256"
    if not manifest.is_file():
        return
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if f"{digest}  {path.name}" not in manifest.read_text(encoding="utf-8").splitlines():
        raise IntegrityError(f"{path} is not the file that {manifest} lists; fetch it again")


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each regular file of a packed set, read in place: nothing is unpacked onto the disk."""
    _verify(path)
    try:
        with tarfile.open(path, "r:xz") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield member.name, content.read()
    except (tarfile.TarError, EOFError) as error:
        raise IntegrityError(f"{path} is damaged; fetch it again") from error


def _with_pooled(sites: list[tuple[str, pd.DataFrame]]) -> list[tuple[str, pd.DataFrame]]:
    return [*sites, (POOLED, pd.concat([frame for _, frame in sites]))]


def _seconds(intervals: NDArray[np.int32]) -> NDArray[np.float64]:
    """Intervals between beats in seconds; NaN where there is no neighbour."""
    return np.where(intervals > 0, intervals / ANNOTATIONS_PER_SECOND, np.nan)


def _write_csv(frame: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False)


def _say(site: str, **counts: int) -> None:
    print(f"{site:12s} " + ", ".join(f"{count} {what}" for what, count in counts.items()))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m consilium_deploy.real_data", description=__doc__)
    parser.add_argument("name", choices=sorted(SETS))
    parser.add_argument("--source", type=Path, default=os.environ.get("CONSILIUM_DATA"), help="folder of packed sets")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the sites' folders into")
    options = parser.parse_args(arguments)
    if options.source is None:
        parser.error("give --source, or set CONSILIUM_DATA")
    try:
        SETS[options.name](options.source, options.out)
    except (ConsiliumError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
