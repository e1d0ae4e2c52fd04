"""The plot as a file, and as a reader without colours sees it."""

import re
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from adaptive_moe.report.plot import STYLES, draw, figure_of, inline_svg, plot_format
from tests.report.making import everything, faster, table_of, tied, with_host


def test_candidates_differ_in_more_than_colour():
    for one in STYLES:
        for other in STYLES:
            if one is not other:
                assert one.marker != other.marker
                assert one.hatch != other.hatch


def test_both_formats_and_the_same_bytes_again():
    png = draw(everything(), "png")
    assert png.startswith(b"\x89PNG\r\n")
    svg = draw(everything())
    assert svg == draw(everything(), "svg")
    words = "".join(ET.fromstring(svg).itertext())
    for said in ("policy 1 (one-shot)", "not settled", "99% intervals", "us a call", "DeepSeek-V3"):
        assert said in words


def test_a_loss_beyond_the_edge_is_an_arrow_at_it():
    savings = figure_of(everything()).axes[2]
    arrows = [line for line in savings.get_lines() if line.get_marker() == "v"]
    assert arrows
    assert {line.get_ydata()[0] for line in arrows} == {-0.6}
    calm = figure_of(with_host()).axes[1]
    assert not [line for line in calm.get_lines() if line.get_marker() == "v"]


def boxes(figure):
    """Every text of a panel, as (left, right, bottom, top) in pixels."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        texts = [*axes.get_xticklabels(), *axes.texts]
        yield [t.get_window_extent() for t in texts if t.get_text() and t.get_visible()]


def test_labels_do_not_run_into_each_other():
    """With a change of sort at every other count, and captured sizes beside eager counts."""
    eager = [(faster if n % 2 else tied)(n) for n in range(1, 40)]
    graph = [(tied if n % 2 else faster)(n) for n in range(1, 24)]
    for panel in boxes(figure_of(table_of([*eager, tied(16384)], graph))):
        rows = {}
        for box in panel:
            rows.setdefault(round(box.y0), []).append(box)
        for row in rows.values():
            row.sort(key=lambda box: box.x0)
            for left, right in pairwise(row):
                assert left.x1 <= right.x0


def test_the_band_has_no_gaps_between_captured_sizes():
    band = figure_of(everything()).axes[4]
    spans = sorted((patch.get_x(), patch.get_x() + patch.get_width()) for patch in band.patches)
    assert all(left[1] == right[0] for left, right in pairwise(spans))


def test_a_plot_within_a_page_brings_only_what_is_used_there():
    svg = inline_svg(everything(), "p3")
    assert svg.startswith("<svg ")
    assert "<metadata" not in svg
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert set(ids) == set(re.findall(r'(?:href="|url\()#([^")]*)', svg))
    assert all(name.startswith("p3") for name in ids)
    assert "DeepSeek-V3" not in svg  # the page's heading says it


def test_the_format_is_by_the_suffix():
    assert plot_format("a/b.PNG") == "png"
    assert plot_format("-") == "svg"
    with pytest.raises(ValueError, match=r"^times\.pdf is not accepted: .* \.svg or \.png$"):
        plot_format("times.pdf")


@pytest.mark.parametrize("plot", [lambda: plot_format("a.svg"), lambda: draw(everything())])
def test_without_matplotlib_it_says_what_to_install(monkeypatch, plot):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"^plots need matplotlib: pip install matplotlib$"):
        plot()
