"""What a person sees of `bench sorts`: a table, and a plot."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptive_moe.report.plot import as_file

Row = Mapping[str, Any]
_MARKERS = "osD^vPX*<>"
_DASHES = ("-", "--", ":", "-.")


def lines(figures: Row) -> Iterator[str]:
    """us of each sort at each count, the fastest of those that ran here marked."""
    for name, shape in figures["shapes"].items():
        for situation, rows in shape["situations"].items():
            yield f"{name}, {situation}: us a call, * the fastest here"
            yield from _table(rows)
        for sort, why in shape["left_out"].items():
            yield f"{name}: {sort} is left out {why}"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    sorts = _sorts(rows)
    cells = [["tokens", *sorts]]
    for one in rows:
        here = [name for name in one["us"] if not name.startswith("recorded ")]
        fastest = min(here, key=lambda name: float(one["us"][name]))
        times = (
            f"{one['us'][s]:.2f}{'*' if s == fastest else ' '}" if s in one["us"] else ""
            for s in sorts
        )
        cells.append([str(one["num_tokens"]), *times])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        yield "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True))


def draw(shapes: Mapping[str, Mapping[str, Sequence[Row]]], image_format: str) -> bytes:
    """Times over the best policy's against tokens: a row a model, a panel a situation."""
    from matplotlib.figure import Figure

    panels = max(len(situations) for situations in shapes.values())
    figure = Figure(figsize=(6.5 * panels, 3.6 * len(shapes)), layout="constrained")
    for number, (name, situations) in enumerate(shapes.items()):
        for index, (situation, rows) in enumerate(situations.items()):
            axes: Any = figure.add_subplot(len(shapes), panels, number * panels + index + 1)
            for place, sort in enumerate(_sorts(rows)):
                points = [(r["num_tokens"], r["ratio"][sort]) for r in rows if sort in r["ratio"]]
                style = {"marker": _MARKERS[place % 10], "ls": _DASHES[place % 4]}
                axes.plot(*zip(*points, strict=True), **style, ms=4, lw=1.2, label=sort)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_ylim(0.3, 2.0)
            axes.set_xlabel("tokens")
            axes.set_ylabel("time over the best policy's")
            axes.set_title(f"{name}, {situation}", fontsize=10)
            axes.grid(alpha=0.25)
            axes.legend(fontsize=7)
    return as_file(figure, image_format)


def _sorts(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(sort for one in rows for sort in one["us"]))
