"""Answer of a question as a self-contained page of HTML: tables, and for each count a bar with its interval."""

from __future__ import annotations

from html import escape

from consilium_shared.answer import Answer, Table

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#1c2733}"
    "table{border-collapse:collapse;width:100%;margin:1rem 0}td,th{padding:.3rem .6rem;text-align:right;"
    "border-bottom:1px solid #d5dce3}td:first-child,th:first-child{text-align:left}svg{display:block;width:100%}"
)


def page(answer: Answer) -> str:
    """The whole page."""
    said = (
        f"Patients by {answer.by}, from {answer.sites} hospitals. Every count carries noise that protects each patient "
        f"(ε {answer.epsilon:g}, δ {answer.delta:g}); the true one is within ± {answer.margin:.1f} in 95 of 100 cases. "
        "A count may be below 0, and tables of one question need not add up to the same number of patients."
    )
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(answer.study)}</title>'
    body = "".join(_table(table, answer.margin) for table in answer.tables)
    text = escape("\n".join(answer.lines()))
    return (
        f"{head}<style>{_STYLE}</style><h1>{escape(answer.study)}</h1><p>{escape(said)}</p>{body}"
        f"<details><summary>As text, with tests and quartiles</summary><pre>{text}</pre></details></html>\n"
    )


def _table(table: Table, margin: float) -> str:
    most = max(float(table.counts.max()) + margin, 1.0)
    head = "".join(f"<th>{escape(each)}</th>" for each in (table.name, *table.columns))
    rows = ""
    for name, counts in zip(table.rows, table.counts.tolist(), strict=True):
        cells = "".join(f"<td>{round(each)}{_bar(each, margin, most)}</td>" for each in counts)
        rows += f"<tr><td>{escape(name)}</td>{cells}</tr>"
    return f"<table><tr>{head}</tr>{rows}</table>"


def _bar(count: float, margin: float, most: float) -> str:
    """Bar of a count, and over it the line of its interval; nothing below 0 is drawn."""
    end, low, high = (100 * max(each, 0.0) / most for each in (count, count - margin, count + margin))
    return (
        '<svg viewBox="0 0 100 6" preserveAspectRatio="none" height="8" aria-hidden="true">'
        f'<rect width="{end:.1f}" height="6" fill="#9dc3e0"/>'
        f'<rect x="{low:.1f}" y="2" width="{high - low:.1f}" height="2" fill="#23527a"/></svg>'
    )
