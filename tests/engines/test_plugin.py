"""What the engines' plugins are made of: waiting for an import, and wrapping what it brings."""

import importlib
from types import SimpleNamespace

import pytest

from adaptive_moe.engines import plugin
from adaptive_moe.engines.plugin import when_imported, wrap

pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.mark.parametrize("name", [plugin.VARIABLE, f"{plugin.PREFIX}BUDGET_S"])
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
    assert "could not start; vLLM goes on without it" in caplog.text


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


def test_actions_run_after_the_import_once_and_not_before(package):
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
    assert seen == [1, "at once"]


def test_a_failing_action_does_not_reach_the_importer(package, caplog):
    package({"waited_for.py": "value = 1"})
    when_imported("waited_for", lambda module: 1 / 0)
    assert importlib.import_module("waited_for").value == 1
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
