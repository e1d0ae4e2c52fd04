"""The command line, end to end in its own process: a tiny shape, a small budget."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHAPE = ("--experts", "8", "--topk", "2", "--hidden", "64")
SMALL = (*SHAPE, "--max-tokens", "32", "--budget", "1.5")
CHOOSERS = ("VLLM_ROCM_AITER_MOE_DISPATCH_POLICY", "ADAPTIVE_MOE_DISPATCH_POLICY")


def run(*arguments: str, cache: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if k not in CHOOSERS}
    environ |= {"ADAPTIVE_MOE_CACHE_DIR": str(cache), **variables}
    return subprocess.run(
        [sys.executable, "-m", "adaptive_moe", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environ,
    )


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    """A cache folder in which `calibrate` has left its result."""
    cache = tmp_path_factory.mktemp("cache")
    done = run("calibrate", *SMALL, cache=cache)
    assert done.returncode == 0, done.stderr
    assert "policy 0 us" in done.stdout
    assert "written to" in done.stdout
    # No terminal: plain lines, no control characters.
    assert "measured 1/" in done.stderr
    assert "\x1b" not in done.stderr
    return cache


def test_show_prints_the_table_again_and_json_is_the_calibration(calibrated):
    assert "8 experts, topk 2" in run("show", cache=calibrated).stdout
    found = json.loads(run("show", "--json", cache=calibrated).stdout)
    assert found["shape"]["num_experts"] == 8
    assert found["eager"][0]["num_tokens"] == 1
    assert found["applied"]["eager"][-1][1] == 32


def test_explain_says_the_policy_and_why(calibrated):
    done = run("explain", "--tokens", "20", "--json", cache=calibrated)
    found = json.loads(done.stdout)
    assert found["policy"] in (0, 1, 2)
    assert f"20 tokens, eager: policy {found['policy']}" in found["why"][0]
    plain = run("explain", "--tokens", "20", cache=calibrated).stdout
    assert plain.splitlines() == found["why"]


def test_plot_writes_a_png(calibrated, tmp_path):
    picture = tmp_path / "times.png"
    done = run("plot", "--output", str(picture), "--json", cache=calibrated)
    assert json.loads(done.stdout) == {"written": str(picture)}
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert picture.stat().st_size > 10_000


def test_calibrate_json_is_a_calibration_that_show_reads(tmp_path):
    done = run("calibrate", *SHAPE, "--max-tokens", "4", "--budget", "1", "--json", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    copy = tmp_path / "copy.json"
    copy.write_text(done.stdout)
    assert run("show", "--table", str(copy), cache=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["calibrate", "--model", "gpt-9"], "'gpt-9' is not known"),
        (["calibrate", "--experts", "8", "--topk", "9", "--hidden", "64"], "topk=9"),
        (["calibrate", "--experts", "8", "--topk", "2"], "give all three"),
        (["calibrate"], "say which sort is meant"),
        (["calibrate", "--model", "mixtral-8x7b", *SHAPE], "one way"),
        (["calibrate", *SHAPE, "--block-size", "0"], "block_size=0"),
        (["calibrate", *SHAPE, "--budget", "1e-9"], "too small for one round"),
        (["calibrate", *SHAPE, "--budget", "soon"], "--budget='soon'"),
        (["calibrate", *SHAPE, "--margin", "2"], "--margin='2'"),
        (["calibrate", *SHAPE, "--buckets", "4,2"], "--buckets='4,2'"),
        (["calibrate", *SHAPE, "--max-tokens", "-3"], "max_tokens=-3"),
        (["calibrate", *SHAPE, "--output", "/proc/nowhere/x.json"], "cannot be written"),
        (["calibrate", "--config", "/nowhere/config.json"], "cannot be read"),
        (["show", "--table", "/nowhere/x.json"], "does not exist"),
        (["explain", "--tokens", "0"], "num_tokens=0"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, says, calibrated):
    done = run(*arguments, cache=calibrated)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("measured")]
    assert len(errors) == 1


def test_a_dense_config_and_a_file_that_is_no_calibration(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"hidden_size": 4096}')
    done = run("calibrate", "--config", str(config), cache=tmp_path)
    assert done.returncode == 2
    assert "dense" in done.stderr
    done = run("show", "--table", str(config), cache=tmp_path)
    assert done.returncode == 2
    assert "is not a calibration" in done.stderr


def test_a_policy_that_is_not_accepted_stops_calibrate_with_the_variable_named(tmp_path):
    done = run("calibrate", *SMALL, cache=tmp_path, ADAPTIVE_MOE_DISPATCH_POLICY="auto,2")
    assert done.returncode == 2
    assert "ADAPTIVE_MOE_DISPATCH_POLICY='auto,2'" in done.stderr


def doctor(tmp_path: Path, **variables: str) -> dict[str, str]:
    done = run("doctor", "--json", cache=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_doctor_says_what_each_value_of_the_variable_would_do(tmp_path):
    assert doctor(tmp_path)["would happen"].startswith("nothing")
    fixed = doctor(tmp_path, ADAPTIVE_MOE_DISPATCH_POLICY="2")
    assert fixed["would happen"].startswith("policy 2 for every call")
    wrong = doctor(tmp_path, ADAPTIVE_MOE_DISPATCH_POLICY="3x")
    assert "'3x'" in wrong["would happen"]


def test_doctor_says_that_vllm_would_refuse_the_word_without_our_plugin(tmp_path):
    auto = {"VLLM_ROCM_AITER_MOE_DISPATCH_POLICY": "auto", "VLLM_PLUGINS": "others"}
    refused = doctor(tmp_path, **auto)["would happen"]
    assert refused.startswith("an error in vLLM")
    assert "add adaptive_moe to VLLM_PLUGINS" in refused
    auto["VLLM_PLUGINS"] = "others,adaptive_moe"
    assert "error" not in doctor(tmp_path, **auto)["would happen"]


def test_doctor_names_both_variables_in_conflict(tmp_path):
    both = {"VLLM_ROCM_AITER_MOE_DISPATCH_POLICY": "auto", "ADAPTIVE_MOE_DISPATCH_POLICY": "2"}
    would = doctor(tmp_path, **both)["would happen"]
    assert would.startswith("an error: VLLM_ROCM_AITER_MOE_DISPATCH_POLICY='auto' and ADAPTIVE_MOE")


def test_doctor_tells_amds_aiter_from_pypis(tmp_path):
    (tmp_path / "pypi" / "aiter").mkdir(parents=True)
    (tmp_path / "pypi" / "aiter" / "__init__.py").write_text("def aiter(): ...\n")
    (tmp_path / "amd" / "aiter").mkdir(parents=True)
    (tmp_path / "amd" / "aiter" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "amd" / "aiter" / "fused_moe.py").write_text(
        "def moe_sorting(dispatch_policy): ...\n"
    )
    here = str(Path(__file__).parents[2])
    auto = {"ADAPTIVE_MOE_DISPATCH_POLICY": "auto"}
    pypi = doctor(tmp_path, PYTHONPATH=f"{tmp_path / 'pypi'}:{here}", **auto)
    assert "unrelated" in pypi["aiter"]
    assert "changes nothing" in pypi["would happen"]
    amd = doctor(tmp_path, PYTHONPATH=f"{tmp_path / 'amd'}:{here}", **auto)
    assert amd["aiter"].startswith("AMD's AITER")
    assert "measured at warm-up" in amd["would happen"]
