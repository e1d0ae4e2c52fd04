"""Time against tokens, a panel a situation. Needs matplotlib.

Made for print and for every reader: candidates differ in marker, line and hatch as well as in
colour (Okabe and Ito's, which colour-blind readers tell apart). Above, the time of each candidate;
below it, what each saves of the baseline's time with its interval; at the bottom a band with what
is applied. Hollow markers are unsettled.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adaptive_moe.policy.decision import Result, Standing
from adaptive_moe.policy.coverage import Situation
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.report.words import (
    calls_words,
    candidate_words,
    sections,
    situation_words,
    time_us,
)

FORMATS = ("png", "svg")
# A loss beyond this is drawn at the edge: what matters is near zero.
MOST_LOST = 0.6
# Intervals at one count are drawn beside each other.
APART = 1.012
MARGIN_LINE = (0, (1, 2))


@dataclass(frozen=True)
class Style:
    """How one candidate is drawn."""

    colour: str
    marker: str
    line: str
    hatch: str


# By a candidate's place in the table; the first is the baseline's.
STYLES = (
    Style("#000000", "o", "-", ""),
    Style("#0072B2", "s", "--", "////"),
    Style("#D55E00", "^", "-.", "\\\\\\\\"),
    Style("#009E73", "D", ":", "xxxx"),
    Style("#CC79A7", "v", "-", "----"),
    Style("#56B4E9", "P", "--", "||||"),
    Style("#E69F00", "X", "-.", "++++"),
    Style("#666666", "*", ":", "//||"),
)


def plot_format(path: str) -> str:
    """`png` or `svg`, by the suffix; svg for standard output. ValueError for another one, or where
    matplotlib is missing, with what to install."""
    suffix = Path(path).suffix.lower().removeprefix(".") if path != "-" else "svg"
    if suffix not in FORMATS:
        raise ValueError(f"{path} is not accepted: give a file that ends in .svg or .png")
    check_matplotlib()
    return suffix


def check_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install matplotlib")


def draw(table: PolicyTable, image_format: str = "svg") -> bytes:
    """The plot of a table as a file's content, the same bytes for the same table.

    Raises:
        ValueError: matplotlib is missing, with what to install.
    """
    return as_file(figure_of(table), image_format)


def figure_of(table: PolicyTable) -> Any:
    """The plot of a table as matplotlib's Figure. ValueError as of `draw`."""
    check_matplotlib()
    from matplotlib.figure import Figure

    found = table.evidence
    measured = list(sections(found))
    figure = Figure(figsize=(max(4.4 * len(measured), 6.4) + 2.4, 5.6), layout="constrained")
    grid: Any = figure.subplots(
        3, len(measured), squeeze=False, sharex="col", height_ratios=(3.0, 2.0, 0.35)
    )
    for column, situation in enumerate(measured):
        times, savings, band = grid[:, column]
        _draw_points(times, savings, table, situation)
        _draw_band(band, table, situation)
        times.set_title(situation_words(found, situation), fontsize=10)
    _draw_legend(figure, table)
    figure.suptitle(
        f"{calls_words(found.coverage)}\n{found.kernel}, {found.environment.device}",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    return figure


def as_file(figure: Any, image_format: str) -> bytes:
    """A figure as a file's content. Text stays text, and nothing depends on the moment or on
    chance."""
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "adaptive-moe"}):
        metadata = {"Date": None} if image_format == "svg" else {}
        figure.savefig(out, dpi=150, format=image_format, metadata=metadata)
    return out.getvalue()


