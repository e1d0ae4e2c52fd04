"""The folder: what is accepted from it, what is a miss, and what becomes of a disk that fails."""

import json
import logging
import os
import stat
import time
from dataclasses import replace

import pytest

from adaptive_moe.settings import Settings
from adaptive_moe.store.folder import Folder, cache_folder, stored_files
from adaptive_moe.store.text import MAX_BYTES, to_text
from tests.store.making import HERE, KEY, REQUEST, key_for_table, made_table
from tests.store.test_text import changed, sealed, set_mean

TABLE = made_table()


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "cache")


@pytest.fixture
def kept(folder):
    assert folder.replace(KEY, TABLE)
    return folder


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_what_was_put_in_is_got_by_that_key_alone(kept):
    assert kept.get(KEY) == TABLE
    assert kept.get(replace(KEY, torch="2.9.0")) is None


def test_files_and_folder_have_the_modes_of_the_umask(tmp_path):
    before = os.umask(0o002)
    try:
        folder = Folder(tmp_path / "a" / "cache")
        folder.replace(KEY, TABLE)
    finally:
        os.umask(before)
    assert folder.file(KEY).stat().st_mode & 0o777 == 0o664
    assert folder.path.stat().st_mode & 0o777 == 0o775


@pytest.mark.parametrize("mode", [0o660, 0o666, 0o440, 0o444])
def test_a_file_of_any_mode_is_accepted(kept, mode, caplog):
    kept.file(KEY).chmod(mode)
    kept.path.chmod(0o777)
    assert kept.get(KEY) == TABLE
    assert warnings(caplog) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_a_file_and_a_folder_of_another_user_are_accepted(kept, caplog):
    os.chown(kept.file(KEY), 12345, 12345)
    os.chown(kept.path, 12345, 12345)
    assert kept.get(KEY) == TABLE
    assert warnings(caplog) == []


def test_links_are_followed_as_a_config_map_has_them(kept, tmp_path, caplog):
    """A ConfigMap: name -> ..data/name, and ..data -> a folder of the day."""
    mounted = Folder(tmp_path / "mounted")
    day = mounted.path / "..2026_01_01"
    day.mkdir(parents=True)
    kept.file(KEY).rename(day / kept.file(KEY).name)
    (mounted.path / "..data").symlink_to(day.name)
    mounted.file(KEY).symlink_to(f"..data/{kept.file(KEY).name}")
    assert mounted.get(KEY) == TABLE
    assert stored_files(mounted.path) == [mounted.file(KEY)]
    assert warnings(caplog) == []


def plant_pipe(path):
    os.mkfifo(path)


def plant_folder(path):
    path.mkdir()


def plant_loop(path):
    path.symlink_to(path.name)


def plant_device(path):
    path.symlink_to("/dev/zero")


def plant_large(path):
    path.write_text(to_text(REQUEST, TABLE) + " " * (5 << 20))


def plant_deep(path):
    path.write_text(sealed("[" * 200_000))


def plant_nan(path):
    path.write_text(changed(set_mean(float("nan"))))


def plant_huge_number(path):
    path.write_text(sealed(changed(set_mean("@")).replace('"@"', "1e999").partition("\n")[2]))


def plant_bytes(path):
    path.write_bytes(b"\xff\xfe\x00")


def plant_other_candidates(path):
    path.write_text(to_text(REQUEST, made_table(names=("policy 0", "policy 9", "policy 2"))))


def plant_half_a_table(path):
    path.write_text(changed(lambda plain: plain["evidence"].update(eager=[])))


PLANTS = [value for name, value in list(globals().items()) if name.startswith("plant_")]


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_no_table_is_a_miss_with_one_line_and_gives_way(folder, plant, caplog):
    folder.path.mkdir()
    plant(folder.file(KEY))
    begun = time.monotonic()
    assert folder.get(KEY) is None
    assert time.monotonic() - begun < 5.0
    (line,) = warnings(caplog)
    assert line.startswith(f"{folder.file(KEY)} is not used, measuring again: ")
    if plant is not plant_folder:
        assert folder.replace(KEY, TABLE)
        assert folder.get(KEY) == TABLE


