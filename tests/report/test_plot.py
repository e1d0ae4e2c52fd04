"""The plot as a file, and as a reader without colours sees it; what is drawn is in plot.txt."""

import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.report.page import page
from adaptive_moe.report.plot import STYLES, draw, figure_of, inline_svg, plot_format
from tests.report.shown import padded
from tests.report.test_text import ALL_TIED, ONE_FASTER, table_of, verdict


def test_candidates_differ_in_more_than_colour():
    for one in STYLES:
        for other in STYLES:
            if one is not other:
                assert one.marker != other.marker
                assert one.hatch != other.hatch


def test_both_formats_and_the_same_bytes_again():
    png = draw(padded(), "png")
    assert png.startswith(b"\x89PNG\r\n")
    # 8.8 x 5.6 inches at 150 dots an inch.
    assert [int.from_bytes(png[at : at + 4], "big") for at in (16, 20)] == [1320, 840]
    svg = draw(padded())
    assert svg == draw(padded(), "svg")
    words = "".join(ET.fromstring(svg).itertext())
    for said in ("policy 1 (one-shot)", "hollow: unsettled", "margin, 1.0%", "us a call"):
        assert said in words


def test_a_table_for_some_counts_shows_no_others():
    """Neither on the axis nor as a span that is sorted by something."""
    table = table_of({64: ONE_FASTER, 512: ALL_TIED})
    coverage = replace(table.evidence.coverage, eager=((33, 512),))
    table = PolicyTable(replace(table.evidence, coverage=coverage))
    words = [text.strip() for text in ET.fromstring(draw(table)).itertext()]
    assert "64" in words
    assert "16" not in words
    assert "<td>33 to 64</td>" in page([table], "here", [])


def test_the_legend_is_beside_the_data():
    figure = figure_of(padded())
    figure.draw_without_rendering()
    (legend,) = figure.legends
    begins = legend.get_window_extent().x0
    assert begins > max(axes.get_tightbbox().x1 for axes in figure.axes)
    assert legend.get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    ("least", "most", "written"),
    [(20, 60, "20 30 40 50 60 70 80 90"), (20, 150, "20 30 40 60"), (10, 200, "")],
)
def test_times_between_powers_of_ten_are_written_where_there_is_room(least, most, written):
    times = figure_of(table_of({8: verdict(least, least, most)})).axes[0]
    assert times.get_ylim()[0] < least < most < times.get_ylim()[1]
    write = times.yaxis.get_minor_formatter()
    assert " ".join(filter(None, write.format_ticks(range(20, 100, 10)))) == written


def test_a_plot_within_a_page_brings_only_what_is_used_there():
    svg = inline_svg(padded(), "p3")
    assert svg.startswith("<svg ")
    assert "<metadata" not in svg
    assert ET.fromstring(svg).text.strip() == ""
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert set(ids) == set(re.findall(r'(?:href="|url\()#([^")]*)', svg))
    assert all(name.startswith("p3") for name in ids)


def test_the_format_is_by_the_suffix():
    assert plot_format("a/b.PNG") == "png"
    assert plot_format("-") == "svg"
    with pytest.raises(ValueError, match=r"^times\.pdf is not accepted: .* \.svg or \.png$"):
        plot_format("times.pdf")


@pytest.mark.parametrize("plot", [lambda: plot_format("a.svg"), lambda: draw(padded())])
def test_without_matplotlib_it_says_what_to_install(monkeypatch, plot):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"^plots need matplotlib: pip install matplotlib$"):
        plot()
