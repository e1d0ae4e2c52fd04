"""No test reads or leaves anything in the user's own cache folder."""

import contextlib
import json
import os
import pathlib

import pytest

# The environments of tests/contract/ have no hypothesis.
with contextlib.suppress(ImportError):
    from hypothesis import Phase, settings

    # How long an example takes says nothing on a machine with other work.
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")

    # `make mutants`: the same examples for every mutant, and none made smaller.
    settings.register_profile(
        "mutants",
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
    )


def pytest_collection_modifyitems(items):
    """Of `make mutants`: the quickest tests first, as one that fails is enough. mutmut keeps what
    each took beside the tests that it copies."""
    stats = pathlib.Path("mutmut-stats.json")
    if "__mutmut_" in os.environ.get("MUTANT_UNDER_TEST", "") and stats.exists():
        took = json.loads(stats.read_text("utf-8"))["duration_by_test"]
        items.sort(key=lambda item: took.get(item.nodeid, 0.0))


@pytest.fixture(autouse=True)
def own_readers():
    """Of `make mutants`: each test makes the readers that it uses. Those kept by a test before have
    no mutant in them, nor would this test be known as one that may notice it."""
    if "MUTANT_UNDER_TEST" in os.environ:
        from adaptive_moe.store import plain

        plain._reader.cache_clear()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
