"""The store: what is believed, what is a miss; crowds, kills and failing disks."""

import hashlib
import json
import logging
import os
import stat
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_moe.disk.file import Stored, differences
from adaptive_moe.disk.folder import (
    Store,
    cache_folder,
    key_for,
    open_store,
    read_file,
    stored_files,
    write_file,
)
from adaptive_moe.kernels import Candidate, SortKernel, load_kernel
from adaptive_moe.policy.decision import Rule, Standing
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.settings import Settings, SettingsError, read_settings
from tests.faults.corrupt import listening
from tests.faults.crowd import COVERAGES, PLAN, measure
from tests.faults.made_up import ENGINE, HERE, PADDED, SHAPE, key_of, made_up_table, stored_of

SMALL = {"eager": (1, 2, 8), "graph": (1, 2, 4), "max_tokens": 8}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


@pytest.fixture(scope="module")
def table():
    return made_up_table(1, **SMALL)


@pytest.fixture
def one_thread():
    """Threads of a busy machine wait for each other far longer than a tiny sort takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def path_of(store, table):
    return store.folder / key_of(table).file_name()


def test_what_is_published_is_loaded_whole(store, table):
    assert store.publish({key_of(table): table}) == 1
    assert loaded(store, key_of(table)) == table


def loaded(store, key):
    found = store.load(key)
    return found and found.table


def test_the_file_is_private_and_readable_json(store, table):
    store.publish({key_of(table): table})
    path = path_of(store, table)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.name.startswith("256x8-7168-bfloat16-b32-vllm-0.33.0-amd-instinct-mi300x-")
    content = json.loads(path.read_text())
    assert content["calibration"]["environment"]["device"] == HERE.device
    assert content["calibration"]["coverage"]["captured"] == [1, 2, 4]
    assert content["request"]["engine"] == ENGINE


def variants(value):
    """The dataclass with one field changed, for every field at any depth."""
    for field in fields(value):
        old = getattr(value, field.name)
        if is_dataclass(old):
            for new in variants(old):
                yield replace(value, **{field.name: new})
        else:
            yield replace(value, **{field.name: changed(old)})


def changed(old):
    if isinstance(old, bool):
        return not old
    if isinstance(old, tuple):
        return (*old, {str: "other", tuple: (77, 78)}.get(type(old[0]), 77)) if old else (77,)
    if isinstance(old, str):
        return {"bfloat16": "float16"}.get(old, old + "x")
    return 1 if old is None else old * 2


def test_every_field_of_the_key_matters(store, table):
    key = key_of(table)
    store.publish({key: table})
    names = {key.file_name()}
    count = 0
    with listening() as lines:
        for other in variants(key):
            assert store.load(other) is None, other
            # Also where the other key's file holds this table, by accident or by hand.
            (store.folder / other.file_name()).write_bytes(path_of(store, table).read_bytes())
            (store.folder / other.file_name()).chmod(0o600)
            assert store.load(other) is None, other
            names.add(other.file_name())
            count += 1
    assert count >= 30
    assert len(names) == count + 1
    assert len(lines) == count
    assert all("it is for another" in line for line in lines)
    assert lines[0].endswith(
        "is not used, measuring again: it is for another request.engine "
        "('vllm 0.33.0', here 'vllm 0.33.0x')"
    )
    assert loaded(store, key) == table


def test_differences_name_the_field_and_both_values(table):
    there = replace(key_of(table), environment=replace(HERE, torch="2.10.0"))
    assert differences(there, key_of(table)) == ["environment.torch ('2.10.0', here '2.9.0')"]


def test_key_for_is_the_key_of_what_is_then_measured(one_thread):
    """Also on a CPU, which captures nothing and is never idle."""
    kernel, coverage = load_kernel("cpu"), replace(COVERAGES[0], captured=(1, 2), busy_from=5)
    key = key_for(kernel, coverage, PLAN, ENGINE)
    table = measure(kernel, coverage)
    assert key.request.first == PLAN.first
    assert Stored(key.request, table).key == key


def test_a_second_start_launches_no_kernel_and_says_where_it_is_from(tmp_path, one_thread):
    calls = []
    kernel = load_kernel("cpu")

    def counted(candidate):
        def bind(inputs):
            call = candidate.bind(inputs)
            return lambda: (calls.append(candidate.name), call())[1]

        return Candidate(candidate.name, bind)

    counting = SortKernel("cpu", kernel.device, tuple(map(counted, kernel.candidates)))

    def start():
        store = open_store(Settings(cache_dir=str(tmp_path / "cache")))
        key = key_for(counting, COVERAGES[0], PLAN, ENGINE)
        found = loaded(store, key) or measure(counting, COVERAGES[0])
        store.publish({key: found})
        return found

    first = start()
    assert calls
    calls.clear()
    with listening(logging.INFO) as lines:
        second = start()
    assert calls == []
    assert second.to_json() == first.to_json()
    assert len(lines) == 1
    for word in (str(tmp_path), first.evidence.created, first.evidence.environment.device):
        assert word in lines[0]


@pytest.mark.parametrize(
    ("budget_s", "rounds", "unfinished"),
    [((), 6, False), ((0.75,), 6, False), ((5.0,), 6, True), ((5.0,), 60, False)],
)
@pytest.mark.parametrize("runtime", ["ROCm 7.0", ""])
def test_a_larger_budget_goes_on_from_what_is_unsettled(
    store, budget_s, rounds, unfinished, runtime
):
    """6 rounds do not settle a gain near the margin; what is settled no budget makes better."""
    gain, here = 0.025 if rounds == 6 else 0.2, replace(HERE, runtime=runtime)
    table = made_up_table(1, **SMALL, gains=(0.0, gain), rounds=rounds, environment=here)
    assert table.settled == (rounds != 6)
    store.publish({key_of(table): table})
    with listening(logging.INFO) as lines:
        found = store.load(key_of(table), *budget_s)
    assert (found.table, found.unfinished) == (table, unfinished)
    assert lines == [
        f"256 experts, topk 8, dim 7168, bfloat16, block 32: table from {path_of(store, table)}, "
        "measured 2026-01-01T00:00:00+00:00 on AMD Instinct MI300X "
        f"({runtime or 'CPU'}, torch 2.9.0)"
        + ("; going on from its 0.75 s with 5 s" if unfinished else "")
    ]


@pytest.mark.parametrize("standing", [Standing.FAILED, Standing.WRONG])
def test_what_is_not_sound_is_not_written(store, table, standing, caplog):
    bad = made_up_table(1, **SMALL, out={1: (standing, "no memory left")})
    assert key_of(bad) == key_of(table)
    store.publish({key_of(table): table})
    with caplog.at_level(logging.DEBUG, "adaptive_moe"):
        assert store.publish({key_of(bad): bad}) == 0
    assert loaded(store, key_of(table)) == table
    (said,) = [r for r in caplog.records if "not written" in r.message]
    assert said.levelno == logging.DEBUG
    # Nor is it read, whoever wrote it.
    write_file(path_of(store, bad), stored_of(bad))
    with listening() as lines:
        assert store.load(key_of(bad)) is None
    assert "a candidate failed" in lines[0]


@pytest.mark.parametrize(("quiet", "level"), [(False, logging.INFO), (True, logging.DEBUG)])
def test_of_many_ranks_one_says_what_was_found(store, table, quiet, level, caplog):
    store.publish({key_of(table): table})
    with caplog.at_level(logging.DEBUG, "adaptive_moe"):
        replace(store, quiet=quiet).load(key_of(table))
    (said,) = [r.levelno for r in caplog.records if "table from" in r.message]
    assert said == level


def test_recalibrate_measures_again_and_keeps_the_new_table(tmp_path, table):
    key, newer = key_of(table), made_up_table(2, **SMALL)
    asked = Settings(cache_dir=str(tmp_path), recalibrate=True)
    path = tmp_path / key.file_name()
    with listening(logging.DEBUG) as lines:
        assert open_store(Settings(cache_dir=str(tmp_path))).load(key) is None
        open_store(asked).publish({key: table})
        assert open_store(asked).load(key) is None
    assert lines == [
        f"nothing stored in {path} yet",
        f"{path} is not read: ADAPTIVE_MOE_RECALIBRATE asks to measure again",
    ]
    open_store(asked).publish({key: newer})
    assert loaded(open_store(Settings(cache_dir=str(tmp_path))), key) == newer


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("Yes", True), ("on", True), ("false", False), ("", False)]
)
def test_recalibrate_variable(text, value):
    assert read_settings({"ADAPTIVE_MOE_RECALIBRATE": text}).recalibrate is value


def test_recalibrate_variable_refuses_other_words():
    with pytest.raises(
        SettingsError, match=r"ADAPTIVE_MOE_RECALIBRATE='maybe'.*1, true, yes or on"
    ):
        read_settings({"ADAPTIVE_MOE_RECALIBRATE": "maybe"})


def test_the_folder_in_order_of_precedence():
    root = {"VLLM_CACHE_ROOT": "/vllm", "XDG_CACHE_HOME": "/xdg", "HOME": "/home/someone"}
    assert cache_folder(Settings(cache_dir="/mine"), root) == Path("/mine")
    assert cache_folder(Settings(), root) == Path("/vllm/adaptive_moe")
    del root["VLLM_CACHE_ROOT"]
    assert cache_folder(Settings(), root) == Path("/xdg/adaptive_moe")
    assert cache_folder(Settings(), {}) == Path.home() / ".cache/adaptive_moe"


def test_a_folder_that_is_none_is_said_once_and_not_used(tmp_path, table):
    (tmp_path / "file").touch()
    with listening() as lines:
        store = open_store(Settings(cache_dir=str(tmp_path / "file")))
        assert store.load(key_of(table)) is None
        assert store.publish({key_of(table): table}) == 0
    assert lines == [
        f"the cache folder {tmp_path / 'file'} is not used, every start measures: it is not a "
        "folder; give another ADAPTIVE_MOE_CACHE_DIR"
    ]


def test_a_write_is_flushed_before_and_after_it_takes_its_place(store, table, monkeypatch):
    steps = []
    flush, rename = os.fsync, os.replace

    def fsync(descriptor):
        facts = os.fstat(descriptor)
        steps.append("folder" if stat.S_ISDIR(facts.st_mode) else f"file {facts.st_size > 0}")
        flush(descriptor)

    def replaced(source, target):
        assert Path(source).parent == Path(target).parent
        steps.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replaced)
    store.publish({key_of(table): table})
    assert steps == ["file True", "rename", "folder"]


def test_a_failing_rename_leaves_the_last_good_table(store, table, monkeypatch):
    key = key_of(table)
    store.publish({key: table})

    def fail(source, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with listening() as lines:
        assert store.publish({key: made_up_table(2, **SMALL)}) == 0
    assert lines == [
        f"{path_of(store, table)} cannot be written (Input/output error): the tables serve this "
        "process, and the next start measures again; free the disk, or give a writable "
        "ADAPTIVE_MOE_CACHE_DIR"
    ]
    assert loaded(store, key) == table
    assert list(store.folder.iterdir()) == [path_of(store, table)]


def test_the_same_table_is_not_written_again(store, table):
    key = key_of(table)
    store.publish({key: table})
    before = path_of(store, table).stat().st_ino
    assert store.publish({key: table}) == 1
    assert path_of(store, table).stat().st_ino == before
    store.publish({key: made_up_table(2, **SMALL)})
    assert path_of(store, table).stat().st_ino != before


def test_a_table_of_mixed_machines_is_not_stored_as_this_ones(store, table):
    mixed = made_up_table(1, **SMALL, environment=replace(HERE, device="A + B"))
    with listening(logging.INFO) as lines:
        assert store.publish({key_of(table): mixed}) == 0
    assert lines == [
        f"{path_of(store, table)} is not written: the ranks' table has another environment.device "
        "('A + B', here 'AMD Instinct MI300X')"
    ]
    assert stored_files(store.folder) == []


@settings(max_examples=150)
@given(st.data())
def test_no_changed_byte_goes_unnoticed(data):
    good = stored_of(made_up_table(1, eager=(1,), graph=(), max_tokens=1)).to_text()
    place = data.draw(st.integers(0, len(good) - 1))
    length = data.draw(st.integers(0, 3))
    text = good[:place] + data.draw(st.text(max_size=3)) + good[place + length :]
    if text == good:
        assert Stored.from_text(text).to_text() == good
    else:
        with pytest.raises(ValueError, match=r"."):
            Stored.from_text(text)


@pytest.mark.parametrize("wrong", [{"gain": 1.0}, {"median_us": -0.1}])
def test_impossible_measurements_are_refused(wrong):
    """A gain of all the time there is, or time that runs backwards."""
    text, result = with_the_last_result(**wrong)
    with pytest.raises(ValueError, match="impossible") as refused:
        Stored.from_text(text)
    assert str(refused.value) == f"its measurements are impossible: {result}"


@pytest.mark.parametrize("possible", [{"gain": 0.99, "median_us": 0.1}, {"median_us": None}])
def test_a_sort_may_take_no_time_to_speak_of_or_one_that_is_not_known(possible):
    text, result = with_the_last_result(**possible)
    (bucket,) = Stored.from_text(text).table.evidence.busy
    assert bucket.fills[0].verdict.results[-1] == result


def with_the_last_result(**changed):
    """A file whose last candidate's result is changed so, and that result."""
    table = made_up_table(1, eager=(1,), graph=(), max_tokens=1)
    (bucket,) = table.evidence.busy
    verdict = bucket.fills[0].verdict
    result = replace(verdict.results[2], **changed)
    verdict = replace(verdict, results=(*verdict.results[:2], result))
    bucket = replace(bucket, fills=(replace(bucket.fills[0], verdict=verdict),))
    return without(table, busy=(bucket,)), result


