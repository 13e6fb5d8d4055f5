"""The page as text: whole, closed to the network, escaped, and true to what is recomputed."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from consilium_audit import cli
from consilium_audit.page import as_json, render
from consilium_audit.report import Report, make_report
from consilium_audit.site_report import Measured
from consilium_shared.privacy.accountant import calibrate_noise, epsilon
from consilium_shared.privacy.budget import in_words
from consilium_shared.privacy.event import DpSgdEvent, GaussianEvent

Busy = Any
"""``conftest.Busy``"""
Evidence = Any
"""``audit.conftest.Evidence``"""
Line = list[Any]
VOID = {"meta", "link", "br", "img", "hr"}


class Parsed(HTMLParser):
    """Every element with its attributes; fails on one that is not closed in order."""

    def __init__(self, page: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page.decode())
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_every_element_is_closed_and_headings_come_in_order(busy_page: bytes) -> None:
    parsed = Parsed(busy_page)
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    names = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert {str(a["href"])[1:] for a in parsed.all("a")} <= set(names)


def test_the_page_needs_nothing_but_itself(busy_page: bytes) -> None:
    parsed = Parsed(busy_page)
    assert parsed.all("script") == [] and parsed.all("img") == [] and parsed.all("iframe") == []
    for _, attributes in parsed.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action", "data"):
            assert re.match(r"#|data:,$", attributes.get(name) or "#"), attributes
    style = busy_page.decode().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    policy = {a.get("http-equiv"): a.get("content") for a in parsed.all("meta")}
    assert policy["Content-Security-Policy"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_tables_say_what_their_cells_belong_to_and_figures_what_they_show(busy_page: bytes) -> None:
    parsed = Parsed(busy_page)
    assert all(attributes.get("scope") in {"col", "row"} for attributes in parsed.all("th"))
    assert len(parsed.all("caption")) == len(parsed.all("table"))
    figures = parsed.all("svg")
    assert len(figures) == 8 and all(figure["role"] == "img" for figure in figures)
    assert len(parsed.all("title")) == 1 + len(figures) and len(parsed.all("desc")) == len(figures)
    assert all(figure["aria-labelledby"] for figure in figures)


def test_what_others_wrote_is_text_and_nothing_else(busy_page: bytes) -> None:
    assert b"&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in busy_page
    assert b"<script" not in busy_page and b"<img" not in busy_page


def test_the_same_evidence_gives_the_same_page_wherever_it_lies(busy: Busy, busy_page: bytes, tmp_path: Path) -> None:
    shutil.copytree(busy.root, tmp_path / "moved")
    assert render(make_report(tmp_path / "moved", busy.coordinator.public.fingerprint)) == busy_page


def test_the_page_and_the_json_have_the_same_numbers(busy: Busy, busy_report: Report, busy_page: bytes) -> None:
    text, told = Parsed(busy_page).text, json.loads(as_json(busy_report))
    assert told["state"] == "verified" and "✓ VERIFIED" in text
    for site in told["sites"]:
        (asset,) = site["account"]["assets"]
        (sepsis,) = [each for each in asset["studies"] if each["study"] == busy.study.digest]
        row = f"{site['site']} {sum(p == 'took part' for p in standings(told, site['site']))} of 24 "
        row += f"{in_words(sepsis['epsilon'])} {in_words(sepsis['approved'])} icu {in_words(asset['epsilon'])} "
        row += f"8.000 {in_words(8.0 - asset['epsilon'], up=False)}"
        assert row in text
        for release in site["releases"]:
            assert release["sha256"] in text


def standings(told: Any, site: str) -> list[str]:
    return next(part["standings"] for part in told["participation"] if part["site"] == site)


def test_the_page_tells_who_approved_what_was_refused_who_was_away_and_why(busy_page: bytes) -> None:
    text = Parsed(busy_page).text
    for words in (
        "Dr Ono, data protection",
        "ethics board, decision 2026-117: sepsis is in the public interest",
        "round 25 of a study approved for 24 rounds",
        "turku 18 of 24 away 9–14 offline",
        "lund 23 of 24 refused 17 data: the site's data does not fit the study",
        "1 × budget, 3 × policy, 1 × data",
        "71 of 100 guesses right, 1000 canaries; confidence 95 %; by IT, night shift",
        "not measured",
    ):
        assert words in text


def test_no_number_in_a_file_is_believed(evidence: Evidence) -> None:
    def flattering(lines: list[Line]) -> list[Line]:
        for line in lines:
            if line[2] == "charge":
                line[3]["epsilon_after"] = 0.123
        return lines

    for site in ("north", "south", "west"):
        evidence.rewrite(site, flattering)
    text = Parsed(render(make_report(evidence.root))).text
    evaluations = [GaussianEvent(calibrate_noise(1.0, 3, 1.0, 1e-4))] * 3
    true = in_words(epsilon([GaussianEvent(10.0), *evaluations, DpSgdEvent(0.05, 1.5, 5 * 4)], 1e-4))
    assert f"south 3 of 3 {true} 3.000 icu {true} 6.000" in text
    assert "0.123" not in text


def test_evidence_that_fails_gets_a_page_that_says_so_first(evidence: Evidence) -> None:
    lines = evidence.ledger("south").read_bytes().splitlines(keepends=True)
    evidence.ledger("south").write_bytes(b"".join(lines[:4]))
    made = make_report(evidence.root)
    text = Parsed(render(made)).text
    assert made.state == "does not verify" and made.failure is not None
    assert text.index("THIS EVIDENCE DOES NOT VERIFY") < text.index("In short")
    assert f"fails at south.jsonl, line 4 : {made.failure.why}" in text
    assert [step.state for step in made.steps].count("fails") == 1
    assert "nothing can be said about the study as a whole" in text and "✓ VERIFIED" not in text


def test_a_file_that_is_damaged_is_left_out_and_the_others_are_shown(evidence: Evidence) -> None:
    data = evidence.ledger("south").read_bytes()
    evidence.ledger("south").write_bytes(data.replace(b'"kind":"approve"', b'"kind":"reprove"', 1))
    evidence.record(2).write_bytes(evidence.record(2).read_bytes().replace(b'"offline"', b'"online!"'))
    made = make_report(evidence.root)
    assert [site.site for site in made.sites] == ["north", "west"]
    assert set(made.left_out) == {"south.jsonl", "rounds/0002.json"} and made.rounds == 2
    text = Parsed(render(made)).text
    assert "its ledger is left out: see Verification" in text


def test_under_another_coordinators_key_nothing_is_shown(evidence: Evidence) -> None:
    made = make_report(evidence.root, "0" * 32)
    text = Parsed(render(made)).text
    assert "it is the key of another coordinator" in text
    assert made.study is None and made.sites == () and "In short" not in text


def test_without_privacy_there_is_no_number(without_privacy: Evidence) -> None:
    made = make_report(without_privacy.root, without_privacy.coordinator.public.fingerprint)
    text = Parsed(render(made)).text
    assert made.state == "verified" and "This study runs without differential privacy" in text
    assert "north 3 of 3 no guarantee no guarantee icu no guarantee no limit no limit" in text
    assert "inf" not in re.findall(r"\w+", text) and "nan" not in text
    assert json.loads(as_json(made))["sites"][0]["account"]["assets"][0]["epsilon"] is None


def paid(made: Report, site: str) -> dict[str, str]:
    return {row.what: row.paid for each in made.sites if each.site == site for row in each.outflow}


def test_what_left_says_for_everything_what_paid_for_it(busy: Busy, busy_report: Report, busy_page: bytes) -> None:
    charged = ("model updates, masked", "evaluation counts, masked", "number of patients")
    free = ("short answers", "keys for secure sums", "signatures on who is in a sum", "shares of masks")
    everything = dict.fromkeys(charged, "charged") | dict.fromkeys(free, "nothing to charge")
    assert paid(busy_report, "lund") == everything
    (lund,) = [site for site in busy_report.sites if site.site == "lund"]
    found = lund.account.of_study(busy.study.digest)
    assert found is not None
    alone = {purpose: account.epsilon for purpose, account in found[1].purposes.items()}
    assert set(alone) == {"training", "evaluation", "count"}
    assert max(alone.values()) < found[1].epsilon < sum(alone.values()), "costs compose"
    assert "one number with noise of standard deviation 10 patients" in Parsed(busy_page).text
    assert "✗ not charged" not in Parsed(busy_page).text


def test_the_page_tells_which_sums_did_not_go_smoothly(busy_report: Report, busy_page: bytes) -> None:
    text = Parsed(busy_page).text
    assert [each.round for each in busy_report.sums if each.of == "updates"] == list(range(1, 25))
    assert "25 sums were opened, 21 of them at the first attempt" in text
    everybody = "aarhus, bergen, lund, turku"
    for row in (
        f"3 updates 2 – {everybody} 4: {everybody} 3 –",
        f"7 updates 1 – {everybody} 4: {everybody} 3 ✗ no step was taken: the mean update has norm 312",
        "20 updates 1 bergen aarhus, lund, turku 3: aarhus, lund, turku 3 –",
        f"22 updates 1 – {everybody} 3: aarhus, bergen, turku 3 –",
    ):
        assert row in text


def test_what_left_again_under_other_masks_is_told_and_needs_no_charge(repeated: Evidence) -> None:
    made = make_report(repeated.root, repeated.coordinator.public.fingerprint)
    assert made.state == "verified" and paid(made, "west")["model updates, masked"] == "charged"
    assert "3 charges for training; 3 times the same left again" in Parsed(render(made)).text


def test_what_left_without_a_charge_is_marked_and_the_evidence_fails(evidence: Evidence) -> None:
    def free_of_charge(lines: list[Line]) -> list[Line]:
        gone = {line[0] for line in lines if line[2] == "charge" and line[3]["purpose"] == "evaluation"}
        kept = [line for line in lines if line[0] not in gone and line[3].get("charge_seq") not in gone]
        return evidence.moved(kept)

    evidence.rewrite("west", free_of_charge)
    made = make_report(evidence.root)
    assert made.failure is not None and made.failure.step == 8
    marked = {what for what, by in paid(made, "west").items() if by == "not charged"}
    assert marked == {"evaluation counts, masked"}
    assert "✗ not charged" in Parsed(render(made)).text


def test_a_measured_bound_above_the_proven_one_is_a_defect_in_red(busy_report: Report) -> None:
    (aarhus,) = [site for site in busy_report.sites if site.site == "aarhus"]
    assert aarhus.measured is not None and aarhus.measured.of_plan and aarhus.measured.contradiction is None
    worst = dataclasses.replace(aarhus.measured.bounds[0], measured=9.0)
    measured = dataclasses.replace(aarhus.measured, bounds=(worst,), contradiction=worst, of_plan=False)
    sites = tuple(
        dataclasses.replace(site, measured=measured) if site is aarhus else site for site in busy_report.sites
    )
    text = Parsed(render(dataclasses.replace(busy_report, sites=sites))).text
    assert "the program leaks more than its plan allows" in text and "✗ above the proven" in text
    assert "of another plan than the approved one" in text


def audited(evidence: Evidence, *correct: int) -> Measured:
    """What the report shows of so many audits in North's ledger, each with 100 of 1000 canaries guessed."""

    def more(lines: list[Line]) -> list[Line]:
        number, time = lines[-1][:2]
        about = {"study": evidence.study, "name": "sepsis", "plan": "3" * 64, "by": "Dr Ono"}
        each = [{**about, "canaries": 1000, "guesses": 100, "correct": right} for right in correct]
        return [*lines, *([number, time, "audit", body] for body in each)]

    evidence.rewrite("north", more)
    (north,) = [site for site in make_report(evidence.root).sites if site.site == "north"]
    assert north.measured is not None
    return north.measured


