"""What a person reads of `bench step`: what each variant loses in each situation."""

from collections.abc import Iterator, Mapping
from typing import Any

Figures = Mapping[str, Any]


def lines(figures: Figures) -> Iterator[str]:
    """A summary of each shape and situation, and a line a count: percent of a step, and us a layer
    with their interval."""
    yield (
        f"a step of {figures['layers']} layers, kernel {figures['kernel']}, baseline "
        f"{figures['baseline']}: what each loses of the best, in percent and in us a layer"
    )
    for name, shape in figures["shapes"].items():
        if "failed" in shape:
            yield f"{name}: {shape['failed']}"
        for situation, found in shape.get("situations", {}).items():
            yield f"{name}, {situation}: {_summary(found)}, at {found['worst_at']} tokens"
            yield from _table(found["sweep"])
    for situation, found in figures["overall"].items():
        yield f"overall, {situation}: {_summary(found)}"


def _summary(found: Figures) -> str:
    return (
        f"the table saves {found['mean_saved']:.2%} of a step over the baseline, at most "
        f"{found['most_saved']:.2%}; it loses {found['mean_loss']:.3%} (surely "
        f"{found['mean_loss_surely']:.3%}), at most {found['worst_loss']:.3%} (surely "
        f"{found['worst_loss_surely']:.3%})"
    )


def _table(sweep: list[Figures]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in sweep for name in row["us_per_layer"]))
    cells = [["tokens", "us a layer", "device/host", "chosen", *names]]
    for row in sweep:
        us = row["us_per_layer"]
        ratio = f"{row['device_over_host']:.2f}" if "device_over_host" in row else ""
        lost = [_lost(row, name) if name in us else "" for name in names]
        cells.append(
            [str(row["num_tokens"]), f"{next(iter(us.values())):.1f}", ratio, row["chosen"], *lost]
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        yield "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)).rstrip()


def _lost(row: Figures, name: str) -> str:
    middle, low, high = row["loss_us"][name]
    return f"{row['lost'][name]:.2%} {middle:.2f} [{low:.2f} {high:.2f}]"
