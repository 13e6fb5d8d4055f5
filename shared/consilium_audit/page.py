"""The report as one HTML page that needs nothing else: no script, no font, no network. The same report, the same bytes.

Names, reasons and details come from ledgers that others wrote: the template escapes every value, and what is not
printable is replaced before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from decimal import ROUND_CEILING, Decimal
from importlib import metadata
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel

from consilium_audit import figures
from consilium_audit.budget import PURPOSES
from consilium_audit.figures import Curve, Figure
from consilium_audit.moves import Move
from consilium_audit.odds import PRIORS
from consilium_audit.participation import Participation, spans
from consilium_audit.report import Report
from consilium_audit.site_report import MOST_STUDIES, Measured, SiteReport
from consilium_shared.printable import printable
from consilium_shared.privacy.budget import in_words
from consilium_shared.privacy.canaries import Bounds, nearest

BLOCK = 50
"""Rounds in one line of the participation chart."""

MOST_CELLS = 400
"""Most rounds in the participation chart; of a longer study the table alone has them, by spans."""

MOST_RELEASES = 5_000
"""Releases of a site on the page; a browser opens no page with all of a very long study's."""

MOST_SUMS = 500
"""Secure sums on the page, of those that did not go smoothly."""

MOST_MOVES = 500
"""Rounds on the page with the length of their updates; of more, those with a jump or without metrics."""