def test_an_audit_that_contradicts_what_is_proven_is_not_hidden_by_later_ones(evidence: Evidence) -> None:
    shown = audited(evidence, 60, 100, 99, 55)
    assert (shown.audits, shown.correct, shown.last) == (4, 100, False) and shown.contradiction is not None
    text = Parsed(render(make_report(evidence.root))).text
    assert "4 audits of the study here, shown: the one furthest above what is proven, which is not the last" in text


def test_of_audits_without_a_contradiction_the_last_is_shown(evidence: Evidence) -> None:
    shown = audited(evidence, 60, 55)
    assert (shown.audits, shown.correct, shown.last, shown.contradiction) == (2, 55, True, None)
    assert "2 audits of the study here, shown: the last" in Parsed(render(make_report(evidence.root))).text


def test_running_many_audits_proves_no_defect_by_chance(evidence: Evidence, tmp_path: Path) -> None:
    alone = audited(evidence.copy(tmp_path / "alone"), 80).bounds[0]
    assert audited(evidence, *[80] * 20).bounds[0].measured < alone.measured


# -- the command


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["consilium-audit", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_page_is_written_whatever_the_verdict_and_the_exit_status_is_verifys(
    evidence: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    coordinator = ("--coordinator", evidence.coordinator.public.fingerprint)
    assert run(monkeypatch, "report", evidence.root, *coordinator, "--output", page) == 0
    assert "✓ VERIFIED" in Parsed(page.read_bytes()).text and "VERIFIED" in capsys.readouterr().out
    evidence.ledger("west").unlink()
    assert run(monkeypatch, "report", evidence.root, *coordinator, "--output", page) == 2
    assert "VERIFIED IN PART" in Parsed(page.read_bytes()).text and "west" in capsys.readouterr().err
    assert run(monkeypatch, "report", evidence.root, *coordinator, "--output", page, "--partial", "--json") == 0
    assert json.loads(capsys.readouterr().out)["unchecked"] == ["west"]
    evidence.record(2).write_bytes(b"{}")
    assert run(monkeypatch, "report", evidence.root, *coordinator, "--output", page) == 6
    assert "DOES NOT VERIFY" in Parsed(page.read_bytes()).text
    assert "0002.json" in "".join(capsys.readouterr().err.split())


def test_where_there_is_no_evidence_there_is_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    assert run(monkeypatch, "report", tmp_path, "--output", page) == 2
    assert not page.exists()


def test_the_report_loads_neither_torch_nor_flwr(evidence: Evidence, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from consilium_audit.page import render\n"
        "from consilium_audit.report import make_report\n"
        f"assert render(make_report(Path({str(evidence.root)!r})))\n"
        "print({'torch', 'flwr', 'opacus', 'pandas', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
