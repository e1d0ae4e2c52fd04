"""What a process tells of itself in the cache folder, and who reads it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from adaptive_moe.disk import status
from adaptive_moe.disk.status import ProcessStatus, TableStatus

TABLE = TableStatus("16 experts", "aiter 1", "MI300X", "stored", "2026-01-01", "policy 1", True)


def told(engine="vllm 0.33.0", **parts) -> ProcessStatus:
    here = status.here(engine, 0, 8, "auto")
    full = replace(
        here,
        tables=(TABLE,),
        problems=("one shape: no memory",),
        calls=(("chosen", 3), ("baseline", 4)),
        captured=(("policy 1", 2),),
    )
    return replace(full, **parts)


def gone_pid():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def files(folder):
    return sorted(path.name for path in (folder / "status").iterdir())


def test_what_was_written_is_read_with_when_and_why(tmp_path):
    status.write(tmp_path, told(), "warm-up")
    (found,) = status.read_all(tmp_path)
    assert found.moment == "warm-up"
    assert found.written.endswith("+00:00")
    assert replace(found, moment=told().moment, written="") == told()
    assert found.pid == os.getpid()


def test_a_process_has_one_file_and_the_latest_moment_counts(tmp_path):
    for moment in ("warm-up", "capture", "exit"):
        status.write(tmp_path, told(), moment)
    (found,) = status.read_all(tmp_path)
    assert found.ended
    assert len(files(tmp_path)) == 1


def test_a_process_that_died_without_a_word_is_removed(tmp_path):
    status.write(tmp_path, told(pid=gone_pid()), "warm-up")
    assert status.read_all(tmp_path) == []
    assert files(tmp_path) == []


def test_a_later_process_of_the_same_number_is_not_taken_for_it(tmp_path):
    status.write(tmp_path, told(began=told().began + 1), "warm-up")
    assert status.read_all(tmp_path) == []
    assert files(tmp_path) == []


@pytest.mark.parametrize(("hours", "kept"), [(0.5, True), (1.5, False)])
def test_one_that_ended_in_order_can_be_read_for_an_hour(tmp_path, hours, kept):
    status.write(tmp_path, told(pid=gone_pid()), "exit")
    (path,) = (tmp_path / "status").iterdir()
    then = time.time() - 3600.0 * hours
    os.utime(path, (then, then))
    assert bool(status.read_all(tmp_path)) is kept
    assert path.exists() is kept


def test_files_of_other_hosts_are_nobodys_to_remove_for_a_week(tmp_path):
    status.write(tmp_path, told(host="another", pid=gone_pid()), "warm-up")
    assert [found.host for found in status.read_all(tmp_path)] == ["another"]


def test_processes_come_by_engine_and_rank(tmp_path):
    for rank, engine in ((1, "vllm 0.33.0"), (0, "vllm 0.33.0"), (0, "sglang 0.5.23")):
        status.write(tmp_path, told(engine, rank=rank, host=f"h{rank}{engine[:1]}"), "warm-up")
    found = status.read_all(tmp_path)
    assert [(s.engine, s.rank) for s in found] == [
        ("sglang 0.5.23", 0),
        ("vllm 0.33.0", 0),
        ("vllm 0.33.0", 1),
    ]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "\xff", '{"engine": 1}', "[" * 100_000, "x" * (1 << 20)]
)
def test_what_is_no_status_is_passed_over_and_left(tmp_path, text):
    status.write(tmp_path, told(), "warm-up")
    (tmp_path / "status" / "other.json").write_text(text, encoding="latin-1")
    assert len(status.read_all(tmp_path)) == 1
    assert "other.json" in files(tmp_path)


@pytest.mark.parametrize("field", ["tables", "calls", "pid", "captured"])
def test_a_field_of_another_kind_is_passed_over(tmp_path, field):
    status.write(tmp_path, told(), "warm-up")
    (path,) = (tmp_path / "status").iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), field: [["no"]]}))
    assert status.read_all(tmp_path) == []


def test_links_and_pipes_are_not_followed(tmp_path):
    status.write(tmp_path, told(), "warm-up")
    (path,) = (tmp_path / "status").iterdir()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    os.mkfifo(path.with_name("pipe.json"))
    assert status.read_all(tmp_path) == []


def test_what_a_killed_writer_left_half_written_goes_with_a_later_write(tmp_path):
    status.write(tmp_path, told(), "warm-up")
    for name, hours in ((".adaptive-moe-1.tmp", 2), (".adaptive-moe-2.tmp", 0)):
        path = tmp_path / "status" / name
        path.write_text("{")
        os.utime(path, (time.time() - 3600.0 * hours,) * 2)
    status.write(tmp_path, told(), "capture")
    assert files(tmp_path)[0] == ".adaptive-moe-2.tmp"  # somebody may be writing it
    assert len(files(tmp_path)) == 2


def test_no_folder_is_nobody(tmp_path):
    assert status.read_all(tmp_path / "none") == []


def test_a_folder_that_cannot_be_written_to_costs_one_line_at_debug(tmp_path, caplog):
    (tmp_path / "status").write_text("in the way")
    with caplog.at_level("DEBUG", logger="adaptive_moe"):
        status.write(tmp_path, told(), "warm-up")
    (record,) = caplog.records
    assert record.levelname == "DEBUG"
    assert "was not written" in record.message


def test_a_write_that_fails_leaves_the_earlier_file_and_no_other(tmp_path, monkeypatch):
    status.write(tmp_path, told(), "warm-up")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    status.write(tmp_path, told(), "capture")
    (found,) = status.read_all(tmp_path)
    assert found.moment == "warm-up"
    assert len(files(tmp_path)) == 1


@pytest.mark.processes
def test_the_module_imports_nothing_heavy():
    code = (
        "import sys\n"
        "import adaptive_moe.disk.status\n"
        "assert not {'torch', 'numpy', 'aiter'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
