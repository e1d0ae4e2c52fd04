"""status prints what servers wrote; what they write, and when a file is stale, is engines/'s."""

import json
from dataclasses import fields, replace

import pytest

from adaptive_moe import cli
from adaptive_moe.cli.status import CALLS
from adaptive_moe.disk import status
from adaptive_moe.engines.counters import Counts


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_MOE_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_nobody_serves(folder, capsys):
    assert cli.main(["status"]) == 0
    assert f"no process that uses {folder}" in capsys.readouterr().out


def test_a_server_says_what_it_runs_and_where_that_came_from(folder, capsys):
    table = status.TableStatus(
        calls="256 experts, topk 8",
        kernel="aiter 0.1.22 opus",
        device="AMD Instinct MI300X",
        origin="stored",
        measured="2026-11-24",
        decided="policy 1 (one-shot) up to 24 tokens",
        settled=False,
    )
    mine = replace(
        status.here("vllm 0.33.0", 0, 8, "auto"),
        tables=(table,),
        problems=("a shape that failed",),
        calls=(("baseline", 1200), ("failed", 0)),
        captured=(("policy 1", 51),),
    )
    status.write(folder, mine, "capture")
    assert cli.main(["status"]) == 0
    out = capsys.readouterr().out
    for said in (
        f"vllm 0.33.0, pid {mine.pid}",
        "rank 0 of 8, auto: runs, as of capture",
        "from the cache folder, measured 2026-11-24: policy 1 (one-shot) up to 24",
        "without a table: a shape that failed",
        "calls: 1,200 stayed with the baseline\n",
        "the graphs hold 51 calls of policy 1\n",
    ):
        assert said in out
    assert cli.main(["status", "--json"]) == 0
    (process,) = json.loads(capsys.readouterr().out)["processes"]
    assert process["tables"][0]["origin"] == "stored"
    assert process["calls"] == {"baseline": 1200, "failed": 0}


def test_every_kind_of_call_has_words():
    """And no word is of none."""
    assert CALLS.keys() == {field.name for field in fields(Counts)}