def test_a_request_that_is_none_is_named_however_well_its_hash_fits():
    """By somebody who computes the hash too."""
    good = stored_of(made_up_table(1, eager=(1,), graph=(), max_tokens=1)).to_text()
    _, request, *calibration = good.splitlines()
    for line, what in (
        ('"request": ' + "[" * 100_000 + ",", "the JSON is nested too deeply"),
        (request.replace(f'"{ENGINE}"', "7"), "request.engine: '7' is not a str"),
    ):
        body = "".join(f"{part}\n" for part in (line, *calibration))
        digest = hashlib.sha256(body.encode()).hexdigest()
        with pytest.raises(ValueError, match=r"^") as refused:
            Stored.from_text(f'{{"sha256": "{digest}",\n{body}')
        assert str(refused.value) == what


@pytest.mark.parametrize("where", ["bucket", "verdict", "both"])
def test_a_choice_that_the_measurements_do_not_lead_to_is_refused(where):
    """Policy 1 is the faster one; keeping the baseline would be a choice of somebody else."""
    table = made_up_table(1, eager=(1,), graph=(), max_tokens=1)
    (bucket,) = table.evidence.busy
    assert bucket.candidate == "policy 1"
    if where != "bucket":
        verdict = replace(bucket.fills[0].verdict, candidate="policy 0")
        bucket = replace(bucket, fills=(replace(bucket.fills[0], verdict=verdict),))
    if where != "verdict":
        bucket = replace(bucket, candidate="policy 0")
    with pytest.raises(ValueError, match="measurements") as refused:
        Stored.from_text(without(table, busy=(bucket,)))
    says = f"{bucket.candidate} at 1 tokens is not what its own measurements support"
    assert str(refused.value) == says


