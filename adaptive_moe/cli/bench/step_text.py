"""What a person reads of one situation of `bench step`: what each variant loses."""

from collections.abc import Sequence

from adaptive_moe.cli.bench.step_figures import Point, figures


def lines(model: str, situation: str, points: Sequence[Point]) -> list[str]:
    """A summary, and a line a count: percent of a step, and us a layer with their interval."""
    found = figures(points)
    names = list(dict.fromkeys(name for p in points for name in p.us))
    cells = [["tokens", "us a layer", "device/host", "chosen", *(f"{n} loses" for n in names)]]
    for p in points:
        device = next(iter(p.us.values()))
        ratio = f"{device / p.host_us:.2f}" if p.host_us else ""
        lost = [_lost(p, name) if name in p.us else "" for name in names]
        cells.append([str(p.num_tokens), f"{device:.1f}", ratio, p.chosen, *lost])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return [
        f"{model}, {situation}: the table loses {found['mean_loss']:.3%} of a step, at most "
        f"{found['worst_loss']:.3%} ({found['worst_at']} tokens); it saves "
        f"{found['mean_saved']:.2%} over the baseline, at most {found['most_saved']:.2%}",
        *(
            "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ),
    ]


def _lost(p: Point, name: str) -> str:
    d = p.loss[name]
    return f"{p.lost(name):.2%} {d.median:.2f} [{d.low:.2f} {d.high:.2f}]"
