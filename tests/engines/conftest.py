"""What tests of engines share: throw-away packages, and a process that nothing has set up."""

import importlib
import logging
import sys
import textwrap

import pytest

from adaptive_moe.engines import plugin, process, sglang, vllm
from adaptive_moe.settings import VARIABLES
from tests.aiter_standin.load import forget_aiter


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write files of throw-away packages, and make them importable while the test runs."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def fresh_process(tmp_path, monkeypatch):
    """No variable set but the cache folder, no AITER imported, no hook, nothing waited for or said;
    and none of it left behind."""
    monkeypatch.setattr(plugin._finder, "waiting", {})
    for name in (*(v.name for v in VARIABLES), sglang.SGLANG_VARIABLE, "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setattr(vllm, "KERNEL_WARMUP", "vllm.kernels")
    for module, name, value in (
        (process, "_hook", None),
        (process, "_engine", process.PLAIN),
        (process, "_said", set()),
        (sglang, "_seen_before", 0),
        (vllm, "_int4", []),
    ):
        monkeypatch.setattr(module, name, value)
    forget_aiter()
    ours = logging.getLogger("adaptive_moe")
    parent = ours.parent
    yield
    process.uninstall()
    forget_aiter()
    ours.parent = parent


@pytest.fixture
def cache(tmp_path):
    """The cache folder of a fresh_process."""
    return tmp_path / "cache" / "adaptive_moe"