@pytest.mark.parametrize(("margin", "serves"), [(0.2, True), (0.01, False)])
def test_what_fills_lead_to_together_is_judged_by_the_tables_own_margin(margin, serves):
    """A tenth slower on many rows is a tie by one margin, and a loss by the other."""
    found = made_up_table(
        1, shape=PADDED, eager=(1,), graph=(), max_tokens=1, gains=(0, 0.4), rule=Rule(margin)
    ).evidence
    (bucket,) = found.busy
    verdict = bucket.fills[2].verdict
    base, other = verdict.results
    tied = replace(other, standing=Standing.TIED, gain=-0.1, gain_low=-0.11, gain_high=-0.09)
    verdict = replace(verdict, results=(base, tied), candidate="policy 0")
    bucket = replace(bucket, fills=(*bucket.fills[:2], replace(bucket.fills[2], verdict=verdict)))
    stored = stored_of(PolicyTable(replace(found, busy=(bucket,))))
    assert bucket.candidate == "policy 1"
    if serves:
        assert Stored.from_text(stored.to_text()) == stored
    else:
        with pytest.raises(ValueError, match="measurements support"):
            Stored.from_text(stored.to_text())


def test_every_candidate_needs_a_result_in_every_fill():
    table = made_up_table(1, shape=PADDED, eager=(1,), graph=(), max_tokens=1)
    (bucket,) = table.evidence.busy
    last = replace(bucket.fills[2].verdict, results=bucket.fills[2].verdict.results[:2])
    fills = (*bucket.fills[:2], replace(bucket.fills[2], verdict=last))
    evidence = replace(table.evidence, busy=(replace(bucket, fills=fills),))
    with pytest.raises(ValueError, match="measurements"):
        Stored.from_text(stored_of(PolicyTable(evidence)).to_text())


