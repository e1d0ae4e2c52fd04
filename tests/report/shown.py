"""Two tables with something of all that people are shown, and what they see of them: page.html,
plot.txt and text.txt beside this file.

Where that is meant to change, `python -m tests.report.shown` writes them anew. Read what it
changed, the page in a browser, before it is committed.
"""

from dataclasses import replace
from pathlib import Path

from adaptive_moe import __version__
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Result, Standing, conclude
from adaptive_moe.policy.evidence import Bucket, Fill
from adaptive_moe.policy.losses import combine
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.report.explain import explain
from adaptive_moe.report.page import STYLE, page
from adaptive_moe.report.plot import figure_of
from adaptive_moe.report.text import bucket_table, headline
from adaptive_moe.shape import SortingShape
from tests.report.figures import described
from tests.tables import ENVIRONMENT, make_table

HERE = Path(__file__).parent
SHAPE = SortingShape(16, 4, 64)
ONE, TWO = "policy 1", "policy 2"


def bucket(count, base_us, *others, rounds=8):
    verdict = conclude([Result("policy 0", Standing.BASELINE, base_us, 0.0), *others], rounds)
    return Bucket(count, verdict.candidate, verdict.reason, (Fill(1.0, verdict),))


def faster(name, us, gain):
    return Result(name, Standing.FASTER, us, gain, gain - 0.05, gain + 0.03)


def tied(name, us):
    return Result(name, Standing.TIED, us, 0.0, -0.01, 0.02)


HOPELESS = Result(TWO, Standing.HOPELESS, 90.0, reason="9.0 times the fastest at the first look")
FAILED = Result(ONE, Standing.FAILED, reason="raised ValueError: <none>")
UNMEASURED = [Result(name, Standing.UNSETTLED) for name in (ONE, TWO)]


def everything() -> PolicyTable:
    """All situations. A loss beyond the edge of the plot, a time without a saving, a saving without
    an interval, and one that failed before it was timed. Graphs and eager calls get different
    sorts, of which one changes back and forth, at last at the largest batch alone."""
    graph = (
        bucket(1, 10.0, tied(ONE, 10.0), Result(TWO, Standing.SLOWER, 20.0, -1.0, -1.5, -0.5)),
        bucket(8, 10.0, faster(ONE, 8.0, 0.2), HOPELESS),
        bucket(16, 15.0, Result(ONE, Standing.UNSETTLED, 14.4, 0.04), faster(TWO, 12.0, 0.2)),
    )
    busy = (
        bucket(16, 16.0, FAILED, faster(TWO, 12.0, 0.25)),
        bucket(48, 20.0, FAILED, tied(TWO, 20.0)),
        bucket(63, 25.0, FAILED, faster(TWO, 20.0, 0.2)),
        bucket(64, 25.0, FAILED, Result(TWO, Standing.UNSETTLED, 24.0, 0.04, -0.02, 0.09)),
    )
    idle = (
        bucket(8, 30.0, tied(ONE, 30.0), tied(TWO, 30.0)),
        bucket(16, 30.0, tied(ONE, 30.0), faster(TWO, 27.0, 0.1)),
    )
    coverage = Coverage(SHAPE, "policy 0", ((2, 64),), (1, 8, 16), busy_from=20)
    found = make_table({64: 0}, coverage=coverage, seconds=1.234).evidence
    return PolicyTable(replace(found, graph=graph, busy=busy, idle=idle))


def padded() -> PolicyTable:
    """Eager calls of a few counts, another kernel, batches that are padded, and little measured."""
    full = bucket(64, 20.0, faster(ONE, 16.0, 0.2), tied(TWO, 20.0))
    padding = bucket(64, 8.0, tied(ONE, 8.0), tied(TWO, 8.0))
    verdicts = (*full.verdicts, *padding.verdicts)
    fills = tuple(map(Fill, (1.0, 1 / 64), verdicts))
    busy = (bucket(40, None, *UNMEASURED, rounds=0), Bucket(64, *combine(verdicts), fills))
    coverage = Coverage(SHAPE, "policy 0", ((33, 64),), busy_from=1)
    where = replace(ENVIRONMENT, device="another device", runtime="ROCm <7>")
    found = make_table({64: 0}, coverage=coverage, environment=where, seconds=2.0).evidence
    return PolicyTable(replace(found, kernel="another & kernel", budget_s=2.0, busy=busy))


def page_text() -> str:
    text = page([everything(), padded()], "read <here>", ["<svg>a plot</svg>"])
    text = text.replace(STYLE, " what page.py says ")
    return text.replace(f"adaptive_moe {__version__}", "adaptive_moe VERSION")


def plot_text() -> str:
    figures = map(figure_of, (everything(), padded()))
    return "".join(f"{line}\n" for figure in figures for line in described(figure))


def text_text() -> str:
    calls = ((8, True), (16, False), (19, False), (20, False)), ((64, False), (65, False))
    lines = []
    for table, counts in zip((everything(), padded()), calls, strict=True):
        lines += [headline(table), *bucket_table(table)]
        for count, captured in counts:
            lines += explain(table, count, captured=captured)
    return "".join(f"{line}\n" for line in lines)


SEEN = {"page.html": page_text, "plot.txt": plot_text, "text.txt": text_text}

if __name__ == "__main__":
    for name, text in SEEN.items():
        (HERE / name).write_text(text(), encoding="utf-8")
