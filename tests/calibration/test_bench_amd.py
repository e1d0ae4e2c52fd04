"""make bench-amd, which somebody with an MI300X runs for us once: it must work the first time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from calibration import bench_amd

ROOT = Path(__file__).parents[2]
STANDIN = ROOT / "tests" / "aiter_standin"


@pytest.fixture(scope="module")
def sent_back(tmp_path_factory):
    """The file that comes back, made on the stand-in's AITER; quick."""
    out = tmp_path_factory.mktemp("amd") / "amd.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "calibration.bench_amd",
            "--quick",
            "--models",
            "qwen3-30b",
            "--out",
            out,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{STANDIN}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    return json.loads(out.read_text())


def test_every_part_has_its_figures(sent_back):
    assert list(sent_back["parts"]) == [
        *("doctor", "calibrate qwen3-30b", "step", "sorts", "noise", "hook")
    ]
    results = {name: part["result"] for name, part in sent_back["parts"].items()}
    assert results["doctor"]["findings"]["aiter"]
    assert results["calibrate qwen3-30b"]["evidence"]["kernel"].startswith("aiter ")
    for name in ("step", "sorts", "noise", "hook"):
        assert results[name]["kernel"] == "aiter"
    step = results["step"]["shapes"]["qwen3-30b"]["situations"]["eager, as it comes"]
    every = ["policy 0", "policy 1", "policy 2", "ck", "flydsl"]
    assert list(step["sets"]["all"]) == ["table", "table of policies", *every]
    assert list(results["sorts"]["shapes"]["qwen3-30b"]["situations"])
    assert {"device", "arch", "torch"} <= sent_back["environment"].keys()


def test_a_part_that_fails_is_told_and_the_file_is_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        bench_amd,
        "parts",
        lambda *_, **__: [
            ("good", ["adaptive_moe", "doctor", "--json"]),
            ("bad", ["adaptive_moe", "show"]),
        ],
    )
    out = tmp_path / "amd.json"
    monkeypatch.setattr(sys, "argv", ["bench_amd.py", "--kernel", "cpu", "--out", str(out)])
    assert bench_amd.main() == 1
    found = json.loads(out.read_text())["parts"]
    assert found["good"]["result"]["findings"]
    assert (found["bad"]["exit"], "nothing is kept" in found["bad"]["said"]) == (2, True)
    assert "bad: FAILED" in capsys.readouterr().err


def test_without_aiter_it_says_so_and_writes_nothing(tmp_path, monkeypatch, capsys):
    out = tmp_path / "amd.json"
    monkeypatch.setattr(sys, "argv", ["bench_amd.py", "--out", str(out)])
    assert bench_amd.main() == 2
    assert "AITER is not installed" in capsys.readouterr().err
    assert not out.exists()


def test_a_part_that_hangs_does_not_hold_up_the_others(monkeypatch):
    monkeypatch.setattr(bench_amd, "LIMIT_S", 0.01)
    part = bench_amd.run(["adaptive_moe", "doctor", "--json"], {})
    assert part["exit"] is None
    assert "still running" in part["said"]


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Instinct MI355X OAM", "mi355x_oam"),
        ("NVIDIA H100 80GB HBM3", "h100_80gb_hbm3"),
        ("", "unknown"),
    ],
)
def test_the_file_is_named_after_the_gpu(device, name):
    assert bench_amd.slug(device) == name
