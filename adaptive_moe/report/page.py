"""Everything of a start on one page: one HTML file that needs no network and no script.

On top a sentence of result for each table, the largest gain first; then each table with its plot,
and the evidence behind it folded away. It follows the reader's light or dark mode, and prints
whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape

from adaptive_moe import __version__
from adaptive_moe.policy.coverage import Situation
from adaptive_moe.policy.savings import savings
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.report.text import advice, bucket_heads, bucket_rows, kept_words, result_line
from adaptive_moe.report.words import (
    CPU_KERNEL,
    TUNES_NOTHING,
    calls_words,
    candidate_words,
    measured_situations,
    plural,
    situation_words,
    title_words,
)

STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --paper: #fff; --quiet: #555; --line: #ddd;
        --head: #f4f4f4; --link: #0a558c; --mark: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --paper: #16181b; --quiet: #a8adb3;
        --line: #3a3f45; --head: #23272c; --link: #7cc0f4; --mark: #f0883e; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--paper);
       margin: 2rem auto; max-width: 78rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0.2rem; } h2 { font-size: 1.15rem; margin: 0 0 0.3rem; }
p { margin: 0.3rem 0; } a { color: var(--link); } .quiet { color: var(--quiet); }
.results { padding-left: 1.2rem; } .results li { margin: 0.35rem 0; }
.note { border-left: 4px solid var(--mark); padding-left: 0.7rem; }
section { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: 1.2rem; }
table { border-collapse: collapse; margin: 0.6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); }
th { background: var(--head); font-weight: 600; }
th:last-child, td:last-child { text-align: left; }
.left th, .left td { text-align: left; vertical-align: top; }
details { margin: 0.5rem 0; } summary { cursor: pointer; color: var(--link); }
.wide { overflow-x: auto; }
.plot { background: #fff; border-radius: 6px; padding: 0.4rem; margin: 0.6rem 0; }
.plot svg { display: block; width: 100%; height: auto; }
@media print {
  :root { --text: #000; --paper: #fff; --quiet: #444; --line: #bbb; --head: #eee; --link: #000; }
  body { max-width: none; margin: 0; font-size: 10px; }
  details::details-content { content-visibility: visible; block-size: auto; }
  details > * { display: block; } .wide { overflow: visible; }
  .plot, tr, li { break-inside: avoid; } h2, summary { break-after: avoid; }
}
"""


def page(tables: Sequence[PolicyTable], source: str, plots: Sequence[str]) -> str:
    """The page as HTML.

    Args:
        tables: at least one.
        source: where they were read, in words.
        plots: an <svg> element a table (report/plot.py), or nothing.
    """
    title = f"MoE sorting on {tables[0].evidence.environment.device}: what was measured and decided"
    order = sorted(range(len(tables)), key=lambda number: (-_most(tables[number]), number))
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(source)}; adaptive_moe {escape(__version__)}</p>',
    ]
    if any(table.evidence.kernel == CPU_KERNEL for table in tables):
        note = TUNES_NOTHING[0].upper() + TUNES_NOTHING[1:]
        parts.append(f'<p class="note">{escape(note)}.</p>')
    parts.append(_results([(number, tables[number]) for number in order]))
    for number in order:
        parts += _section(number, tables[number], plots[number] if number < len(plots) else "")
    parts += _environments(tables)
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _most(table: PolicyTable) -> float:
    """The largest gain of a table."""
    return max(savings(table, situation).most or 0.0 for situation in Situation)


def _results(numbered: Sequence[tuple[int, PolicyTable]]) -> str:
    items = [
        f'<li><a href="#table{number}">{escape(result_line(table))}</a></li>'
        for number, table in numbered
    ]
    return '<ul class="results">\n' + "\n".join(items) + "\n</ul>"


def _environments(tables: Sequence[PolicyTable]) -> Iterator[str]:
    """Where it was measured, once where all tables agree."""
    different = dict.fromkeys((t.evidence.kernel, t.evidence.environment) for t in tables)
    for kernel, environment in different:
        rows = [["kernel", escape(kernel)]]
        rows += [[name, escape(str(value))] for name, value in asdict(environment).items() if value]
        summary = f"environment: {kernel} on {environment.device}"
        yield _details(summary, _html_table(["", ""], rows, "left"))


def _section(number: int, table: PolicyTable, plot: str) -> Iterator[str]:
    evidence = table.evidence
    yield f'<section id="table{number}">'
    yield f"<h2>{escape(title_words(evidence.coverage))}</h2>"
    yield (
        f'<p class="quiet">{escape(calls_words(evidence.coverage))}; {escape(evidence.kernel)}, '
        f"baseline {escape(candidate_words(evidence.coverage.baseline))}; measured "
        f"{escape(evidence.created)} in {evidence.seconds:.2f} s of a budget of "
        f"{evidence.budget_s:g} s; margin {evidence.rule.margin:.1%}, confidence "
        f"{evidence.rule.confidence:.0%}</p>"
    )
    if why := kept_words(table):
        yield f'<p class="quiet">The baseline stays at {escape(why)}.</p>'
    yield from (f'<p class="note">{escape(line)}</p>' for line in advice(table))
    if plot:
        yield f'<div class="plot">{plot}</div>'
    yield _sorted_by(table)
    for situation in measured_situations(table):
        rows = [list(map(escape, row)) for row in bucket_rows(table, situation)]
        evidence_rows = f'<div class="wide">{_html_table(bucket_heads(table), rows)}</div>'
        counts = plural(len(table.choices(situation)), "token count")
        yield _details(f"evidence: {situation_words(situation)} calls, {counts}", evidence_rows)
    yield "</section>"


def _sorted_by(table: PolicyTable) -> str:
    """What each kind of call gets, by token counts."""
    rows = []
    for situation in measured_situations(table):
        kind = situation_words(situation)
        for first, last, name in table.runs(captured=situation is Situation.GRAPH):
            span = f"{last:,}" if first == last else f"{first:,} to {last:,}"
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