def inline_svg(table: PolicyTable, prefix: str) -> str:
    """The plot as an <svg> element for a page with several: ids begin with the prefix."""
    text = draw(table).decode()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", text)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def _draw_points(times: Any, savings: Any, table: PolicyTable, situation: Situation) -> None:
    from matplotlib.ticker import LogFormatter, PercentFormatter

    found = table.evidence
    for index, name in enumerate(found.candidates):
        style = STYLES[index % len(STYLES)]
        points = list(_points(table, situation, name))
        if not points:
            continue
        counts = [count for count, _, _ in points]
        line = {"color": style.colour, "ls": style.line, "lw": 1.2}
        times.plot(counts, [us for _, us, _ in points], **line)
        for count, us, result in points:
            _mark(times, count, us, style, result)
        gains = [(count, r) for count, _, r in points if r.gain is not None]
        savings.plot([c for c, _ in gains], [_shown(r.gain) for _, r in gains], **line)
        for count, result in gains:
            _mark(savings, count, _shown(result.gain), style, result)
            if result.gain_low is not None and result.gain_high is not None:
                ends = (_shown(result.gain_low), _shown(result.gain_high))
                savings.vlines(count * APART**index, *ends, color=style.colour, lw=1.0)
    for axes in (times, savings):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.25, which="both")
    times.set_yscale("log")
    # Plain numbers: readers look for 512 tokens and 6 us, not for powers.
    times.yaxis.set_major_formatter("{x:g}")
    times.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.2, 0.6)))
    times.set_ylabel("us a call")
    savings.axhline(found.rule.margin, color="grey", lw=0.9, ls=MARGIN_LINE)
    savings.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    savings.set_ylabel("time saved")


def _draw_band(axes: Any, table: PolicyTable, situation: Situation) -> None:
    """What is applied at each count, with the counts where it changes."""
    found = table.evidence
    runs = table.runs(captured=situation is Situation.GRAPH)
    least = found.coverage.counts(situation)[0]
    shown = found.coverage.busy_from - 1 if situation is Situation.IDLE else runs[-1][1]
    for first, last, name in runs:
        style = STYLES[found.candidates.index(name) % len(STYLES)]
        # Spans meet halfway between counts, so that the band has no gaps.
        axes.axvspan(max(first - 0.5, 0.75), last + 0.5, **_fill(style))
        if least < first <= shown:
            where = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
            axes.annotate(str(first), (first, 1.04), fontsize=7, **where)
    axes.set_yticks([])
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(0.9 * least, max(shown, 2 * least) * 1.1)
    axes.set_xlabel("tokens")
    axes.set_ylabel("applied", rotation=0, ha="right", va="center")


def _draw_legend(figure: Any, table: PolicyTable) -> None:
    """Beside the data, a line and a piece of the band a candidate."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found = table.evidence
    handles: list[Any] = []
    labels = []
    for index, name in enumerate(found.candidates):
        style = STYLES[index % len(STYLES)]
        line = Line2D([], [], color=style.colour, ls=style.line, marker=style.marker, ms=4.5)
        handles.append((line, Patch(**_fill(style))))
        labels.append(candidate_words(name) + (", baseline" if index == 0 else ""))
    handles.append(Line2D([], [], color="grey", ls="", marker="o", mfc="white"))
    handles.append(Line2D([], [], color="grey", ls=MARGIN_LINE))
    figure.legend(
        handles=handles,
        labels=[*labels, "hollow: unsettled", f"margin, {found.rule.margin:.1%}"],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.6)},
        handlelength=4.5,
        loc="outside right upper",
        fontsize=8,
        frameon=False,
        title="line; band: applied",
        title_fontsize=8,
    )


def _fill(style: Style) -> dict[str, Any]:
    """The band of a candidate: grey for the baseline, else hatched."""
    if not style.hatch:
        return {"facecolor": "#8c8c8c", "edgecolor": "#8c8c8c", "lw": 0.0}
    return {"facecolor": "white", "edgecolor": style.colour, "hatch": style.hatch, "lw": 0.8}


def _points(
    table: PolicyTable, situation: Situation, name: str
) -> Iterator[tuple[int, float, Result]]:
    """(tokens, us, result) where the candidate was timed. The first fill speaks for a bucket."""
    for bucket in table.evidence.section(situation):
        verdict = bucket.fills[0].verdict
        result, us = verdict.result(name), time_us(verdict, name)
        if result is not None and us is not None:
            yield bucket.num_tokens, us, result


def _mark(axes: Any, x: float, y: float, style: Style, result: Result) -> None:
    unsettled = result.standing is Standing.UNSETTLED
    axes.plot(
        *([x], [y], style.marker),
        ms=4.5,
        mec=style.colour,
        mfc="white" if unsettled else style.colour,
    )


def _shown(fraction: float | None) -> float:
    return max(fraction or 0.0, -MOST_LOST)