def render(report: Report) -> bytes:
    """The page, UTF-8."""
    environment = Environment(
        loader=PackageLoader("consilium_audit", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "up": in_words,
        "down": lambda value: in_words(value, up=False),
        "percent": percent,
        "chance": chance,
        "times": times,
        "when": when,
        "spans": spans,
        "grouped": grouped,
    }
    page = environment.get_template("report.html").render(
        report=report,
        study_figures=[(site, study_figure(site, report)) for site in report.sites if site.rounds],
        asset_figures=[(site, asset, asset_figure(site, asset)) for site in report.sites for asset in site.assets],
        blocks=list(blocks(report.participation)),
        by_site={site.site: site for site in report.sites},
        purposes=PURPOSES,
        priors=PRIORS,
        most_releases=MOST_RELEASES,
        odd_sums=[each for each in report.sums if not each.smooth],
        most_sums=MOST_SUMS,
        most_studies=MOST_STUDIES,
        shown_moves=shown_moves(report.moves),
        shown_bounds=shown_bounds,
        accountants=list(dict.fromkeys(name for s in report.sites for c in s.compared for name in c.accountants)),
        infinity=math.inf,
        version=metadata.version("consilium"),
    )
    return page.encode()


def shown_moves(found: Sequence[Move]) -> Sequence[Move]:
    """Moves that the page has room for: all, or where they are too many the remarkable ones."""
    if len(found) <= MOST_MOVES:
        return found
    return [each for each in found if each.jump or each.no_metrics][:MOST_MOVES]


def as_json(report: Report) -> str:
    """Report as JSON for programs; infinity (no bound) is written as null."""
    return json.dumps(_plain(report), indent=2, sort_keys=True)


def study_figure(site: SiteReport, report: Report) -> Figure | None:
    """ε of the study by round at one site, below what was approved; None without privacy."""
    assert report.study is not None  # noqa: S101 - there are no sites without a study
    found = site.account.of_study(report.study.digest)
    if found is None or found[1].delta is None:
        return None
    study, last = found[1], report.study.training.rounds
    curve = Curve("spent", tuple((float(p.round), p.epsilon) for p in site.rounds), "a", step=True)
    limit = Curve("approved", ((0.0, study.approved), (float(last), study.approved)), "limit", step=True)
    description = (
        f"ε grows to {in_words(site.rounds[-1].epsilon)} at round {site.rounds[-1].round}; "
        f"approved were {in_words(study.approved)}."
    )
    return figures.by_round(f"{site.site}: ε of {study.name} by round", description, [curve, limit], last)


def asset_figure(site: SiteReport, asset: str) -> Figure | None:
    """ε of an asset by the calendar at one site: all, the studies that cost most, and the budget; None without both."""
    moments = site.assets[asset]
    account = next(each for each in site.account.assets if each.asset == asset)
    if math.isinf(account.epsilon) and math.isinf(account.limit):
        return None
    xs = [figures.seconds(moment.time) for moment in moments]
    largest = sorted(account.studies, key=lambda study: -study.epsilon)[:MOST_STUDIES]
    curves = [
        Curve("budget", tuple((x, m.limit) for x, m in zip(xs, moments, strict=True)), "limit", step=True),
        Curve("all", tuple((x, m.epsilon) for x, m in zip(xs, moments, strict=True)), "a", step=True),
    ]
    for look, study in zip("bcd", (each for each in account.studies if each in largest), strict=False):
        points = tuple(
            (x, m.studies[study.study]) for x, m in zip(xs, moments, strict=True) if study.study in m.studies
        )
        curves.append(Curve(study.name, points, look, step=True))
    description = (
        f"From {when(moments[0].time)} to {when(moments[-1].time)}, ε of everything together grows to "
        f"{in_words(account.epsilon)} of {in_words(account.limit)}, at δ = {account.delta:g}. "
        + " ".join(f"Study {each.name}: {in_words(each.epsilon)}." for each in account.studies)
    )
    return figures.by_date(f"{site.site}: ε of asset {asset} by date", description, curves)


def blocks(parts: Sequence[Participation]) -> Iterator[tuple[int, int, list[tuple[str, tuple[str, ...]]]]]:
    """The participation chart: first and last round of each line, and every site's standings in it."""
    rounds = len(parts[0].standings) if parts else 0
    if rounds > MOST_CELLS:
        return
    for first in range(0, rounds, BLOCK):
        last = min(first + BLOCK, rounds)
        yield first + 1, last, [(part.site, part.standings[first:last]) for part in parts]


def shown_bounds(measured: Measured) -> list[Bounds]:
    """Measured bounds that are shown: that at the study's δ, and the one that comes nearest to what is proven."""
    return list(dict.fromkeys([measured.bounds[0], nearest(measured.bounds)])) if measured.bounds else []


def percent(probability: float) -> str:
    """A probability in percent, rounded up to one decimal; more where that would read as certainty."""
    for digits in ("0.1", "0.001", "0.00001"):
        shown = (Decimal(repr(probability)) * 100).quantize(Decimal(digits), rounding=ROUND_CEILING)
        if shown < 100:
            return Markup(f"{shown}&nbsp;%")  # noqa: S704 - digits alone
    return Markup("100&nbsp;%")


def chance(delta: float) -> str:
    """A δ as people write it: 0.001, 10⁻⁵, 2·10⁻⁵."""
    if delta == 0 or delta >= 1e-4:
        return f"{delta:g}"
    digits, _, power = f"{delta:.3g}".partition("e")
    power = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{power}" if digits == "1" else f"{digits}·10{power}"


def times(factor: float) -> str:
    """A factor, rounded up, to be read by people."""
    if math.isinf(factor):
        return "without bound"
    if factor >= 1e6:
        return "more than a million"
    if factor >= 100:
        return grouped(math.ceil(factor))
    return str(Decimal(repr(factor)).quantize(Decimal("0.01"), rounding=ROUND_CEILING))


def grouped(number: int) -> str:
    """A whole number with its thousands apart."""
    return Markup(f"{number:,}".replace(",", "&#8239;"))  # noqa: S704 - digits alone


def when(time: str) -> str:
    """A ledger's time for people, to the minute."""
    return f"{time[:10]} {time[11:16]} UTC" if time else "–"


def _shown(value: Any) -> Any:
    if value is None:
        return "–"
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value, keep="\n")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {_key(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _key(key: Any) -> str:
    return " ".join("-" if part is None else str(part) for part in key) if isinstance(key, tuple) else str(key)
