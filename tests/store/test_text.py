"""One text for folder, ranks and reports: it survives exactly, and refuses everything else."""

import hashlib
import json

import pytest

from adaptive_moe.store.text import from_text, read_any, report_text, to_text
from tests.store.making import REQUEST, made_table

TABLE = made_table(0.7, None, wrong=("policy 2",))
TEXT = to_text(REQUEST, TABLE)


def sealed(body: str) -> str:
    """A text whose hash fits, whatever it says."""
    return f'{{"sha256": "{hashlib.sha256(body.encode()).hexdigest()}",\n{body}'


def changed(change) -> str:
    """The text with its JSON changed, and a hash that fits."""
    plain = json.loads(TEXT)
    del plain["sha256"]
    change(plain)
    return sealed(json.dumps(plain)[1:])


def test_a_table_survives_exactly():
    stored = from_text(TEXT)
    assert (stored.request, stored.table) == (REQUEST, TABLE)
    assert to_text(stored.request, stored.table) == TEXT


def test_the_text_says_what_is_applied_and_loading_ignores_it():
    assert json.loads(TEXT)["applied"] == {
        "graph": [[1, 8, "policy 1"]],
        "eager": [[1, 64, "policy 1"]],
    }
    assert json.loads(TEXT)["savings"]["graph"] == {
        "counts": 2,
        "settled": 2,
        "improved": 2,
        "least": 0.3,
        "most": 0.3,
    }
    lie = changed(lambda plain: plain.update(applied={"eager": [[1, 64, "policy 2"]]}))
    assert from_text(lie).table == TABLE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "\x00" * 100,
        TEXT[:-1],
        TEXT + " ",
        TEXT.replace("gfx942", "gfx950"),
        TEXT.replace("\n", "\r\n"),
    ],
)
def test_a_changed_text_is_refused(text):
    with pytest.raises(ValueError, match="the hash differs"):
        from_text(text)


def set_mean(value):
    def change(plain):
        plain["evidence"]["eager"][0]["fills"][0]["results"][1]["first"]["mean"] = value

    return change


@pytest.mark.parametrize(
    "text",
    [
        changed(set_mean(float("nan"))),
        changed(set_mean(float("inf"))),
        changed(set_mean("@")).replace('"@"', "1e999"),
        changed(set_mean(True)),
        changed(lambda plain: plain["evidence"].update(more=1)),
        changed(lambda plain: plain["evidence"].pop("rule")),
        changed(lambda plain: plain.pop("evidence")),
        changed(lambda plain: plain["request"].update(first=[2.5])),
        changed(lambda plain: plain["evidence"]["coverage"].update(eager=[[8, 1]])),
        sealed("[" * 100_000),
        sealed('"request": 1'),
    ],
)
def test_what_no_calibration_writes_is_refused_though_its_hash_fits(text):
    resealed = sealed(text.partition("\n")[2])
    with pytest.raises(ValueError):  # noqa: PT011  any: the next test says that it is a miss
        from_text(resealed)


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain["evidence"].update(eager=[]),
        lambda plain: plain["evidence"]["eager"].reverse(),
        lambda plain: plain["evidence"].update(schema=2),
        lambda plain: plain["evidence"]["eager"][0].update(num_tokens=65),
        lambda plain: plain["evidence"]["candidates"].append("policy 7"),
    ],
)
def test_evidence_that_is_not_whole_makes_no_table(change):
    stored = from_text(changed(change))
    with pytest.raises(ValueError):  # noqa: PT011
        stored.table  # noqa: B018


def test_people_read_a_stored_file_and_a_report(tmp_path):
    file, report = tmp_path / "table.json", tmp_path / "report.json"
    file.write_text(TEXT)
    other = made_table(0.7, 0.9)
    report.write_text(report_text([TEXT, to_text(REQUEST, other)]))
    assert [stored.table for stored in read_any(file)] == [TABLE]
    assert [stored.table for stored in read_any(report)] == [TABLE, other]
    for content in ("[1]", "nonsense", "{}", "[" * 100_000):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"table\.json holds no tables"):
            read_any(file)


def test_numbers_that_no_calibration_gives_are_refused_for_people_too(tmp_path):
    file = tmp_path / "table.json"
    file.write_text(TEXT.replace('"confidence": 0.99', '"confidence": 1.0'))
    with pytest.raises(ValueError, match=r"holds no tables \(impossible measurement"):
        read_any(file)
