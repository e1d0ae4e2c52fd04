"""Everything of a start on one page: one HTML file that needs no network and no script.

For each table what is applied, what it gains and its plot; the evidence behind it folded away.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape

from adaptive_moe import __version__
from adaptive_moe.policy.coverage import Situation
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.report.text import advice, bucket_heads, bucket_rows, gains, kept
from adaptive_moe.report.words import calls_words, candidate_words, sections, situation_words

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 2rem auto;
       max-width: 78rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0.2rem; } h2 { font-size: 1.15rem; margin: 0 0 0.3rem; }
p { margin: 0.3rem 0; } .quiet { color: #555; } .advice { border-left: 4px solid #d55e00;
padding-left: 0.7rem; }
section { border-top: 1px solid #ccc; margin-top: 2rem; padding-top: 1.2rem; }
table { border-collapse: collapse; margin: 0.6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.7rem; text-align: right; border-bottom: 1px solid #e6e6e6; }
th { background: #f4f4f4; font-weight: 600; } th:last-child, td:last-child { text-align: left; }
.left th, .left td { text-align: left; vertical-align: top; }
details { margin: 0.5rem 0; } summary { cursor: pointer; color: #0a558c; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; }
@media print { details > * { display: block; } section { break-inside: avoid; } }
"""


def page(tables: Sequence[PolicyTable], source: str, plots: Sequence[str]) -> str:
    """The page as HTML.

    Args:
        tables: at least one, in the order to show.
        source: where they were read, in words.
        plots: an <svg> element a table (report/plot.py), or nothing.
    """
    title = f"{tables[0].evidence.environment.device}: MoE sorting, what was measured and decided"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(source)}; adaptive_moe {escape(__version__)}</p>',
        *_overview(tables),
        *_environments(tables),
    ]
    for number, table in enumerate(tables):
        parts += _section(number, table, plots[number] if number < len(plots) else "")
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _overview(tables: Sequence[PolicyTable]) -> Iterator[str]:
    rows = []
    for number, table in enumerate(tables):
        found = table.evidence
        link = f'<a href="#table{number}">{escape(calls_words(found.coverage))}</a>'
        cells = (candidate_words(found.coverage.baseline), gains(table), kept(found))
        rows.append([link, *map(escape, cells)])
    heads = ["what is sorted", "baseline", "gain where another is applied", "baseline kept"]
    yield _html_table(heads, rows, "left")


def _environments(tables: Sequence[PolicyTable]) -> Iterator[str]:
    """Where it was measured, once where all tables agree."""
    different = dict.fromkeys((t.evidence.kernel, t.evidence.environment) for t in tables)
    for kernel, environment in different:
        rows = [["kernel", escape(kernel)]]
        rows += [[name, escape(str(value))] for name, value in asdict(environment).items() if value]
        summary = f"environment: {kernel} on {environment.device}"
        yield _details(summary, _html_table(["", ""], rows, "left"))


def _section(number: int, table: PolicyTable, plot: str) -> Iterator[str]:
    found = table.evidence
    yield f'<section id="table{number}">'
    yield f"<h2>{escape(calls_words(found.coverage))}</h2>"
    yield (
        f'<p class="quiet">{escape(found.kernel)}, baseline '
        f"{escape(candidate_words(found.coverage.baseline))}; measured {escape(found.created)} in "
        f"{found.seconds:.2f} s of a budget of {found.budget_s:g} s; margin "
        f"{found.rule.margin:.1%}, confidence {found.rule.confidence:.0%}</p>"
    )
    yield from (f'<p class="advice">{escape(line)}</p>' for line in advice(table))
    yield _applied(table)
    yield plot
    for situation in sections(found):
        rows = [list(map(escape, row)) for row in bucket_rows(found, situation)]
        evidence = f'<div class="wide">{_html_table(bucket_heads(found), rows)}</div>'
        count = len(found.section(situation))
        yield _details(f"evidence: {situation_words(found, situation)}, {count} buckets", evidence)
    yield "</section>"


def _applied(table: PolicyTable) -> str:
    """What each kind of call gets, by token counts."""
    rows = []
    kinds = [("eager", False)]
    if table.evidence.section(Situation.GRAPH):
        kinds.insert(0, ("captured", True))
    for kind, captured in kinds:
        least = table.evidence.coverage.eager[0][0] if kind == "eager" else 1
        for first, last, name in table.runs(captured=captured):
            begins = max(first, least)
            span = str(last) if begins == last else f"{begins} to {last}"
            rows.append([kind, span, escape(candidate_words(name))])
    return _html_table(["calls", "tokens", "sorted by"], rows, "left")


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]], name: str = "") -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    top = f"<thead><tr>{head}</tr></thead>\n" if any(heads) else ""
    return f'<table class="{name}">\n{top}<tbody>\n{body}\n</tbody>\n</table>'


def _details(summary: str, inside: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n{inside}\n</details>"
