"""adaptive-moe cache: what people do with the files by hand."""

import json
import os
import time
from dataclasses import replace

import pytest

from adaptive_moe import cli
from adaptive_moe.cli import cache as cache_cli
from adaptive_moe.cli.cache import machine_differences, parse_age
from adaptive_moe.disk.folder import Store, stored_files
from tests.faults.made_up import HERE, SHAPE, key_of, made_up_table, stored_of

SMALL = {"eager": (1, 8), "graph": (1, 2), "max_tokens": 8}


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_MOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_cli, "_this_machine", lambda: ({"gpu": HERE}, "0.1.9"))
    return Store(tmp_path / "cache")


@pytest.fixture
def tables():
    other = made_up_table(2, **SMALL, shape=replace(SHAPE, topk=4))
    return [made_up_table(1, **SMALL), other]


@pytest.fixture
def keep(store, tables):
    store.publish({key_of(table): table for table in tables})
    return store


def run(*words):
    return cli.main(["cache", *map(str, words)])


def refused(capsys, *words):
    """What is said of words that are not accepted."""
    assert run(*words) == 2
    return capsys.readouterr().err


def test_clear_removes_ours_and_nothing_else(keep, capsys):
    for name in (".adaptive-moe-abc.tmp", "latest.json", "notes.txt"):
        (keep.folder / name).write_text("")
    assert run("clear") == 0
    assert sorted(p.name for p in keep.folder.iterdir()) == ["latest.json", "notes.txt"]
    assert "3 files removed" in capsys.readouterr().out


def test_prune_removes_what_is_older(keep, tables):
    old, kept = (keep.folder / key_of(table).file_name() for table in tables)
    two_days_ago = time.time() - 2 * 86400
    os.utime(old, (two_days_ago, two_days_ago))
    run("prune", "--older-than", "3d")
    assert len(stored_files(keep.folder)) == 2
    run("prune", "--older-than", "1d")
    assert stored_files(keep.folder) == [kept]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90m", 5400), ("12h", 43200), ("30d", 2592000), ("2w", 1209600)]
)
def test_ages(text, seconds):
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1.5d", "1y"])
def test_ages_that_are_none(text):
    with pytest.raises(ValueError, match="give such as 30d"):
        parse_age(text)


def test_a_fleet_is_served_by_an_export(keep, tables, tmp_path, monkeypatch):
    file = tmp_path / "fleet.json"
    assert run("export", file) == 0
    monkeypatch.setenv("ADAPTIVE_MOE_CACHE_DIR", str(tmp_path / "another"))
    assert run("import", file) == 0
    another = Store(tmp_path / "another")
    assert [another.load(key_of(table)).table for table in tables] == tables


def test_import_says_field_by_field_what_differs(keep, tmp_path, monkeypatch, capsys):
    file = tmp_path / "fleet.json"
    run("export", file)
    here = replace(HERE, device="AMD Instinct MI355X", arch="gfx950")
    monkeypatch.setattr(cache_cli, "_this_machine", lambda: ({"gpu": here}, "0.1.10"))
    monkeypatch.setenv("ADAPTIVE_MOE_CACHE_DIR", str(tmp_path / "another"))
    capsys.readouterr()
    assert run("import", file) == 1
    out = capsys.readouterr().out
    assert "environment.device ('AMD Instinct MI300X', here 'AMD Instinct MI355X')" in out
    assert "environment.arch ('gfx942', here 'gfx950')" in out
    assert "kernel ('aiter 0.1.9 opus', here AITER 0.1.10)" in out
    assert "environment.torch" not in out
    assert stored_files(tmp_path / "another") == []
    assert run("import", file, "--json") == 1
    assert len(json.loads(capsys.readouterr().out)["refused"]) == 2
    assert run("import", file, "--anyway") == 0
    assert len(stored_files(tmp_path / "another")) == 2


def test_versions_of_ours_and_missing_gpus_are_differences(tables):
    key = key_of(tables[0])
    older = replace(key, schema=0, request=replace(key.request, decision=0))
    found = machine_differences(older, {}, None)
    assert [text.split(" ")[0] for text in found] == [
        "schema",
        "decision",
        "environment.device",
        "kernel",
    ]
    assert machine_differences(key, {"gpu": HERE}, "0.1.9") == []
    cpu = replace(HERE, runtime="")
    on_cpu = replace(key, kernel="cpu", environment=cpu)
    # How many threads a process had is no fact of the machine.
    assert machine_differences(on_cpu, {"cpu": replace(cpu, compute_units=2)}, None) == []


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"adaptive_moe_export": 2, "calibrations": []}', '{"calibrations": [1]}'],
)
def test_what_is_no_export_is_refused(store, tmp_path, content, capsys):
    file = tmp_path / "file.json"
    file.write_text(content)
    if content == "[]":  # an empty report holds no table to import
        assert run("import", file) == 0
        return
    assert str(file) in refused(capsys, "import", file)


def test_a_report_is_not_imported_it_says_for_no_engine_what_it_holds(
    store, tables, tmp_path, capsys
):
    file = tmp_path / "report.json"
    file.write_text(f"[{tables[0].to_json()}]")
    assert "cache export" in refused(capsys, "import", file)


def test_a_damaged_calibration_in_an_export_names_itself(store, tables, tmp_path, capsys):
    good = stored_of(tables[0]).to_text()
    bundle = {"adaptive_moe_export": 1, "calibrations": [good, good.replace("0.05", "0.06")]}
    file = tmp_path / "fleet.json"
    file.write_text(json.dumps(bundle))
    assert "table 2 of" in refused(capsys, "import", file)
    assert stored_files(store.folder) == []


def test_an_export_may_go_to_standard_output(keep, tmp_path, capsys):
    assert run("export", "-") == 0
    file = tmp_path / "piped.json"
    file.write_text(capsys.readouterr().out)
    assert run("import", file) == 0


def test_nothing_to_export_is_said_and_leaves_no_file(store, tmp_path, capsys):
    file = tmp_path / "fleet.json"
    assert run("export", file) == 1
    assert "can be exported: run `adaptive-moe calibrate`" in capsys.readouterr().err
    assert not file.exists()
