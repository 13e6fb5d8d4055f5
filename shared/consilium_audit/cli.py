"""consilium-audit: the auditor's program. It trusts neither the coordinator nor a hospital."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from consilium_audit.budget import PURPOSES, AssetAccount, SiteAccount, account
from consilium_audit.evidence import (
    STEPS,
    VerificationFailed,
    checking,
    read_coordinator,
    read_ledger,
    read_ledgers,
    read_roster,
)
from consilium_audit.progress import Bar
from consilium_audit.verdict import Passed, Verdict
from consilium_audit.verify import Verification
from consilium_shared import console
from consilium_shared.errors import ConfigurationError, IntegrityError, PeerError, SignatureError
from consilium_shared.files import write_atomically
from consilium_shared.identity import PublicIdentity
from consilium_shared.printable import printable
from consilium_shared.privacy.budget import in_words
from consilium_shared.protocol import version

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Check what a federation says it did, and what it cost in privacy."
)
version.add_to(app)

JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
NOT_VERIFIED = 6
"""Exit status, as for every ``IntegrityError``."""

MOST_SAID = 5
"""Contradictions of a ledger that the message names; all are in the JSON."""


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="the coordinator's evidence, with <site>.jsonl of each hospital")],
    coordinator: Annotated[str | None, typer.Option(help="The coordinator's fingerprint, as you heard it.")] = None,
    partial: Annotated[bool, typer.Option(help="Let ledgers be missing; what they would show stays open.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Verify a study step by step; stops at the first step that fails, with file and line."""

    def tell(step: Passed) -> None:
        if not as_json:
            console.console.print(f"[green]✓[/] {step.number:>2}  {step.name:<24}", end="")
            console.console.print(step.says, markup=False, soft_wrap=True)

    bar = Bar(console.errors)
    work = Verification(folder, coordinator, tell, lambda step, done, of: bar.update(STEPS[step], done, of))
    try:
        with bar:
            verdict = work.run()
    except VerificationFailed as failure:
        if not as_json:
            console.console.print(f"[red]✗[/] {failure.step:>2}  {STEPS[failure.step]}")
            raise
        _print_json(_verdict_json(work.verdict, failure))
        raise typer.Exit(NOT_VERIFIED) from failure
    if as_json:
        _print_json(_verdict_json(verdict, None))
    else:
        _show(verdict)
    _demand_whole(verdict.open, verdict.compared, partial)


def _demand_whole(open_: tuple[str, ...], compared: bool, partial: bool) -> None:
    """Raises ConfigurationError for what stays open; with ``partial`` ledgers may be missing, and nothing else."""
    if open_ and not (compared and partial):
        raise ConfigurationError("not everything could be verified: " + "; and ".join(open_))


def _show(verdict: Verdict) -> None:
    for note in verdict.notes:
        console.console.print("[yellow]note:[/] ", end="")
        console.console.print(note, markup=False)
    console.table(
        "ledgers",
        ["site", "entries", "of these behind a head that others hold"],
        [(site, everything, behind) for site, (behind, everything) in sorted(verdict.witnessed.items())],
    )
    if not verdict.open:
        console.console.print(f"[bold green]VERIFIED[/]: study {verdict.study}, {verdict.rounds} rounds")
        return
    without = [] if verdict.compared else ["the coordinator's fingerprint compared with anything"]
    if verdict.unchecked:
        without.append(f"the ledgers of {', '.join(verdict.unchecked)}")
    console.console.print(
        f"[bold yellow]VERIFIED IN PART[/]: study {verdict.study}, {verdict.rounds} rounds, without "
        + " and ".join(without)
    )


