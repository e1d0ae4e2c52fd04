"""No test reads or leaves anything in the user's own cache folder."""

import contextlib

import pytest

# The environments of tests/contract/ have no hypothesis.
with contextlib.suppress(ImportError):
    from hypothesis import Phase, settings

    # `make mutants`: the same examples for every mutant, and none made smaller.
    settings.register_profile(
        "mutants",
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
