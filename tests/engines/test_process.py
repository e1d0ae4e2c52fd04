"""The one hook of a process, as `adaptive_moe.install()` has it."""

import contextlib
import importlib
import os
import signal
import sys
import threading
from types import SimpleNamespace

import pytest

from adaptive_moe.engines import plugin, process
from adaptive_moe.engines.wanted import Batches
from adaptive_moe.engines.warm_up import warm_up_hook
from adaptive_moe.kernels.aiter import find_aiter
from tests.aiter_standin.load import ROOT, forget_aiter, load_aiter
from tests.engines.plugging import NAME, NEUTRAL, sort
from tests.tables import measure_as

pytestmark = pytest.mark.usefixtures("fresh_process")


# Plain use


def test_plain_use_from_install_to_uninstall():
    """install() before AITER is imported, a first forward, warm_up(), and off again."""
    original = load_aiter().moe_sorting.__code__
    forget_aiter()
    assert process.install()
    aiter = load_aiter()
    assert sort(aiter) == 0
    warm_up_hook(process.current(), Batches(64), measure=measure_as({1: 2, 64: 2}))
    assert sort(aiter) == 2
    assert (process.counts().chosen, process.counts().unknown) == (1, 1)
    process.uninstall()
    assert aiter.moe_sorting.__code__ == original
    assert sort(aiter) == 0
    process.install()
    assert sort(aiter) == 2  # tables are kept


def test_install_after_aiter_was_imported_wraps_at_once():
    aiter = load_aiter()
    process.install()
    process.install()
    sort(aiter)
    assert process.counts().total == 1


def test_uninstall_before_aiter_is_imported_keeps_it_unwrapped():
    process.install()
    process.uninstall()
    assert not hasattr(load_aiter().moe_sorting, "__wrapped__")


def test_the_environment_decides_between_measuring_and_a_fixed_policy(monkeypatch):
    monkeypatch.setenv(NEUTRAL, "1")
    aiter = load_aiter()
    process.install()
    assert sort(aiter, policy=2) == 1
    monkeypatch.setenv(NEUTRAL, "auto")
    process.install()  # with other settings: the old layer goes
    assert sort(aiter) == 0
    assert process.counts().total == process.counts().unknown == 1


def test_a_fixed_policy_is_one_line_that_names_who_asked_for_it(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv(NAME, "2")
    process.install()
    process.install()
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("adaptive_moe: ")]
    assert lines == [f"adaptive_moe: policy 2 for every call ({NAME}=2)"]


def test_a_bad_variable_is_one_warning_and_the_default(monkeypatch, caplog):
    monkeypatch.setenv("ADAPTIVE_MOE_BUDGET_S", "fast")
    monkeypatch.setenv("ADAPTIVE_MOE_BUGET_S", "3")
    assert process.install()
    assert process.install()
    assert process.current().settings.budget_s == 1.5
    first, second = [r.message for r in caplog.records]
    assert "ADAPTIVE_MOE_BUDGET_S='fast' is not accepted" in first
    assert second.endswith("did you mean ADAPTIVE_MOE_BUDGET_S?")


@pytest.mark.parametrize("name", [NAME, NEUTRAL])
def test_off_is_off_for_install_too(monkeypatch, name, caplog):
    monkeypatch.setenv(name, "off")
    aiter = load_aiter()
    assert process.install() is False
    assert caplog.messages == ["nothing is changed: the environment switches adaptive_moe off"]
    assert not hasattr(aiter.moe_sorting, "__wrapped__")


def test_warm_up_without_install_does_nothing():
    assert process.warm_up(64).tables == {}
    assert process.counts().total == 0


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"aiter/__init__.py": ""}, "PyPI's unrelated package"),
        (
            {"aiter/__init__.py": "", "aiter/fused_moe.py": "def moe_sorting(topk_ids): ..."},
            "takes no dispatch_policy",
        ),
        (
            {
                "aiter/__init__.py": "raise RuntimeError('imported')",
                "aiter/fused_moe.py": "def moe_sorting(dispatch_policy): ...",
            },
            None,
        ),
    ],
)
def test_pypis_and_old_aiters_are_told_from_ours(package, monkeypatch, files, says):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(ROOT)])
    package(files)
    problem = find_aiter().problem
    assert (problem is None) if says is None else (says in problem and "ROCm/aiter" in problem)


def test_a_missing_aiter_is_said_and_changes_nothing(monkeypatch, caplog):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(ROOT)])
    assert process.install() is False
    assert caplog.messages == ["nothing is changed: AITER is not installed (no module named aiter)"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"max_tokens": "8"}, "max_tokens='8'"),
        ({"max_tokens": 8.5}, "max_tokens=8.5"),
        ({"max_tokens": 8, "capture_sizes": 8}, "capture_sizes=8"),
        ({"max_tokens": 8, "capture_sizes": [1, -5]}, "capture_sizes=-5"),
        ({"max_tokens": 8, "busy_from": 0}, "busy_from=0"),
    ],
)
def test_a_warm_up_for_what_is_no_token_count_is_refused(arguments, named):
    with pytest.raises(ValueError, match=f"^{named} is not accepted: give "):
        process.warm_up(**arguments)


def test_settings_are_settings():
    with pytest.raises(
        ValueError, match=r"settings='auto' is not accepted: give adaptive_moe\.Settings"
    ):
        process.install("auto")


def test_an_aiter_that_cannot_be_looked_at_is_said_and_changes_nothing(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "aiter", SimpleNamespace(__spec__=None))
    assert process.install() is False
    assert "nothing is changed: AITER cannot be looked at: ValueError" in caplog.text


def test_aiter_loaded_anew_is_wrapped_anew():
    """Nothing of ours survives importlib.reload in a module."""
    aiter = load_aiter()
    process.install()
    sort(aiter)
    warm_up_hook(process.current(), Batches(64), measure=measure_as({1: 2, 64: 2}))
    for _ in range(2):
        importlib.reload(aiter)
        assert sort(aiter) == 2
    assert process.current().wrapped.module is aiter
    process.uninstall()
    importlib.reload(aiter)
    assert sort(aiter) == 0
    assert not hasattr(aiter.moe_sorting, "__wrapped__")


def test_a_child_forked_during_a_warm_up_can_warm_up():
    """The thread that holds the locks is not in the child."""
    process.install()
    hook = process.current()
    locks = (hook.warming, hook._lock, process._lock, plugin._finder.lock)
    held, over = threading.Event(), threading.Event()

    def hold():
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a child that hangs
        status = 1
        with contextlib.suppress(BaseException):
            process.warm_up(64)
            process.install()
            process.counts()
            status = 0
        os._exit(status)
    over.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
