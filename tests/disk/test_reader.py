"""What people look at: any file that holds tables, by its name or a part of it."""

import json
import logging
import os
import stat
from dataclasses import replace

import pytest

from adaptive_moe.disk.folder import Store
from adaptive_moe.disk.reader import find, newest, read_any
from adaptive_moe.disk.write import remove, remove_stale, replace_file
from adaptive_moe.policy.table import PolicyTable
from tests.faults.made_up import SHAPE, key_of, made_up_table, stored_of

SMALL = {"eager": (1, 2, 8), "graph": (1, 2, 4), "max_tokens": 8}
TABLES = [made_up_table(seed, **SMALL, kernel=f"aiter {seed}") for seed in range(2)]


def test_a_file_of_the_store(tmp_path):
    store = Store(tmp_path)
    store.publish({key_of(TABLES[0]): TABLES[0]})
    (path,) = find(tmp_path, "")
    assert read_any(path) == [stored_of(TABLES[0])]


def test_a_report_and_a_table_alone(tmp_path):
    (tmp_path / "report.json").write_text("[" + ",".join(t.to_json() for t in TABLES) + "]")
    assert read_any(tmp_path / "report.json") == TABLES
    (tmp_path / "table.json").write_text(TABLES[1].to_json())
    assert read_any(tmp_path / "table.json") == [TABLES[1]]


def spoilt(text):
    """The same JSON with a candidate that was not offered."""
    plain = json.loads(text)
    plain["busy"][0]["candidate"] = "policy 9"
    return json.dumps(plain)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (
            "{}",
            "holds no tables: give a file of the cache folder, or one that ADAPTIVE_MOE_REPORT or "
            "`calibrate --output` named$",
        ),
        ("[7]", "holds no tables"),
        ('{"sha256": "0"}', "table 1 of .* is not whole: .* hash"),
        (f"[{TABLES[0].to_json()}, {spoilt(TABLES[0].to_json())}]", "table 2 of .* 'policy 9'"),
    ],
)
def test_what_is_none_of_these_is_named(tmp_path, text, what):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=what) as caught:
        read_any(path)
    assert str(path) in str(caught.value)


def test_a_huge_file_is_not_read_whole(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_text(TABLES[0].to_json())
    size = path.stat().st_size
    monkeypatch.setattr("adaptive_moe.disk.reader.MAX_BYTES", size)
    assert read_any(path) == [TABLES[0]]
    monkeypatch.setattr("adaptive_moe.disk.reader.MAX_BYTES", size - 1)
    with pytest.raises(ValueError, match=f"more than {size - 1} bytes: it is no file of ours"):
        read_any(path)
    with pytest.raises(FileNotFoundError):
        read_any(tmp_path / "none.json")


def test_files_are_found_by_any_part_of_their_name(tmp_path):

    tables = [made_up_table(1, **SMALL, shape=replace(SHAPE, topk=k)) for k in (4, 8)]
    Store(tmp_path).publish({key_of(table): table for table in tables})
    names = [key_of(table).file_name() for table in tables]
    assert [p.name for p in find(tmp_path, "256x4-")] == names[:1]
    assert [p.name for p in find(tmp_path, "MI300X")] == sorted(names)
    assert find(tmp_path, "256x9") == find(tmp_path / "none", "") == []


def test_the_newest_is_the_one_written_last(tmp_path):
    assert newest(tmp_path) is None
    for place, table in enumerate(TABLES):
        Store(tmp_path).publish({key_of(table): table})
        path = tmp_path / key_of(table).file_name()
        os.utime(path, (1000 - place, 1000 - place))
    assert newest(tmp_path).name == key_of(TABLES[0]).file_name()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    replace_file(path, b"first")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode) & 0o600) == (b"first", 0o600)
    replace_file(path, b"second", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for target in (path, tmp_path / "new.json"):
        with pytest.raises(OSError, match="No space"):
            replace_file(target, b"third")
    assert path.read_bytes() == b"second"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_what_cannot_be_removed_stays_and_is_said_at_debug(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "adaptive_moe")
    folder = tmp_path / ".adaptive-moe-1.tmp"
    folder.mkdir()
    os.utime(folder, (1000, 1000))
    remove_stale(tmp_path)
    remove(tmp_path / "none")
    assert folder.exists()
    first, second = caplog.records
    assert first.message.startswith(f"{folder} stays behind: [Errno ")
    none = tmp_path / "none"
    assert second.message == f"{none} stays behind: [Errno 2] No such file or directory: '{none}'"
    assert {first.levelname, second.levelname} == {"DEBUG"}


def test_what_others_may_read_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "report.json", b"x", mode=0o644)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "report.json").stat().st_mode) == 0o640


def test_what_is_read_is_a_table_like_any_other(tmp_path):
    (tmp_path / "table.json").write_text(TABLES[0].to_json())
    (found,) = read_any(tmp_path / "table.json")
    assert isinstance(found, PolicyTable)
    assert found.candidate(8) == TABLES[0].candidate(8)