def without(table, **parts):
    return stored_of(PolicyTable(replace(table.evidence, **parts))).to_text()


def test_what_the_coverage_does_not_name_is_refused():
    """Captured sizes that nobody measured, graphs of nothing captured, counts that never come."""
    table = made_up_table(1, eager=(1, 8), graph=(1, 2), idle=(1,), busy_from=4, max_tokens=8)
    found = table.evidence
    Stored.from_text(stored_of(table).to_text())
    pair, no = "graph buckets and captured sizes do not belong together", "are not in its coverage"
    for text, what in (
        (without(table, graph=()), pair),
        (without(table, coverage=replace(found.coverage, captured=())), pair),
        (without(table, coverage=replace(found.coverage, captured=(1,))), f"2 tokens (graph) {no}"),
        (
            without(table, coverage=replace(found.coverage, eager=((2, 8),))),
            f"1 tokens (busy) {no}",
        ),
        (without(table, coverage=replace(found.coverage, busy_from=1)), f"1 tokens (idle) {no}"),
    ):
        with pytest.raises(ValueError, match=r"^") as refused:
            Stored.from_text(text)
        assert str(refused.value) == what


def test_a_winner_needs_an_interval_beyond_the_margin():
    table = made_up_table(1, eager=(1,), graph=(), max_tokens=1)
    low = table.evidence.busy[0].fills[0].verdict.result("policy 1").gain_low
    assert (table.candidate(1), 0.01 < low < 0.3) == ("policy 1", True)
    for margin in (0.3, low):
        strict = replace(table.evidence, rule=Rule(margin=margin))
        with pytest.raises(ValueError, match="measurements"):
            Stored.from_text(stored_of(PolicyTable(strict)).to_text())


