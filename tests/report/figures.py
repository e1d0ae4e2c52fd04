"""What a reader sees of a matplotlib figure, in lines of text: what is drawn where, and how."""

from collections.abc import Iterable, Iterator

from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.offsetbox import DrawingArea
from matplotlib.patches import Patch
from matplotlib.text import Annotation


def described(figure) -> Iterator[str]:
    """Sizes are inches and points."""
    width, height = figure.get_size_inches()
    yield f"figure, {width:g} x {height:g}"
    for text in figure.texts:
        x, _ = text.get_position()
        for line in text.get_text().split("\n"):
            yield f"  {_size(text)} {text.get_ha()} at {x:g}: {line}"
    for axes in figure.axes:
        yield from _panel(axes)
    for legend in figure.legends:
        title, frame = legend.get_title(), "framed" if legend.get_frame_on() else "no frame"
        yield f"legend, {frame}, {_size(title)} {title.get_text()}"
        for text, box in zip(legend.get_texts(), legend.findobj(DrawingArea), strict=True):
            yield f"  {_size(text)} {text.get_text()}"
            yield from (f"  {line}" for line in _marks(box.get_children()))


def _panel(axes) -> Iterator[str]:
    place = axes.get_subplotspec()
    column, row = place.colspan.start, place.rowspan.start
    height = axes.get_gridspec().get_height_ratios()[row]
    title = f", {_size(axes.title)} {axes.get_title()}" if axes.get_title() else ""
    yield f"panel {column} in row {row} of height {height:g}{title}"
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        label, (low, high) = axis.label, axis.get_view_interval()
        words = f"{label.get_text()!r} {label.get_rotation():g} {label.get_ha()} {label.get_va()}"
        base = f" {axis.get_transform().base:g}" if axis.get_scale() == "log" else ""
        yield f"  {name} {words}, {axis.get_scale()}{base} {low:.4g} to {high:.4g}, {_ticks(axis)}"
    own = {axes.patch, *axes.spines.values()}
    yield from _marks(artist for artist in axes.get_children() if artist not in own)


def _ticks(axis) -> str:
    """How it writes a half and 512; the alpha of its grid, at larger and at smaller ticks."""
    if not len(axis.get_majorticklocs()):
        return "no ticks"
    lines = [tick.gridline for tick in (axis.get_major_ticks(1)[0], axis.get_minor_ticks(1)[0])]
    grid = " ".join(f"{line.get_alpha()}" for line in lines if line.get_visible())
    write = axis.get_major_formatter()
    return f"as {write(0.5)} and {write(512)}, {f'grid {grid}' if grid else 'no grid'}"


def _marks(artists: Iterable) -> Iterator[str]:
    """A line for all that look alike, with where they are."""
    found: dict[str, list[str]] = {}
    for artist in artists:
        for how, where in _drawn(artist):
            found.setdefault(how, []).append(where)
    yield from (f"  {how}: {' '.join(where)}" for how, where in found.items())


def _drawn(artist) -> Iterator[tuple[str, str]]:
    """(how, where) of what carries data; nothing of axes and titles."""
    if isinstance(artist, Annotation):
        x, y = artist.xycoords
        how = f"{_size(artist)} text {artist.get_ha()} {artist.get_va()} at {x}, {y}"
        yield how, f"{artist.get_text()} {artist.xy}"
    elif isinstance(artist, Line2D):
        how, line, marker = [], artist.get_linestyle(), artist.get_marker()
        if line != "None":
            how += [artist.get_color(), "line", line, f"{artist.get_linewidth():g}"]
        if marker != "None":
            colours = artist.get_markeredgecolor(), "filled", artist.get_markerfacecolor()
            how += [marker, f"{artist.get_markersize():g}", *colours]
        yield " ".join(how), " ".join(f"({x:.4g}, {y:.4g})" for x, y in artist.get_xydata())
    elif isinstance(artist, LineCollection):
        colour, width = to_hex(artist.get_color()[0]), artist.get_linewidth()[0]
        for (x, low), (_, high) in artist.get_segments():
            yield f"{colour} bar {width:g}", f"({x:.4g}, {low:.4g} to {high:.4g})"
    elif isinstance(artist, Patch):
        corners = artist.get_path().get_extents().get_points()
        (left, low), (right, high) = artist.get_patch_transform().transform(corners)
        face, edge = to_hex(artist.get_facecolor()), to_hex(artist.get_edgecolor())
        how = f"{face} box {artist.get_hatch() or 'plain'} edge {edge} {artist.get_linewidth():g}"
        yield how, f"({left:.4g} to {right:.4g}, {low:.4g} to {high:.4g})"


def _size(text) -> str:
    return f"{text.get_fontsize():g} pt"
