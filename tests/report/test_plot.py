"""The plot and the page: looked into as a reader without colours, or a browser, would."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.report.page import page
from adaptive_moe.report.plot import STYLES, draw, inline_svg, plot_format
from tests.report.test_text import ALL_TIED, ONE_FASTER, TWO_FASTER, UNSETTLED, table_of

TABLE = table_of(
    {1: ALL_TIED, 8: ONE_FASTER, 64: TWO_FASTER}, {1: UNSETTLED, 8: ONE_FASTER}, busy_from=9
)


def test_candidates_differ_in_more_than_colour():
    for one in STYLES:
        for other in STYLES:
            if one is not other:
                assert one.marker != other.marker
                assert one.hatch != other.hatch


def test_both_formats_and_the_same_bytes_again():
    assert draw(TABLE, "png").startswith(b"\x89PNG\r\n")
    svg = draw(TABLE, "svg")
    assert svg == draw(TABLE, "svg")
    words = "".join(ET.fromstring(svg).itertext())
    for said in (
        "policy 1 (one-shot)",
        "baseline",
        "hollow: unsettled",
        "margin, 1.0%",
        "graph replay",
        "us a call",
    ):
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


def test_unsettled_points_are_hollow():
    hollow = "fill: #ffffff; stroke: #0072b2"
    assert hollow in draw(TABLE).decode()
    assert hollow not in draw(table_of({8: ONE_FASTER})).decode()


def test_the_format_is_by_the_suffix():
    assert plot_format("a/b.PNG") == "png"
    assert plot_format("-") == "svg"
    with pytest.raises(ValueError, match=r"times\.pdf is not accepted: .* \.svg or \.png"):
        plot_format("times.pdf")


class _Page(HTMLParser):
    """Tags that are open, ids, and addresses that would be loaded."""

    VOID = ("meta", "br", "use", "path", "rect")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.loaded, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        facts = dict(attrs)
        if "id" in facts:
            self.ids.append(facts["id"])
        for name in ("src", "href", "xlink:href"):
            if name in facts:
                self.links.append(facts[name])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self.open.pop() == tag


def test_the_page_is_whole_needs_no_network_and_tells_its_tables_apart():
    tables = [TABLE, table_of({8: TWO_FASTER})]
    text = page(tables, "read from <here>", [inline_svg(t, f"p{i}") for i, t in enumerate(tables)])
    parsed = _Page()
    parsed.feed(text)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link[0] for link in parsed.links} == {"#"}
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)
    assert not re.search(r"url\((?!#)|<script|@import", text)
    assert "read from &lt;here&gt;" in text
    assert text.count("<svg") == 2
    assert text.count("<details>") == 1 + 2 + 1  # one environment; graph and busy; busy


def test_the_page_shows_what_was_measured():
    text = page([TABLE], "here", ["<p>no plots</p>"])
    for said in ("policy 1 saves 20.0%", "test device", "no plots", "captured"):
        assert said in text
    assert "are unsettled" not in text
    assert "<td>10.0</td><td>8.0</td><td>20.0</td><td>20.0%</td>" in text
