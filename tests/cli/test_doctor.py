"""doctor tells the truth: what is here, and whether what was asked for will happen."""

import importlib.metadata
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch  # noqa: F401  its own import reads entry points, which tests replace

from adaptive_moe import cli
from adaptive_moe.cli import doctor
from adaptive_moe.kernels.aiter import AiterInstall

ENGINE = "VLLM_ROCM_AITER_MOE_DISPATCH_POLICY"
NEUTRAL = "ADAPTIVE_MOE_DISPATCH_POLICY"
AMD = AiterInstall("0.1.22", "/opt/aiter", None)
NONE = AiterInstall("", "", "AITER is not installed (no module named aiter)")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with AITER and these engines, each with our plugin registered."""

    def made(*engines, aiter=AMD, registered=True):
        def version(name):
            if name in engines:
                return "1.0"
            raise importlib.metadata.PackageNotFoundError

        entries = [SimpleNamespace(name="adaptive_moe")] if registered else []
        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
        monkeypatch.setattr(doctor, "find_aiter", lambda: aiter)

    made()
    return made


def diagnosis(**environ):
    return {finding.topic: finding for finding in doctor.diagnose(environ)}


def outlook(**environ):
    found = diagnosis(**environ)["verdict"]
    return found.text, found.ok


def test_a_terminal_gets_columns_and_a_file_a_line_a_finding(machine, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("ADAPTIVE_MOE_CACHE_DIR", "/tmp")  # a long path is not broken
    cli.main(["doctor", "--verbose"])
    whole = capsys.readouterr().out.splitlines()
    assert len(whole) == len(doctor.diagnose(os.environ))
    monkeypatch.setenv("COLUMNS", "100")
    cli.main(["doctor", "--verbose"])
    columns = capsys.readouterr().out.splitlines()
    assert len(columns) > len(whole)
    assert all(len(line) <= 100 for line in columns)


def test_nothing_asked_for_is_nothing_wrong(machine):
    text, ok = outlook()
    assert text.startswith("off: AITER and the engine as they are")
    assert ok
    machine(aiter=NONE)
    assert all(finding.ok for finding in diagnosis().values())


def test_auto_without_an_engine_or_with_one_that_works(machine):
    text, ok = outlook(**{NEUTRAL: "auto"})
    assert text.startswith("will choose after adaptive_moe.install(): ")
    assert ok
    machine("vllm")
    text, ok = outlook(**{NEUTRAL: "auto", "VLLM_ROCM_USE_AITER": "1"})
    assert text.startswith("will choose in vllm 1.0: ")
    assert ok


def test_auto_does_not_happen_without_aiter_or_with_it_switched_off(machine):
    machine("vllm")
    text, ok = outlook(**{NEUTRAL: "auto"})
    assert "VLLM_ROCM_USE_AITER=1, which is not set" in text
    assert not ok
    machine(aiter=NONE)
    assert not outlook(**{NEUTRAL: "auto"})[1]
    found = diagnosis(**{NEUTRAL: "auto"})["aiter"]
    assert not found.ok
    assert found.facts["usable"] is False


@pytest.mark.parametrize("plugins", ["others", ""])
def test_a_plugin_that_vllm_leaves_out_is_said_under_either_variable(machine, plugins):
    machine("vllm")
    here = {"VLLM_PLUGINS": plugins, "VLLM_ROCM_USE_AITER": "1"}
    text, ok = outlook(**here, **{NEUTRAL: "auto"})
    assert text.startswith("will not: vllm: VLLM_PLUGINS=")
    assert "add it, or unset VLLM_PLUGINS" in text
    assert not ok
    text, ok = outlook(**here, **{ENGINE: "auto"})
    assert text.startswith("will not: vLLM does not start")
    assert not ok
    assert outlook(**{**here, "VLLM_PLUGINS": "others,adaptive_moe", ENGINE: "auto"})[1]


def test_an_empty_list_of_plugins_means_all_to_sglang(machine):
    machine("sglang")
    here = {NEUTRAL: "auto", "SGLANG_USE_AITER": "true"}
    assert outlook(**here, SGLANG_PLUGINS="")[1]
    assert not outlook(**here, SGLANG_PLUGINS="others")[1]


def test_one_of_two_engines_is_enough(machine):
    machine("vllm", "sglang")
    text, ok = outlook(**{NEUTRAL: "auto", "SGLANG_USE_AITER": "1"})
    assert "in sglang" in text
    assert ok


def test_a_plugin_that_is_not_registered_is_said(machine):
    machine("vllm", registered=False)
    found = diagnosis(**{NEUTRAL: "auto"})
    assert "not registered" in found["vllm"].text
    assert found["vllm"].facts["plugin_loaded"] is False
    assert not found["verdict"].ok


@pytest.mark.parametrize(("value", "more"), [("1", ""), ("2", ""), ("7", "takes it as 2")])
def test_an_integer_is_said_to_be_what_aiter_takes_it_for(machine, value, more):
    text, ok = outlook(**{NEUTRAL: value})
    assert text.startswith(f"fixed policy {value} for every call")
    assert more in text
    assert ("takes it as 2" in text) is bool(more)
    assert ok
    machine(aiter=NONE)
    assert not outlook(**{NEUTRAL: value})[1]


def test_what_is_not_accepted_and_what_is_misspelt_is_not_ok(machine):
    found = diagnosis(**{NEUTRAL: "3x", "ADAPTIVE_MOE_BUDGETS": "1"})
    assert not found[NEUTRAL].ok
    assert "'3x' is not accepted" in found[NEUTRAL].text
    assert not found["misspelt"].ok
    assert "did you mean ADAPTIVE_MOE_BUDGET_S?" in found["misspelt"].text


def test_a_policy_that_is_not_accepted_is_the_verdict(machine):
    text, ok = outlook(**{NEUTRAL: "atuo"})
    assert text.startswith(f"will not: {NEUTRAL}='atuo' is not accepted: give auto")
    assert not ok


def test_two_variables_that_disagree_are_named(machine):
    found = diagnosis(**{ENGINE: "auto", NEUTRAL: "2"})
    assert not found[ENGINE].ok
    assert "disagree" in found[ENGINE].text


def test_a_cache_folder_that_cannot_be_used_is_said(machine, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    found = diagnosis(**{"ADAPTIVE_MOE_CACHE_DIR": str(file)})["cache"]
    assert "it is not a folder" in found.text
    assert not found.ok
    deep = diagnosis(**{"ADAPTIVE_MOE_CACHE_DIR": str(tmp_path / "a" / "b")})["cache"]
    assert deep.ok
    assert not (tmp_path / "a").exists()


def test_the_exit_code_and_the_fields_of_json(machine, monkeypatch, capsys):
    machine("vllm")
    monkeypatch.setattr(os, "environ", {**os.environ, NEUTRAL: "auto"})
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.startswith("will not: vllm: it sorts with AITER only under")
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert found["findings"]["vllm"]["plugin_loaded"] is True
    assert found["findings"]["vllm"]["uses_aiter"] is False
    assert found["findings"]["torch"]["gpu"] in (True, False)
    assert found["findings"]["verdict"]["mode"] == "auto"
    monkeypatch.setattr(os, "environ", {**os.environ, NEUTRAL: "off"})
    assert cli.main(["doctor"]) == 0


def test_pypis_unrelated_aiter_is_told_from_amds(tmp_path, monkeypatch):
    package = tmp_path / "aiter"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "aiter", raising=False)
    assert "unrelated" in diagnosis()["aiter"].text
    (package / "fused_moe.py").write_text("def moe_sorting(dispatch_policy): ...\n")
    assert diagnosis()["aiter"].text.startswith("AMD's AITER")
    package.joinpath("fused_moe.py").unlink()
    (package / "fused_moe").mkdir()
    (package / "fused_moe" / "__init__.py").write_text("def moe_sorting(dispatch_policy): ...\n")
    assert diagnosis()["aiter"].text.startswith("AMD's AITER")


def test_aiters_moe_switched_off_again_is_said(machine):
    machine("vllm")
    here = {NEUTRAL: "auto", "VLLM_ROCM_USE_AITER": "1", "VLLM_ROCM_USE_AITER_MOE": "0"}
    text, ok = outlook(**here)
    assert text == (
        "will not: vllm: VLLM_ROCM_USE_AITER_MOE='0' switches AITER's MoE off: unset it"
    )
    assert not ok


def test_a_value_that_vllm_itself_refuses_is_said_to_keep_it_from_starting(machine):
    machine("vllm")
    here = {"VLLM_ROCM_USE_AITER": "1"}
    text, ok = outlook(**here, **{ENGINE: "atuo"})
    assert text.startswith(f"will not: vLLM does not start: {ENGINE}='atuo' is not accepted")
    assert not ok
    assert "vLLM itself refuses it" in diagnosis(**here, **{ENGINE: "atuo"})[ENGINE].text
    assert outlook(**here, **{ENGINE: "auto"})[1]
    assert outlook(**here, **{ENGINE: "off"})[1]


def test_a_near_miss_of_vllms_variable_is_said(machine):
    found = diagnosis(VLLM_ROCM_AITER_MOE_DISPATCH_POLCY="auto")
    assert not found["misspelt"].ok
    assert f"did you mean {ENGINE}?" in found["misspelt"].text


def test_variables_that_stay_behind_with_ray_are_said(machine, monkeypatch):
    machine("vllm")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name)
    copies = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
    assert f"also set {copies}=ADAPTIVE_MOE_" in diagnosis(**{NEUTRAL: "auto"})["ray"].text
    assert "ray" not in diagnosis(**{NEUTRAL: "auto", copies: "MY_,ADAPTIVE_MOE_"})
    assert "ray" not in diagnosis(**{ENGINE: "auto"})


def test_no_torch_is_a_verdict_and_no_tomli_a_hint(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    text, ok = outlook(**{NEUTRAL: "auto"})
    assert text.startswith("will not: torch is not importable")
    assert not ok
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert "pip install tomli" in diagnosis()["python"].text


def test_a_folder_that_begins_in_no_home_is_said(machine):
    found = diagnosis(**{"ADAPTIVE_MOE_CACHE_DIR": "~nosuchuser/tables"})["cache"]
    assert "no home folder" in found.text
    assert not found.ok


def test_variables_are_shown_where_they_are_set_wrong_or_asked_for(machine, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", {**os.environ, "ADAPTIVE_MOE_MARGIN": "2"})
    cli.main(["doctor"])
    short = capsys.readouterr().out
    assert "ADAPTIVE_MOE_MARGIN" in short
    assert "ADAPTIVE_MOE_BUSY_FROM" not in short
    cli.main(["doctor", "--verbose"])
    assert "ADAPTIVE_MOE_BUSY_FROM" in capsys.readouterr().out
