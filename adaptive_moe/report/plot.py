"""Time against tokens, a line a policy, the chosen policy as a band. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive_moe.policy.table import Bucket, PolicyTable, runs

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3")
NAMES = {0: "0: AITER's rule", 1: "1: one-shot", 2: "2: multi-phase"}


def draw(table: PolicyTable, path: Path) -> None:
    """Write a PNG; ValueError saying what to install where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plot needs matplotlib: pip install 'adaptive-moe[plot]'") from None
    found = table.evidence
    panels: list[tuple[str, Sequence[Bucket], bytes]] = [("eager calls", found.eager, table.eager)]
    if found.graph:
        panels.insert(0, ("graph replay", found.graph, table.graph))
    figure = Figure(figsize=(6.5 * len(panels), 4.8), layout="constrained")
    for index, (title, buckets, array) in enumerate(panels):
        axes: Any = figure.add_subplot(1, len(panels), index + 1)
        _draw_panel(axes, title, buckets, array, found.policies)
    figure.suptitle(
        f"{found.shape.describe()}\n{found.kernel}, {found.environment.device}", fontsize=10
    )
    figure.savefig(path, dpi=130, format="png")


def _draw_panel(
    axes: Any, title: str, buckets: Sequence[Bucket], array: bytes, policies: Sequence[int]
) -> None:
    from matplotlib.ticker import LogFormatter

    top = 0.0
    for policy in policies:
        points = [
            (bucket.num_tokens, result.median_us)
            for bucket in buckets
            for result in bucket.fills[0].verdict.results
            if result.policy == policy and result.median_us is not None
        ]
        if points:
            label = NAMES.get(policy, str(policy))
            axes.plot(
                *zip(*points, strict=True), "o-", ms=3, lw=1.3, color=_colour(policy), label=label
            )
            top = max(top, *(time for _, time in points))
    spans = runs(array)
    for first, last, policy in spans:
        # Spans meet halfway between counts, so that the band has no gaps.
        axes.axvspan(first - 0.5, last + 0.5, 0, 0.06, color=_colour(policy), alpha=0.8, lw=0)
        if first > 1:
            axes.axvline(first - 0.5, color="grey", lw=0.8, ls=":")
            axes.annotate(f"{first}", (first, top), fontsize=8, color="grey", ha="left", va="top")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    # Plain numbers: readers look for 512 tokens and 6 us, not for powers.
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.2, 0.6)))
    axes.set_xlim(0.9, array and len(array) * 1.05)
    axes.set_xlabel("tokens")
    axes.set_ylabel("us a call")
    axes.set_title(f"{title} (band: policy applied)", fontsize=10)
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8)


def _colour(policy: int) -> str:
    return COLOURS[policy % len(COLOURS)]
