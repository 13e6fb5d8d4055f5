"""HL7 v2 messages become the tables that a FHIR export of the same facts becomes; what is not used is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from consilium_client.intake.fhir import Imported, import_export
from consilium_client.intake.pseudonyms import Pseudonyms
from consilium_client.intake.settings import FhirExport, Hl7Export
from consilium_shared.errors import DataError

VARIABLES = {
    "glucose": {"codes": ["http://loinc.org|2345-7", "L|GLU"], "unit": "mg/dL", "molar_mass": 180.156},
    "sodium": {"codes": ["http://loinc.org|2951-2"], "unit": "mmol/L", "spellings": {"mEq": "mmol/L"}},
}
FLAGS = {"diabetes": {"codes": ["http://hl7.org/fhir/sid/icd-10|E11.9"]}}
AT = "20260102030405+0000"


def message(*segments: str, written: str = "20260102040000", kind: str = "ORU^R01", charset: str = "") -> str:
    head = f"MSH|^~\\&|LAB|HOSP|CONSILIUM|SITE|{written}||{kind}|1|P|2.5.1||||||{charset}"
    return "\r".join([head, *segments]) + "\r"


def person(number: str = "4711", born: str = "19600102", sex: str = "F") -> str:
    return f"PID|1||{number}^^^MRN&1.2.3&ISO^MR~X{number}^^^CARD||Müller^Jürgen||{born}|{sex}"


def order(number: str = "order-1", at: str = AT) -> str:
    return f"OBR|1||{number}|24321-2^Panel^LN|||{at}"


def result(
    value: str,
    unit: str = "mmol/L^^UCUM",
    code: str = "2345-7^Glucose^LN",
    status: str = "F",
    kind: str = "NM",
    at: str = "",
) -> str:
    return f"OBX|1|{kind}|{code}||{value}|{unit}|||||{status}|||{at}"


def imported(tmp_path: Path, *files: str | bytes, identifier: str = "MRN") -> tuple[Imported, list[str], list[str]]:
    """Outcome, and the lines of both tables below their heads."""
    folder = tmp_path / "messages"
    folder.mkdir()
    for number, content in enumerate(files):
        (folder / f"{number:03d}.hl7").write_bytes(content.encode() if isinstance(content, str) else content)
    given = {"folder": folder, "patients": tmp_path / "p.csv", "samples": tmp_path / "s.csv"}
    export = Hl7Export(**given, identifier=identifier, variables=VARIABLES, flags=FLAGS)
    done = import_export(export, Pseudonyms(tmp_path / "intake", 1))
    patients, samples = ((tmp_path / name).read_text().splitlines()[1:] for name in ("p.csv", "s.csv"))
    return done, patients, samples


def test_messages_give_the_tables_that_a_fhir_export_of_the_same_facts_gives(tmp_path: Path) -> None:
    diagnosis = "DG1|1||E11.9^Type 2 diabetes^I10"
    done, patients, samples = imported(tmp_path, message(person(), order(), result("5.5"), diagnosis))
    assert (done.patients, done.samples, done.aside) == (1, 1, {})
    export = tmp_path / "fhir"
    export.mkdir()
    identifiers = [{"system": "MRN", "value": "4711"}]
    subject = {"reference": "Patient/a"}
    quantity = {"value": 5.5, "code": "mmol/L", "system": "http://unitsofmeasure.org"}
    facts: dict[str, dict[str, Any]] = {
        "Patient": {"id": "a", "gender": "female", "birthDate": "1960-01-02", "identifier": identifiers},
        "Observation": {
            "status": "final",
            "subject": subject,
            "code": {"coding": [{"system": "http://loinc.org", "code": "2345-7"}]},
            "effectiveDateTime": "2026-01-02T03:04:05+00:00",
            "valueQuantity": quantity,
        },
        "Condition": {
            "subject": subject,
            "code": {"coding": [{"system": "http://hl7.org/fhir/sid/icd-10", "code": "E11.9"}]},
        },
    }
    for kind, fact in facts.items():
        (export / f"{kind}.ndjson").write_text(json.dumps({"resourceType": kind, **fact}) + "\n")
    given = {"folder": export, "patients": tmp_path / "p2.csv", "samples": tmp_path / "s2.csv"}
    import_export(
        FhirExport(**given, identifier="MRN", variables=VARIABLES, flags=FLAGS), Pseudonyms(tmp_path / "intake", 1)
    )
    assert (tmp_path / "p2.csv").read_text().splitlines()[1:] == patients
    assert (tmp_path / "s2.csv").read_text().splitlines()[1:] == samples
    assert patients[0].endswith(",1") and "99.08" in samples[0]


def test_a_result_that_was_sent_again_counts_once_as_last_written_and_one_that_was_taken_back_not_at_all(
    tmp_path: Path,
) -> None:
    first = message(person(), order(), result("5.0"))
    corrected = message(person(), order(), result("6.0", status="C"), written="20260102050000")
    late = message(person(), order(), result("7.0", status="P"), written="20260102030000")
    gone = message(person(), order("order-2"), result("9.0"))
    taken_back = message(person(), order("order-2"), result("9.0", status="D"), written="20260103000000")
    done, _, samples = imported(tmp_path, corrected + first, late + gone, taken_back)
    (sample,) = samples
    assert float(sample.rsplit(",", 1)[1]) == pytest.approx(6 * 18.0156)
    assert done.patients == 1 and list(done.aside.values()) == [1]


def test_of_two_results_in_one_order_at_different_times_both_count(tmp_path: Path) -> None:
    twice = message(person(), order(), result("5", at="20260102010000"), result("6", at="20260102020000"))
    assert imported(tmp_path, twice)[0].samples == 2


def test_framing_batches_ends_of_lines_and_character_sets_are_read(tmp_path: Path) -> None:
    framed = "\x0b" + message(person("1"), order(), result("5")) + "\x1c\r"
    whole = message(person("2"), order(), result("5")).replace("\r", "\r\n")
    batch = f"FHS|^~\\&\nBHS|^~\\&\n{whole}BTS|1\nFTS|1\n"
    latin = message(person("3"), order(), result("5"), charset="8859/1").encode("iso-8859-1")
    unknown = message(person("4"), order(), result("5"), charset="GB 18030-2000").encode()
    done, patients, _ = imported(tmp_path, framed + framed.replace("|1^^^MRN", "|5^^^MRN"), batch, latin, unknown)
    assert (done.patients, done.samples) == (4, 4) and len(patients) == 4
    assert done.aside == {"message: not readable, or in a character set that is not known": 1}


def test_what_is_no_number_of_a_known_unit_is_counted_by_reason(tmp_path: Path) -> None:
    sodium = "2951-2^Sodium^LN"
    several = message(
        person(),
        order(""),
        result("140", "mEq", sodium),
        result("140", "", sodium),
        result("<^5", kind="SN"),
        result("=^5", kind="SN"),
        result("5^-^7", kind="SN"),
        result("5~6"),
        result("5,5"),
        result("high", kind="ST"),
        result("5", status="X"),
        result("5", code="GLU^Glucose^L"),
        result("5", code="x^y^z^2345-7^Glucose^LN"),
        result("5", code="unheard^of^LN"),
    )
    done, _, samples = imported(tmp_path, several)
    assert sorted(line.split(",")[2] for line in samples) == ["glucose"] * 3 + ["sodium"]
    assert done.aside == {
        "sodium: a value without a unit": 1,
        "glucose: a bound in place of a value (< or >)": 2,
        "glucose: a value that is no number": 3,
        "Observation: not final (preliminary, cancelled, entered in error …)": 1,
    }


def test_patients_without_the_declared_identifier_and_other_messages_are_set_aside(tmp_path: Path) -> None:
    stranger = message("PID|1||77^^^OTHER", order(), result("5"))
    schedule = message(person(), kind="SIU^S12")
    nobody = message(order(), result("5"))
    short = message("OBX|1|NM", "PID", person()[:9], "OBX")
    done, patients, samples = imported(
        tmp_path, stranger, schedule, nobody, short, b"MSH|^~\\&|\xff\rPID|\xff", "noise"
    )
    assert (done.patients, done.samples, patients, samples) == (0, 0, [], [])
    assert done.aside["message: neither results (ORU) nor an admission (ADT)"] == 1
    assert done.aside["Patient: no identifier of the declared system"] >= 1
    assert done.aside["Observation: of a patient who is not in the export"] == 1


def test_an_authority_is_named_by_its_oid_too(tmp_path: Path) -> None:
    assert imported(tmp_path, message(person(), order(), result("5")), identifier="1.2.3")[0].patients == 1


def test_the_command_writes_the_tables_and_a_folder_without_messages_is_an_error(tmp_path: Path, site: Any) -> None:
    folder = tmp_path / "lab"
    folder.mkdir()
    tables = {"patients": str(tmp_path / "p.csv"), "samples": str(tmp_path / "s.csv")}
    lab = {"folder": str(folder), "identifier": "MRN", **tables, "variables": VARIABLES}
    site.settings["hl7"] = {"lab": yaml.safe_load(json.dumps(lab))}
    refused = site.run("import-hl7")
    assert refused.returncode != 0 and "holds no HL7 file" in " ".join(refused.stderr.split())
    (folder / "1.hl7").write_text(message(person(), order(), result("5.5")))
    done = site.run("import-hl7", "lab", "--json")
    assert json.loads(done.stdout)["lab"] == {"aside": {}, "patients": 1, "samples": 1}
    assert "4711" not in (tmp_path / "p.csv").read_text() and "ller" not in (tmp_path / "p.csv").read_text()


def test_a_message_without_end_is_set_aside_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consilium_client.intake.hl7_messages.MESSAGE_BYTES", 2**16)
    endless = message(person(), order(), "NTE|1||" + "x" * 2**18) + message(person("2"), order(), result("5"))
    done, _, _ = imported(tmp_path, endless)
    assert (done.patients, done.aside) == (1, {"message: longer than 0 MiB": 1})


def test_damaged_messages_never_break_the_import(tmp_path: Path) -> None:
    whole = message(person(), order(), result("5.5"))
    cut = [whole[:length] for length in range(0, len(whole), 7)]
    with_dirt = [whole.replace("|", separator) for separator in ("||", "^", "~", "&", "\\F\\", "\x00")]
    done, _, _ = imported(tmp_path, *cut, *with_dirt, whole)
    assert done.samples >= 1
    with pytest.raises(DataError, match="is not a folder"):
        imported_from = Hl7Export(
            folder=tmp_path / "none",
            patients=tmp_path / "x",
            samples=tmp_path / "y",
            identifier="a",
            variables=VARIABLES,
        )
        import_export(imported_from, Pseudonyms(tmp_path / "intake", 1))
