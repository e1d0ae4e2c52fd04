"""The plugin in a real vLLM, whose code runs on the CPU; run by run.py in vLLM's environment."""

import inspect
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import worker
from competing import DIM, EXPERTS, NO_SORT, SETTINGS, TOPK, Engine, assert_refused, assert_start
from processes import STANDIN

HERE = Path(__file__).parent
VERSION = os.environ["CONTRACT_VERSION"]
VARIABLE = "VLLM_ROCM_AITER_MOE_DISPATCH_POLICY"
# Before this version vLLM passes AITER no policy and does not know the variable.
KNOWS_THE_VARIABLE = tuple(map(int, VERSION.split("."))) >= (0, 23)
# What was decided for a shape, behind vLLM's own prefix: level, date, file.
# With such a margin a gain is either large, or surely not worth it: every count is settled in few
# rounds, on a busy machine, too.
SETTLES = {"ADAPTIVE_MOE_BUDGET_S": "60", "ADAPTIVE_MOE_MARGIN": "0.3"}
HEADLINE = re.compile(
    r"INFO \d\d-\d\d \d\d:\d\d:\d\d \[(?:.*/)?warm_up.py:\d+\] DeepSeek-V3, block"
)


def run(code, *, standin=True, check=True, **environ):
    """Run Python code in a fresh process; its return code, stdout and stderr."""
    environ = {**os.environ, "VLLM_LOGGING_COLOR": "0", **environ}
    if standin:
        environ["PYTHONPATH"] = os.pathsep.join([environ["PYTHONPATH"], str(STANDIN)])
    command = [sys.executable, *(["-c", code] if "\n" in code or ";" in code else code.split())]
    done = subprocess.run(
        command, env=environ, cwd=HERE, capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def envs():
    """vllm.envs with the plugin registered by vLLM's own loader."""
    sys.path.insert(0, str(STANDIN))
    os.environ[VARIABLE] = "auto"
    import vllm.envs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    yield vllm.envs
    del os.environ[VARIABLE]


def uncached(envs):
    """Undo enable_envs_cache(), which wraps the module's __getattr__."""
    envs.__getattr__ = getattr(envs.__getattr__, "__wrapped__", envs.__getattr__)


def test_vllm_discovers_the_entry_point():
    (found,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "adaptive_moe"]
    assert found.value == "adaptive_moe.engines.vllm:register"


def test_unset_it_imports_nothing_and_touches_nothing():
    done = run(
        "import sys\n"
        "from importlib.metadata import entry_points\n"
        "(ours,) = [e for e in entry_points(group='vllm.general_plugins')"
        " if e.name == 'adaptive_moe']\n"
        "ours.load()()\n"
        "heavy = {'torch', 'numpy', 'vllm', 'aiter', 'adaptive_moe.settings'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import vllm.envs, vllm.plugins\n"
        "before = dict(vllm.envs.environment_variables)\n"
        "vllm.plugins.load_general_plugins()\n"
        "assert vllm.envs.environment_variables == before\n"
        "assert 'aiter' not in sys.modules\n"
    )
    assert "adaptive_moe" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("auto", 0),
        ("AUTO", 0),
        (" Auto ", 0),
        ("2", 2),
        ("0", 0),
        ("", 0),
        ("off", 0),
        ("300", 300),
    ],
)
def test_every_reader_in_vllm_accepts(envs, value, read, monkeypatch):
    from vllm._aiter_ops import rocm_aiter_ops

    monkeypatch.setenv(VARIABLE, value)
    read = read if KNOWS_THE_VARIABLE else 0
    assert getattr(envs, VARIABLE) == read
    envs.enable_envs_cache()
    assert getattr(envs, VARIABLE) == read
    uncached(envs)
    if KNOWS_THE_VARIABLE:
        rocm_aiter_ops._MOE_DISPATCH_POLICY = None
        assert worker.read_policy(rocm_aiter_ops) == read
        rocm_aiter_ops._MOE_DISPATCH_POLICY = None
        rocm_aiter_ops.refresh_env_variables()
        if "_MOE_DISPATCH_POLICY" in inspect.getsource(rocm_aiter_ops.refresh_env_variables):
            assert read == rocm_aiter_ops._MOE_DISPATCH_POLICY
        rocm_aiter_ops._MOE_DISPATCH_POLICY = None
    assert envs.compile_factors()[VARIABLE] == read