@pytest.mark.parametrize("plant", [os.mkfifo, os.mkdir])
def test_only_regular_files_are_read(tmp_path, plant):
    plant(tmp_path / "file")
    with pytest.raises(ValueError, match="not a regular file"):
        read_file(tmp_path / "file")


def test_the_largest_file_is_refused_before_it_is_parsed(store, table, monkeypatch):
    store.publish({key_of(table): table})
    path = path_of(store, table)
    monkeypatch.setattr("adaptive_moe.disk.folder.MAX_FILE_BYTES", path.stat().st_size)
    assert read_file(path).table == table
    monkeypatch.setattr("adaptive_moe.disk.folder.MAX_FILE_BYTES", path.stat().st_size - 1)
    monkeypatch.setattr(Stored, "from_text", lambda text: pytest.fail("parsed"))
    with pytest.raises(ValueError, match="more than"):
        read_file(path)


def test_a_file_of_another_user_is_not_believed(store, table, monkeypatch):
    store.publish({key_of(table): table})
    owner = path_of(store, table).stat().st_uid
    if owner == 0:
        os.chown(path_of(store, table), 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with listening() as lines:
        assert store.load(key_of(table)) is None
    assert "belongs to user" in lines[0]


def test_what_belongs_to_root_is_believed(monkeypatch):
    if os.stat("/usr").st_uid != 0:
        pytest.skip("root has another number here")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert open_store(Settings(cache_dir="/usr")).usable


# The same faults as `make faults`, fewer of them, in a process that forks undisturbed.


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    out = tmp_path_factory.mktemp("faults") / "faults.json"
    names = ["warm", "crowd", "kills", "corrupt", "disk"]
    command = [sys.executable, "-m", "tests.faults", *names, "--short", "--out", str(out)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environ, check=False, capture_output=True, timeout=300)
    return json.loads(out.read_text())["runs"]


@pytest.mark.processes
def test_a_warm_start_does_not_even_import_torch(faults):
    assert faults["warm"]["failures"] == {}
    assert faults["warm"]["kernel_launches"] == 0


@pytest.mark.processes
def test_processes_that_publish_at_once(faults):
    found = faults["crowd"]
    assert found["failures"] == {}
    assert found["published"] > found["files"] == found["later_readers"] == found["hits"] == 4


@pytest.mark.processes
def test_kills_at_random_moments(faults):
    found = faults["kills"]
    assert found["failures"] == {}
    assert found["kills"] == sum(found["killed_while"].values()) == 12
    assert found["of_these_left_by_a_later_write"] == 0


@pytest.mark.processes
def test_damaged_files_are_misses(faults):
    found = faults["corrupt"]
    assert found["failures"] == {}
    assert found["files"] == sum(found["kinds"].values()) == 180
    assert len(found["kinds"]) == 18
    assert found["undamaged_file_loads"]


@pytest.mark.processes
def test_failing_disks_cost_one_warning(faults):
    found = faults["disk"]
    assert found["failures"] == {}
    assert sum("skipped" not in one for one in found["faults"].values()) >= 7


def test_shapes_have_files_of_their_own(store, table):
    other = made_up_table(1, **SMALL, shape=replace(SHAPE, topk=4))
    assert store.publish({key_of(table): table, key_of(other): other}) == 2
    assert len(stored_files(store.folder)) == 2
    assert loaded(store, key_of(other)) == other