def _verdict_json(verdict: Verdict, failure: VerificationFailed | None) -> dict[str, Any]:
    """``verified``: every step holds and nothing stays open; ``open`` says what does."""
    return {
        "verified": failure is None and not verdict.open,
        "open": list(verdict.open),
        "coordinator": verdict.coordinator,
        "compared": verdict.compared,
        "study": verdict.study,
        "rounds": verdict.rounds,
        "steps": [{"step": step.number, "name": step.name, "says": step.says} for step in verdict.steps],
        "failed": None
        if failure is None
        else {
            "step": failure.step,
            "name": STEPS[failure.step],
            "file": str(failure.file),
            "line": failure.line,
            "why": failure.why,
        },
        "unchecked": list(verdict.unchecked),
        "notes": verdict.notes,
        "ledgers": {site: {"entries": all_, "witnessed": seen} for site, (seen, all_) in verdict.witnessed.items()},
    }


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="the coordinator's evidence, with <site>.jsonl of each hospital")],
    coordinator: Annotated[str | None, typer.Option(help="The coordinator's fingerprint, as you heard it.")] = None,
    partial: Annotated[bool, typer.Option(help="Let ledgers be missing; what they would show stays open.")] = False,
    output: Annotated[Path, typer.Option(help="The page to write; one that is there is replaced.")] = Path(
        "report.html"
    ),
    as_json: JsonOption = False,
) -> None:
    """Write one page with everything that the evidence shows, also of evidence that does not verify."""
    from consilium_audit import page  # jinja2 is needed for this alone
    from consilium_audit.report import make_report

    with Bar(console.errors) as bar:
        made = make_report(folder, coordinator, bar.update)
    try:
        write_atomically(output, page.render(made))
    except OSError as error:
        raise ConfigurationError(f"cannot write {output}: {error.strerror}") from error
    if as_json:
        print(page.as_json(made))
    else:
        console.console.print(f"{made.state.upper()}: the page is {output}", markup=False, soft_wrap=True)
    if made.failure is not None:
        failed = made.failure
        raise VerificationFailed(failed.step, folder / failed.file, failed.line, failed.why)
    _demand_whole(made.open, made.compared, partial)