def test_unset_reads_as_before(envs, monkeypatch):
    monkeypatch.delenv(VARIABLE)
    assert getattr(envs, VARIABLE) == 0


@pytest.mark.skipif(not KNOWS_THE_VARIABLE, reason="this vLLM does not read it")
@pytest.mark.parametrize("value", ["x", "3x", "auto,2", "2.0"])
def test_a_bad_value_of_vllms_own_raises_as_without_us(envs, value, monkeypatch):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match="invalid literal for int"):
        getattr(envs, VARIABLE)
    with pytest.raises(ValueError, match="invalid literal for int"):
        envs.enable_envs_cache()
    uncached(envs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ADAPTIVE_MOE_DISPATCH_POLICY", "2"),
        ("ADAPTIVE_MOE_DISPATCH_POLICY", "3x"),
        ("ADAPTIVE_MOE_BUDGET_S", "fast"),
        ("ADAPTIVE_MOE_BUGET_S", "1"),
    ],
)
def test_no_variable_of_ours_makes_vllm_raise(envs, name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert getattr(envs, VARIABLE) == 0
    envs.enable_envs_cache()
    assert getattr(envs, VARIABLE) == 0
    uncached(envs)


def test_workers_forked_or_not_calibrate_in_kernel_warmup_and_sort_by_their_tables():
    environ = {VARIABLE: "auto", **SETTLES, "AITER_STANDIN_SLOW": "0"}
    done = run("worker.py", **environ)
    log = done.stdout + done.stderr
    results = json.loads(re.search(r"^RESULT (.*)$", log, re.MULTILINE).group(1))
    for result in results.values():
        assert result["blocks"] == [16, 64]  # as AITER will ask up to and from 32 tokens
        assert result["policies"] == result["expected"]
        assert result["policies"][1] != 0  # which was made the slow one
        assert result["answered"] == 6
    # The first warm-up of each worker came before its model had sorted anything.
    assert log.count("auto has nothing to choose") == 2
    assert len(HEADLINE.findall(log)) == 4
    # The second of them found what the first had stored.
    assert log.count("; measured at ") == 2


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Four starts of an engine, see worker.py: each rank's outcome, the log, and the folders."""
    root = tmp_path_factory.mktemp("caches")
    folders = [str(root / name) for name in ("cold", "warm", "none", "a", "b")]
    cold, warm, none, a, b = folders
    mixed = f"tensor:{cold},{warm},{none}-"
    environ = {VARIABLE: "auto", **SETTLES, "AITER_STANDIN_SLOW": "0"}
    done = run(f"worker.py tensor:{warm} {mixed} {mixed} data:{a},{b}", **environ)
    log = done.stdout + done.stderr
    starts = json.loads(re.search(r"^RESULT (.*)$", log, re.MULTILINE).group(1))
    (Path(sys.prefix) / "engines.log").write_text(log)
    return starts, log, folders


def test_ranks_share_their_tables_in_kernel_warmup(engines):
    (alone, first, _, _), _, _ = engines
    assert alone[0]["sorts"] > 0
    assert [rank["world"] for rank in first] == [[0, 1, 2]] * 3
    assert first[0]["tables"] == first[1]["tables"] != {}
    assert first[2]["tables"] == {}
    assert first[0]["policies"] == first[1]["policies"]


def test_a_second_start_measures_nothing_and_names_its_files(engines):
    (_, first, second, _), log, (cold, *_) = engines
    # Tables are told apart by what was measured: another measurement is another table.
    assert [rank["tables"] for rank in second] == [rank["tables"] for rank in first]
    assert [rank["policies"] for rank in second] == [rank["policies"] for rank in first]
    assert log.count(f"table kept in {cold}") == 4  # two block sizes, two starts
    # Each start says what was decided for each shape once, on rank 0.
    assert len(HEADLINE.findall(log)) == 8


def test_data_parallel_ranks_of_one_model_share_too(engines):
    (*_, (one, other)), _, _ = engines
    assert one["world"] == other["world"] == [0, 1]
    assert one["tables"] == other["tables"] != {}


def test_the_tables_policy_arrives_through_vllms_own_implementation(envs):
    from tables import make_table

    from adaptive_moe.engines import process

    hook = process.current()
    assert worker.forward(32).policy == 0
    (key,) = [key for key in hook.seen if key.block_size == 16]
    hook.set_tables({key: make_table({1: 1, 8: 2, 16: 0, 32: 1})})
    assert [int(worker.forward(n).policy) for n in (1, 2, 8, 9, 16, 17)] == [1, 2, 2, 0, 0, 1]
    hook.set_tables({key: make_table({32: 0})})


def test_plugins_loaded_twice_are_one_layer(envs):
    import vllm.model_executor.warmup.kernel_warmup as warmup
    import vllm.plugins

    gpu_worker = worker.import_worker()
    before = warmup.kernel_warmup
    vllm.plugins.plugins_loaded = False
    vllm.plugins.load_general_plugins()
    assert warmup.kernel_warmup is before is gpu_worker.kernel_warmup
    assert not hasattr(before.__wrapped__, "__wrapped__")

    from adaptive_moe.engines import process

    already = process.counts().total
    worker.forward(8)
    assert process.counts().total == already + 1


def test_a_failure_of_ours_does_not_stop_the_warm_up(envs, monkeypatch, caplog):
    from adaptive_moe.engines import process

    gpu_worker = worker.import_worker()
    made = worker.make_worker(gpu_worker)
    worker.forward(8)
    monkeypatch.setattr(process, "warm_up_for", lambda *arguments, agree: 1 / 0)
    with caplog.at_level("ERROR", "adaptive_moe"):
        logging.getLogger("adaptive_moe").addHandler(caplog.handler)
        gpu_worker.kernel_warmup(made)
        logging.getLogger("adaptive_moe").removeHandler(caplog.handler)
    assert "warm-up failed" in caplog.text
    assert worker.forward(8).policy == 0


def load_plugins():
    import vllm.plugins

    vllm.plugins.plugins_loaded = False
    vllm.plugins.load_general_plugins()


@pytest.mark.parametrize("sorts", SETTINGS)
def test_the_sorts_that_were_asked_for_compete_serve_and_are_named(envs, sorts, tmp_path):
    gpu_worker = worker.import_worker()

    def layer(num_tokens):
        return worker.run_layer(num_tokens, experts=EXPERTS, topk=TOPK, dim=DIM)

    def warm_up():
        layer(worker.MAX_TOKENS)
        made = worker.make_worker(gpu_worker)
        gpu_worker.kernel_warmup(made)
        return made

    # Newer ones pad with rows of -1.
    padding_rows = "VLLM_MOE_SKIP_PADDING" in envs.environment_variables
    engine = Engine("policy 0", padding_rows, load_plugins, warm_up, layer)
    assert_start(engine, sorts, tmp_path / "cache")


def test_a_sort_that_nobody_has_is_refused_in_one_line_and_vllm_starts(envs, monkeypatch, caplog):
    monkeypatch.setenv("ADAPTIVE_MOE_SORTS", NO_SORT)
    monkeypatch.setattr(logging.getLogger("adaptive_moe"), "propagate", True)
    assert_refused(load_plugins, caplog)
    assert worker.forward(8).policy == 0


def test_a_fixed_policy_reaches_the_sort_and_measures_nothing(envs, monkeypatch):
    """The last of those that share this process: it leaves another hook behind."""
    import vllm.plugins
    from vllm._aiter_ops import rocm_aiter_ops

    from adaptive_moe.engines import process

    monkeypatch.setenv(VARIABLE, "2")
    rocm_aiter_ops._MOE_DISPATCH_POLICY = None
    vllm.plugins.plugins_loaded = False
    vllm.plugins.load_general_plugins()
    gpu_worker = worker.import_worker()
    assert worker.forward(8).policy == 2
    gpu_worker.kernel_warmup(worker.make_worker(gpu_worker))
    assert worker.forward(8).policy == 2
    assert process.current().tables == {}


LOAD_TWO_PROCESSES = (
    "import multiprocessing\n"
    "import vllm.envs\n"
    "from vllm.plugins import load_general_plugins\n"
    "def child():\n"
    "    import vllm.plugins\n"
    "    vllm.plugins.plugins_loaded = False\n"
    "    vllm.plugins.load_general_plugins()\n"
    "    print('CHILD', vllm.envs.VLLM_ROCM_AITER_MOE_DISPATCH_POLICY)\n"
    "load_general_plugins()\n"
    "other = multiprocessing.get_context('fork').Process(target=child)\n"
    "other.start()\n"
    "other.join()\n"
    "print('PARENT', vllm.envs.VLLM_ROCM_AITER_MOE_DISPATCH_POLICY)\n"
)


def test_without_aiter_the_word_is_accepted_and_said_once():
    done = run(LOAD_TWO_PROCESSES, standin=False, **{VARIABLE: "auto"})
    assert "CHILD 0" in done.stdout
    assert "PARENT 0" in done.stdout
    said = [line for line in (done.stdout + done.stderr).splitlines() if "no effect here" in line]
    assert len(said) == 1
    assert "AITER is not installed" in said[0]


def test_pypis_unrelated_aiter_is_named(tmp_path):
    (tmp_path / "aiter").mkdir()
    (tmp_path / "aiter" / "__init__.py").write_text("")
    environ = {VARIABLE: "auto"}
    environ["PYTHONPATH"] = os.pathsep.join([os.environ["PYTHONPATH"], str(tmp_path)])
    done = run(LOAD_TWO_PROCESSES, standin=False, **environ)
    assert "it is PyPI's unrelated package of that name" in done.stdout + done.stderr
    assert "PARENT 0" in done.stdout


def test_filtered_out_vllm_itself_refuses_the_word_and_we_can_say_why():
    code = (
        "import os\n"
        "import vllm.envs, vllm.plugins\n"
        "def read():\n"
        "    vllm.plugins.plugins_loaded = False\n"
        "    vllm.plugins.load_general_plugins()\n"
        "    try:\n"
        "        print('READ', vllm.envs.VLLM_ROCM_AITER_MOE_DISPATCH_POLICY)\n"
        "    except (ValueError, AttributeError) as error:\n"
        "        print('REFUSED', error)\n"
        "read()\n"
        "os.environ['VLLM_PLUGINS'] += ',adaptive_moe'\n"
        "read()\n"
    )
    done = run(code, **{VARIABLE: "auto", "VLLM_PLUGINS": "some_other_plugin"})
    refused, read = (s for s in done.stdout.splitlines() if s.startswith(("REFUSED", "READ")))
    if KNOWS_THE_VARIABLE:
        assert refused == "REFUSED invalid literal for int() with base 10: 'auto'"
    assert refused.startswith("REFUSED")
    assert read == "READ 0"


def test_a_copied_cache_folder_is_what_the_next_start_finds(tmp_path):
    """Tune once, ship the folder: a start on another machine of the same kind measures nothing."""
    here, copied = tmp_path / "a", tmp_path / "b"

    def start(folder):
        # The baseline is the fastest, so that there is no choice for a start to compare with it.
        environ = {VARIABLE: "auto", **SETTLES, "AITER_STANDIN_SLOW": "1,2"}
        done = run(f"worker.py tensor:{folder}", **environ)
        log = done.stdout + done.stderr
        ((rank,),) = json.loads(re.search(r"^RESULT (.*)$", log, re.MULTILINE).group(1))
        assert sorted(rank["tables"]) == ["16", "64"]
        assert log.count(f"table kept in {folder}") == 2
        return rank, log

    first, _ = start(here)
    assert first["sorts"] > 0
    shutil.copytree(here, copied)
    second, log = start(copied)
    assert (second["sorts"], second["tables"]) == (0, first["tables"])
    assert log.count("; measured at ") == 2
