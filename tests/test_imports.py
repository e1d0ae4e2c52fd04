"""What importing costs, and what the package promises to export."""

import subprocess
import sys

import pytest

import adaptive_moe

HEAVY = ("torch", "numpy", "vllm", "sglang", "aiter", "triton", "matplotlib")


def modules_after(statement: str) -> set[str]:
    """Names of HEAVY that a fresh process has loaded after the statement."""
    code = f"import sys\n{statement}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import adaptive_moe",
        "from adaptive_moe import read_settings; read_settings({})",
        "import adaptive_moe.policy.decision, adaptive_moe.policy.buckets",
        "import adaptive_moe.tuning.explore",
        "from adaptive_moe import PolicyTable, SortingShape",
        "import adaptive_moe.disk.folder",
    ],
)
def test_nothing_heavy_is_imported_by(statement):
    assert modules_after(statement) == set()


def test_the_probe_itself_sees_torch():
    assert "torch" in modules_after("from adaptive_moe import calibrate")


def test_every_public_name_resolves_and_no_other():
    for name in adaptive_moe.__all__:
        assert getattr(adaptive_moe, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        adaptive_moe.nonsense  # noqa: B018
