"""What the engines' plugins are made of: waiting for an import, and wrapping what it brings."""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from adaptive_moe.engines import plugin
from adaptive_moe.engines.plugin import safely, when_imported, wrap

pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.mark.parametrize("name", [plugin.VLLM_VARIABLE, f"{plugin.PREFIX}BUDGET_S"])
def test_a_plugin_starts_where_a_variable_of_ours_is_set_and_says_what_fails(
    monkeypatch, caplog, name
):
    started = []

    def register():
        started.append(name)
        raise RuntimeError("no such module")

    plugin.start(register, "vLLM")
    monkeypatch.setenv(name, "")
    plugin.start(register, "vLLM")
    assert started == []
    monkeypatch.setenv(name, "auto")
    plugin.start(register, "vLLM")
    assert started == [name]
    (line,) = caplog.records
    assert line.getMessage() == "adaptive_moe could not start; vLLM goes on without it"
    assert "RuntimeError: no such module" in caplog.text


def test_a_near_miss_of_our_variables_alone_is_said_and_starts_nothing(monkeypatch, caplog):
    monkeypatch.setenv("SGLANG_AITER_MOE_SORTING_DISPATCH_POLICY", "2")  # SGLang's own
    plugin.start(lambda: pytest.fail("it started"), "vLLM")
    assert caplog.records == []
    monkeypatch.setenv("VLLM_ROCM_AITER_MOE_DISPATCH_POLCY", "auto")
    plugin.start(lambda: pytest.fail("it started"), "vLLM")
    (line,) = caplog.records
    assert f"did you mean {plugin.VLLM_VARIABLE}?" in line.getMessage()


def test_what_a_warm_up_raises_is_said_and_goes_no_further(caplog):
    asked = []
    safely(lambda *arguments: asked.append(arguments), 1, "two")
    assert (asked, caplog.records) == ([(1, "two")], [])
    safely(lambda: 1 / 0)
    (line,) = caplog.records
    assert line.getMessage() == "warm-up failed; the baseline stays for what has no table"
    assert "ZeroDivisionError" in caplog.text


def test_a_failed_build_ends_no_engine_and_what_tells_it_to_end_does(caplog):
    def end(code):
        raise SystemExit(code)

    safely(end, "[aiter] build failed")
    assert "warm-up failed" in caplog.text
    for code in (None, 0, 1):
        with pytest.raises(SystemExit):
            safely(end, code)


def test_a_function_is_wrapped_once_and_a_missing_one_is_told():
    def twice(original):
        return lambda number: 2 * original(number)

    engine = SimpleNamespace(run=lambda number: number)
    original = engine.run
    assert wrap(engine, "run", twice)
    assert wrap(engine, "run", twice)
    assert engine.run(3) == 6
    assert engine.run.__wrapped__ is original
    assert not wrap(engine, "walk", twice)
    assert not wrap(None, "run", twice)


def test_actions_run_after_the_import_and_not_before_and_again_after_a_reload(package):
    package({"waited_for.py": "value = 1"})
    seen = []
    when_imported("waited_for", lambda module: seen.append(module.value))
    assert seen == []
    module = importlib.import_module("waited_for")
    assert seen == [1]
    assert module.__loader__.get_source("waited_for") == "value = 1"
    when_imported("waited_for", lambda module: seen.append("at once"))
    assert seen == [1, "at once"]
    importlib.reload(module)
    assert seen == [1, "at once", 1, "at once"]


def test_a_failing_action_does_not_reach_the_importer(package, caplog):
    package({"waited_for.py": "value = 1"})
    when_imported("waited_for", lambda module: 1 / 0)
    when_imported("waited_for", after := [].append)
    module = importlib.import_module("waited_for")
    assert module.value == 1
    assert after.__self__ == [module]
    (line,) = caplog.records
    said = f"adaptive_moe could not prepare {module!r} and leaves it alone"
    assert line.getMessage() == said
    assert "ZeroDivisionError" in caplog.text


def test_an_import_that_fails_is_waited_for_again(package, tmp_path):
    package({"waited_for.py": "raise ImportError('not yet')"})
    seen = []
    when_imported("waited_for", seen.append)
    with pytest.raises(ImportError, match="not yet"):
        importlib.import_module("waited_for")
    assert seen == []
    (tmp_path / "waited_for.py").write_text("value = 12345")
    assert importlib.import_module("waited_for").value == 12345
    assert len(seen) == 1


def test_a_module_that_does_not_exist_still_does_not(package):
    when_imported("no_such_module_here", print)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_here")


@pytest.mark.parametrize("module", [ModuleType("waited_for"), SimpleNamespace()])
def test_a_module_that_nobody_imported_is_there_already(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "waited_for", module)
    seen = []
    when_imported("waited_for", seen.append)
    assert seen == [module]


def test_what_is_asked_in_the_midst_of_the_import_waits_for_its_end(package):
    again = "when_imported('waited_for', lambda module: seen.append(module.value))"
    package(
        {
            "waited_for.py": f"""
                from asked_again import seen, when_imported
                {again}
                value = 1
            """,
            "asked_again.py": """
                from adaptive_moe.engines.plugin import when_imported
                seen = []
            """,
        }
    )
    seen = importlib.import_module("asked_again").seen
    when_imported("waited_for", lambda module: seen.append("first"))
    importlib.import_module("waited_for")
    assert seen == ["first", 1]


def test_a_module_that_is_executed_beside_the_imported_one_is_left_alone(package, caplog):
    """Whoever looks for a module may run what was found later, when it has been imported."""
    package({"waited_for.py": "value = 1"})
    seen = []
    when_imported("waited_for", seen.append)
    spec = importlib.util.find_spec("waited_for")
    module = importlib.import_module("waited_for")
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    assert (other.value, seen) == (1, [module])


def test_a_folder_without_code_is_imported_as_ever(package, caplog):
    package({"waited_for/inner.py": ""})
    when_imported("waited_for", print)
    assert list(importlib.import_module("waited_for").__path__)
    del sys.modules["waited_for"]
    assert caplog.records == []


class Slotted:
    """A loader that takes no other exec_module."""

    __slots__ = ()

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        module.value = 1

    def __repr__(self):
        return "<slotted>"


class Asked:
    """A finder of one module, and how it was asked for it."""

    def __init__(self):
        self.calls = []

    def find_spec(self, *call):
        self.calls.append(call)
        return ModuleSpec("inner.waited_for", Slotted()) if "waited_for" in call[0] else None


def test_a_module_that_cannot_be_watched_is_told_and_imported_all_the_same(
    package, monkeypatch, caplog
):
    """Other finders are asked as Python asks them, those of an older kind passed over."""
    package({"inner/__init__.py": ""})
    path = importlib.import_module("inner").__path__
    theirs, old_kind = Asked(), object()
    others = [finder for finder in sys.meta_path if finder is not plugin._finder]
    monkeypatch.setattr(sys, "meta_path", [old_kind, theirs, *others])
    when_imported("inner.waited_for", print)
    when_imported("inner.another", print)
    assert sys.meta_path == [plugin._finder, old_kind, theirs, *others]
    try:
        assert importlib.import_module("inner.waited_for").value == 1
    finally:
        sys.modules.pop("inner.waited_for", None)
    assert theirs.calls == [("inner.waited_for", path, None)]
    (line,) = caplog.records
    said = "module inner.waited_for cannot be watched: its loader is <slotted>"
    assert line.getMessage() == said