def test_a_table_that_names_a_policy_that_is_not_offered_is_a_miss(folder, caplog):
    """As policy 1 is not from 819 experts on, where it would never return."""
    offered = replace(KEY, candidates=("policy 0", "policy 2"))
    folder.path.mkdir()
    folder.file(offered).write_text(to_text(REQUEST, TABLE))
    assert TABLE.candidate(8) == "policy 1"
    assert folder.get(offered) is None
    (line,) = warnings(caplog)
    assert "candidates: ['policy 0', 'policy 1', 'policy 2'], here ['policy 0', 'policy 2']" in line


def test_a_link_gives_way_and_its_target_is_left_alone(folder, tmp_path):
    folder.path.mkdir()
    target = tmp_path / "target"
    target.write_text("keep me")
    folder.file(KEY).symlink_to(target)
    assert folder.replace(KEY, TABLE)
    assert target.read_text() == "keep me"
    assert not folder.file(KEY).is_symlink()


def test_a_miss_names_what_differs_from_the_nearest_table_of_that_shape(kept, caplog):
    caplog.set_level(logging.INFO, "adaptive_moe")
    near = made_table(environment=replace(HERE, torch="2.9.0"))
    far = made_table(environment=replace(HERE, torch="2.9.0", arch="gfx90a", host="other"))
    kept.replace(key_for_table(near), near)
    kept.replace(key_for_table(far), far)
    kept.file(KEY).unlink()
    assert kept.get(KEY) is None
    (line,) = caplog.messages
    assert str(kept.file(key_for_table(near))) in line
    assert line.endswith("is for another torch: 2.9.0, here 2.13.0")


def test_an_empty_or_missing_folder_is_a_quiet_miss(tmp_path, caplog):
    caplog.set_level(logging.INFO, "adaptive_moe")
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file" / "cache"):
        assert Folder(path).get(KEY) is None
    assert caplog.messages == []


def test_the_same_table_is_not_written_again(kept):
    before = kept.file(KEY).stat().st_mtime_ns
    assert kept.replace(KEY, TABLE)
    assert kept.file(KEY).stat().st_mtime_ns == before


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
def test_a_disk_that_fails_costs_one_line_and_leaves_what_was_there(
    kept, step, monkeypatch, caplog
):
    real = os.open

    def fails(*args, **options):
        if step == "open" and not args[1] & os.O_CREAT:
            return real(*args, **options)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fails)
        assert not kept.replace(KEY, made_table(0.8, 0.9))
    (line,) = warnings(caplog)
    assert "No space left on device" in line
    assert kept.get(KEY) == TABLE
    assert [path.name for path in kept.path.iterdir()] == [kept.file(KEY).name]


def test_a_mount_that_cannot_flush_a_folder_keeps_tables(kept, monkeypatch, caplog):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert kept.replace(KEY, made_table(0.8, 0.9))
    assert warnings(caplog) == []
    assert kept.get(KEY) == made_table(0.8, 0.9)


def test_a_table_too_large_to_be_read_again_is_not_written(folder, caplog):
    many = made_table(kernel="k" * 4000, created="c" * MAX_BYTES)
    assert not folder.replace(key_for_table(many), many)
    assert "more than 4194304 bytes" in warnings(caplog)[0]


def test_temporary_files_of_killed_processes_go_after_an_hour(kept):
    old, new = (kept.path / f".adaptive-moe-{name}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (time.time() - 4000.0,) * 2)
    kept.replace(KEY, made_table(0.8, 0.9))
    assert (old.exists(), new.exists()) == (False, True)


def test_where_the_folder_is():
    assert str(cache_folder(Settings(cache_dir="/a"), {})) == "/a"
    assert str(cache_folder(Settings(), {"VLLM_CACHE_ROOT": "/v"})) == "/v/adaptive_moe"
    assert str(cache_folder(Settings(), {"XDG_CACHE_HOME": "/x"})) == "/x/adaptive_moe"


def test_the_file_is_one_json_object(kept):
    assert json.loads(kept.file(KEY).read_text())["request"]["engine"] == "vllm 0.33.0"