@app.command()
def budget(
    source: Annotated[Path, typer.Argument(help="a folder of evidence with ledgers, or one ledger")],
    identity: Annotated[str | None, typer.Option(help="For one ledger: its site's public key, 64 hex digits.")] = None,
    site: Annotated[str | None, typer.Option(help="For one ledger: its site's name, if the file does not say.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Recompute what was spent and what is left, by site, asset and study."""
    accounts = _accounts_of_folder(source) if source.is_dir() else [_account_of_ledger(source, identity, site)]
    if as_json:
        _print_json({each.site: _account_json(each) for each in accounts})
    else:
        _show_accounts(accounts)
    contradicted = [f"{each.site}, line {found.line}: {found}" for each in accounts for found in each.contradictions]
    if contradicted:
        raise IntegrityError("a ledger contradicts itself; " + "; ".join(contradicted[:MOST_SAID]))


def _show_accounts(accounts: list[SiteAccount]) -> None:
    for each in accounts:
        console.table(
            f"{each.site}: ε recomputed from the {each.entries} entries of its ledger",
            ["asset, · study", "spent", "at δ", "allowed", "left", "rounds", "unsettled", "refused"],
            [row for asset in each.assets for row in _rows(asset)],
        )
    purposes = [row for each in accounts for row in _purpose_rows(each)]
    if purposes:
        title = "each purpose alone: ε (charges)"
        console.table(title, ["site", "study", *PURPOSES], purposes)
    refused = [
        (each.site, _name_of(each, study), reason, count)
        for each in accounts
        for (study, reason), count in each.refusals.items()
    ]
    if refused:
        console.table("refusals", ["site", "study", "reason", "how often"], refused)


def _purpose_rows(each: SiteAccount) -> Iterator[tuple[Any, ...]]:
    for asset in each.assets:
        for study in asset.studies:
            if study.purposes:
                cells = (study.purposes.get(purpose) for purpose in PURPOSES)
                shown = (None if cell is None else f"{in_words(cell.epsilon)} ({cell.charges})" for cell in cells)
                yield (each.site, study.name, *shown)


def _name_of(each: SiteAccount, study: str | None) -> str | None:
    """The study's name where the ledger has one, else the beginning of its digest."""
    if study is None:
        return None
    found = each.of_study(study)
    return study[:12] if found is None else found[1].name


def _rows(asset: AssetAccount) -> list[tuple[Any, ...]]:
    """The asset's budget, then each study that spent of it, at the study's own δ."""
    spent, limit, left = in_words(asset.epsilon), in_words(asset.limit), in_words(asset.left, up=False)
    rounds = sum(study.rounds for study in asset.studies)
    unsettled = sum(study.unsettled for study in asset.studies)
    refused = sum(sum(study.refused.values()) for study in asset.studies)
    rows: list[tuple[Any, ...]] = [(asset.asset, spent, f"{asset.delta:g}", limit, left, rounds, unsettled, refused)]
    for study in asset.studies:
        name, spent, allowed = f"· {study.name}", in_words(study.epsilon), in_words(study.approved)
        counted = (study.rounds, study.unsettled, sum(study.refused.values()))
        if study.delta is None:
            rows.append((name, spent, None, allowed, None, *counted))
            continue
        left = in_words(max(0.0, study.approved - study.epsilon), up=False)
        rows.append((name, spent, f"{study.delta:g}", allowed, left, *counted))
    return rows


def _accounts_of_folder(folder: Path) -> list[SiteAccount]:
    ledgers = read_ledgers(folder, read_roster(folder, read_coordinator(folder)))
    if not ledgers:
        raise ConfigurationError(f"{folder} holds no ledger of a site in its roster; they are called <site>.jsonl")
    found = []
    for file, ledger in ledgers.values():
        with checking(9, file):
            found.append(account(ledger))
    return found


def _account_of_ledger(file: Path, identity: str | None, site: str | None) -> SiteAccount:
    if identity is None:
        raise ConfigurationError(
            "a single ledger needs --identity, the site's public key (64 hex digits): it stands in the federation's "
            "roster; a folder of evidence has it in roster.json"
        )
    name = site or (file.resolve().parent.name if file.name == "ledger.jsonl" else file.stem)
    try:
        key = PublicIdentity.from_hex(identity)
    except SignatureError as error:
        raise ConfigurationError(f"--identity: {error}") from error
    try:
        return account(read_ledger(file, name, key))
    except IntegrityError as error:
        raise IntegrityError(f"{printable(str(file))}, as the ledger of site {name!r}: {error}") from error
    except (OSError, PeerError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigurationError(f"cannot read {printable(str(file))}: {why}") from error


def _account_json(site: SiteAccount) -> dict[str, Any]:
    """Infinity is written as null, as in the ledger."""
    return {
        "entries": site.entries,
        "assets": {
            asset.asset: {
                "epsilon": _finite(asset.epsilon),
                "delta": asset.delta,
                "limit": _finite(asset.limit),
                "left": _finite(asset.left),
                "studies": [
                    {
                        "study": study.study,
                        "name": study.name,
                        "epsilon": _finite(study.epsilon),
                        "delta": study.delta,
                        "approved": _finite(study.approved),
                        "rounds": study.rounds,
                        "unsettled": study.unsettled,
                        "purposes": {
                            purpose: {"charges": each.charges, "epsilon": _finite(each.epsilon)}
                            for purpose, each in study.purposes.items()
                        },
                        "refused": study.refused,
                    }
                    for study in asset.studies
                ],
            }
            for asset in site.assets
        },
        "refusals": [
            {"study": study, "reason": reason, "count": count} for (study, reason), count in site.refusals.items()
        ],
        "contradictions": [
            {"line": each.line, "study": each.study, "name": each.name, "why": each.why} for each in site.contradictions
        ],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))  # ASCII alone: no character of others reaches a terminal


def main() -> None:
    """Entry point."""
    console.run(app, "consilium-audit")


if __name__ == "__main__":
    main()
