"""What importing costs, and what the package promises to export."""

import inspect
import pydoc
import subprocess
import sys
import typing

import pytest
import torch

import adaptive_moe
from adaptive_moe.engines.block_sizes import Piece
from adaptive_moe.engines.warm_up import WarmUp
from adaptive_moe.kernels.call import SortCall
from adaptive_moe.tuning.calibrate import Plan
from tests.tables import make_table

HEAVY = ("torch", "numpy", "vllm", "sglang", "aiter", "triton", "matplotlib")


def modules_after(statement: str) -> set[str]:
    """Names of HEAVY that a fresh process has loaded after the statement."""
    code = f"import sys\n{statement}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.processes
@pytest.mark.parametrize(
    "statement",
    [
        "import adaptive_moe",
        "from adaptive_moe import read_settings; read_settings({})",
        "import adaptive_moe.policy.verdict, adaptive_moe.policy.buckets",
        "from adaptive_moe import PolicyTable, SortingShape",
        "import adaptive_moe.store.tables",
    ],
)
def test_nothing_heavy_is_imported_by(statement):
    assert modules_after(statement) == set()


@pytest.mark.processes
def test_the_probe_itself_sees_torch():
    assert "torch" in modules_after("from adaptive_moe import calibrate")


def test_every_public_name_resolves_and_no_other():
    for name in adaptive_moe.__all__:
        assert getattr(adaptive_moe, name) is not None
    with pytest.raises(AttributeError) as refused:
        adaptive_moe.nonsense  # noqa: B018
    assert str(refused.value) == "module 'adaptive_moe' has no attribute 'nonsense'"


def test_dir_and_help_show_the_public_names():
    shown = [*adaptive_moe.__all__, "__doc__", "__file__", "__name__", "__path__"]
    assert dir(adaptive_moe) == sorted(shown)
    text = pydoc.plain(pydoc.render_doc(adaptive_moe))
    for name in ("warm_up(", "class PolicyTable", "load_kernel(", "class WarmUp", "class Mode"):
        assert name in text


def functions():
    return [
        f for name in adaptive_moe.__all__ if inspect.isfunction(f := getattr(adaptive_moe, name))
    ]


def ours(hint):
    """Classes of this package in a type, however deep."""
    if isinstance(hint, type) and hint.__module__.startswith("adaptive_moe"):
        yield hint
    for part in typing.get_args(hint):
        if isinstance(part, list):
            for one in part:
                yield from ours(one)
        else:
            yield from ours(part)


def test_whatever_a_public_function_takes_or_returns_is_public():
    public = [getattr(adaptive_moe, name) for name in adaptive_moe.__all__]
    seen = set()
    for function in functions():
        names = vars(sys.modules[function.__module__]) | {"dist": torch.distributed, "Piece": Piece}
        for hint in typing.get_type_hints(function, globalns=names).values():
            seen.update(ours(hint))
    seen -= {Piece, SortCall}  # of a chooser, which only an engine's plugin has
    assert {Plan, WarmUp} < seen
    assert [cls for cls in seen if cls not in public] == []


def test_public_functions_say_what_they_take_return_and_raise():
    for function in functions():
        doc = inspect.getdoc(function) or ""
        assert len(doc) > 40, function
        parameters = [p for p in inspect.signature(function).parameters if p != "environ"]
        if len(parameters) > 1:
            assert "Args:" in doc, function
            for parameter in parameters:
                assert f"{parameter}:" in doc, (function, parameter)


def test_reprs_are_short():
    table = make_table({1: 0, 64: 1}, graph={1: 2})
    made = WarmUp({}, (), 0.5)
    for thing in (
        table,
        table.evidence,
        table.evidence.eager[0],
        made,
        Plan(),
        adaptive_moe.Mode.AUTO,
    ):
        assert len(repr(thing)) < 200
