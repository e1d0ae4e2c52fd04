"""The page, looked into as a browser would."""

import re
from html.parser import HTMLParser

from adaptive_moe.report.page import page
from adaptive_moe.report.plot import inline_svg
from tests.report.making import everything, failed, faster, table_of, tied


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
    # The first and the last agree on where they were measured, which is shown once.
    tables = [failed(), everything(), failed()]
    plots = [inline_svg(table, f"p{number}") for number, table in enumerate(tables[:2])]
    text = page(tables, "read from <here>", plots)
    parsed = _Page()
    parsed.feed(text)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link[0] for link in parsed.links} == {"#"}
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)
    assert not re.search(r"url\((?!#)|<script|@import", text)
    assert text.count("<svg") == 2
    assert text.count("<details>") == 2 + 1 + 2 + 1  # two environments; what each has measured


def test_a_sentence_of_result_for_each_table_comes_first_the_largest_gain_on_top():
    tables = [table_of([tied(8)]), table_of([faster(8, 0.1)]), everything()]
    text = page(tables, "here", [])
    results = re.findall(r"<li>(.*?)</li>", text)
    assert [re.search(r"#table(\d)", item)[1] for item in results] == ["2", "1", "0"]
    assert "DeepSeek-V3, block 32, on AMD Instinct MI300X: captured calls, up to 12% off" in text
    assert text.index("<li>") < text.index("<section")
    assert re.findall(r'<section id="table(\d)"', text) == ["2", "1", "0"]


def test_a_page_of_the_cpu_sort_says_that_it_tunes_nothing():
    assert "tunes nothing" in page([table_of([tied(8)], kernel="cpu")], "here", [])
    assert "tunes nothing" not in page([everything()], "here", [])
