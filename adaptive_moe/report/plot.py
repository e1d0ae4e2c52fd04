"""Time against tokens, a panel a situation. Needs matplotlib.

Made for print and for every reader: candidates differ in marker, line and hatch as well as in
colour (Okabe and Ito's, which colour-blind readers tell apart). Above, the time of each candidate;
below it, what each saves of the baseline's time with its interval; at the bottom a band with what
sorts. Hollow markers are not settled; an arrow at the edge stands for a loss beyond it.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from math import log2
from pathlib import Path
from typing import Any

from adaptive_moe.policy.coverage import Situation
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.policy.verdict import OPEN, Judgement
from adaptive_moe.report.words import (
    calls_words,
    candidate_words,
    measured_situations,
    situation_words,
    time_us,
    title_words,
    where_words,
)

FORMATS = ("png", "svg")
# A loss beyond this is drawn at the edge: what matters is near zero.
MOST_LOST = 0.6
# Intervals at one count are drawn beside each other.
APART = 1.012
# Labels of the band and of tokens nearer than this share of the axis would run into each other.
LABEL_SHARE = 0.07
MOST_TICKS = 9
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
    Style("#CC79A7", "p", "-", "----"),
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


def figure_of(table: PolicyTable, *, titled: bool = True) -> Any:
    """The plot of a table as matplotlib's Figure. ValueError as of `draw`."""
    check_matplotlib()
    from matplotlib.figure import Figure

    situations = list(measured_situations(table))
    figure = Figure(figsize=(11.0, 6.4), layout="constrained")
    grid: Any = figure.subplots(
        3, len(situations), squeeze=False, sharex="col", height_ratios=(3.0, 2.0, 0.3)
    )
    for column, situation in enumerate(situations):
        times, savings, band = grid[:, column]
        _draw_points(times, savings, table, situation)
        _draw_band(band, table, situation)
        times.set_title(f"{situation_words(situation)} calls", fontsize=10)
    _draw_legend(figure, table)
    if titled:
        coverage = table.evidence.coverage
        figure.suptitle(
            f"{title_words(coverage)}: {calls_words(coverage)}\n{where_words(table.evidence)}",
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
    """The plot as an <svg> element for a page with several: ids begin with the prefix. The page's
    own heading says what it shows."""
    text = as_file(figure_of(table, titled=False), "svg").decode()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", text)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def _draw_points(times: Any, savings: Any, table: PolicyTable, situation: Situation) -> None:
    from matplotlib.ticker import LogFormatter, PercentFormatter

    for index, name in enumerate(table.evidence.candidates):
        style = STYLES[index % len(STYLES)]
        points = list(_points(table, situation, name))
        if not points:
            continue
        line = {"color": style.colour, "ls": style.line, "lw": 1.2}
        times.plot([count for count, _, _ in points], [us for _, us, _ in points], **line)
        for count, us, judgement in points:
            _mark(times, count, us, style, judgement)
        gains = [(count, j) for count, _, j in points if j.gain is not None]
        savings.plot([c for c, _ in gains], [_shown(j.gain) for _, j in gains], **line)
        for count, judgement in gains:
            _mark(savings, count, _shown(judgement.gain), style, judgement)
            if judgement.gain_low is not None and judgement.gain_high is not None:
                ends = (_shown(judgement.gain_low), _shown(judgement.gain_high))
                savings.vlines(count * APART**index, *ends, color=style.colour, lw=1.0)
    for axes in (times, savings):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.25, which="both")
    times.set_yscale("log")
    # Plain numbers: readers look for 512 tokens and 6 us, not for powers.
    times.yaxis.set_major_formatter("{x:g}")
    times.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.2, 0.6)))
    times.set_ylabel("us a call")
    savings.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    savings.axhline(table.evidence.rule.margin, color="grey", ls=MARGIN_LINE, lw=1.0)
    savings.set_ylabel("time saved")


def _draw_band(axes: Any, table: PolicyTable, situation: Situation) -> None:
    names = table.evidence.candidates
    runs = table.runs(captured=situation is Situation.GRAPH)
    least, most = runs[0][0], runs[-1][1]
    low, high = 0.9 * least, max(most, 2 * least) * 1.1
    labelled, begins = 0.0, max(least - 0.5, 0.75)
    for first, last, name in runs:
        style = STYLES[names.index(name) % len(STYLES)]
        # Each span begins where the one before ends, so that the band has no gaps.
        axes.axvspan(begins, last + 0.5, **_fill(style))
        begins = last + 0.5
        place = log2(first / low) / log2(high / low)
        if first > least and place - labelled >= LABEL_SHARE:
            labelled = place
            where = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
            axes.annotate(str(first), (first, 1.04), fontsize=7, **where)
    axes.set_yticks([])
    axes.set_ylim(0, 1)
    axes.set_xlim(low, high)
    axes.set_xticks(_ticks(least, most))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("sorted by", rotation=0, ha="right", va="center")


def _ticks(least: int, most: int) -> list[int]:
    """Powers of two within the axis, so many that their labels have room."""
    first, last = (least - 1).bit_length(), max(most.bit_length() - 1, (least - 1).bit_length())
    step = -(-(last - first + 1) // MOST_TICKS)
    return [1 << k for k in range(first, last + 1, step)]


def _draw_legend(figure: Any, table: PolicyTable) -> None:
    """Beneath the data, so that it has the whole width: a line and a piece of the band each."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rule = table.evidence.rule
    handles: list[Any] = []
    labels = []
    for index, name in enumerate(table.evidence.candidates):
        style = STYLES[index % len(STYLES)]
        line = Line2D([], [], color=style.colour, ls=style.line, marker=style.marker, ms=4.5)
        handles.append((line, Patch(**_fill(style))))
        labels.append(candidate_words(name) + (", baseline" if index == 0 else ""))
    handles.append(Line2D([], [], color="grey", ls="", marker="o", mfc="white"))
    labels.append("hollow: not settled")
    handles.append(Line2D([], [], color="grey", ls="", marker="v"))
    labels.append(f"at the edge: loses more than {MOST_LOST:.0%}")
    handles.append(Line2D([], [], color="grey", ls=MARGIN_LINE))
    labels.append(f"margin, {rule.margin:.1%}; bars: {rule.confidence:.0%} intervals")
    figure.legend(
        handles=handles,
        labels=labels,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.6)},
        handlelength=4.5,
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        frameon=False,
    )


def _fill(style: Style) -> dict[str, Any]:
    """The band of a candidate: grey for the baseline, else hatched."""
    if not style.hatch:
        return {"facecolor": "#8c8c8c", "edgecolor": "#8c8c8c", "lw": 0.0}
    return {"facecolor": "white", "edgecolor": style.colour, "hatch": style.hatch, "lw": 0.8}


def _points(
    table: PolicyTable, situation: Situation, name: str
) -> Iterator[tuple[int, float, Judgement]]:
    """(tokens, us, judgement) where the candidate was timed. The first fill speaks for a count."""
    for choice in table.choices(situation):
        view = choice.device[0]
        us = time_us(view, name)
        if us is not None:
            yield choice.num_tokens, us, view.judgement(name)


def _mark(axes: Any, x: float, y: float, style: Style, judgement: Judgement) -> None:
    is_beyond = y == -MOST_LOST
    axes.plot(
        *([x], [y], "v" if is_beyond else style.marker),
        ms=4.5,
        mec=style.colour,
        mfc="white" if judgement.standing in OPEN else style.colour,
        clip_on=not is_beyond,
    )


def _shown(fraction: float | None) -> float:
    return max(fraction or 0.0, -MOST_LOST)
