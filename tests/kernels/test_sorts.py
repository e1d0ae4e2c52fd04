"""Which sorts are offered beside the baseline, and that one module and one line add another."""

import functools
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from adaptive_moe.kernels import sorts
from adaptive_moe.kernels.call import Buffer
from adaptive_moe.kernels.live import live_kernel
from adaptive_moe.kernels.sorts import GROUPS, REGISTRY, OtherSort, offered
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.shape import SortingShape
from tests.kernels.living import SHAPE, candidates, inputs, live


def names(found, wanted=("all",), shape=SHAPE, environ=None):
    return [sort.name for sort in offered(found, shape, wanted, environ or {})]


# Who may compete


def test_each_word_admits_its_sorts(with_flydsl):
    found = live(with_flydsl)
    policies = ["policy 0", "policy 1", "policy 2"]
    assert candidates(found, ("policies",)) == policies
    assert candidates(found, GROUPS["aiter"]) == [*policies, "ck", "flydsl"]
    triton = ["triton one-shot", "triton multi-phase"] if has_triton() else []
    assert candidates(found, GROUPS["all"]) == [*policies, "ck", "flydsl", *triton]
    assert candidates(found, ("flydsl",)) == ["policy 0", "flydsl"]


def has_triton():
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def test_the_baseline_comes_first_whatever_it_is(made):
    assert candidates(live(made, baseline=2), ("policies",)) == ["policy 2", "policy 0", "policy 1"]
    # AITER takes a True for a 1.
    found = candidates(live(made, baseline=True), ("policies",))
    assert found == ["policy True", "policy 0", "policy 2"]


def test_policy_1_is_not_tried_where_its_kernel_never_returns(made):
    def tried(num_experts, **how):
        coverage = Coverage.up_to(SortingShape(num_experts, 8, 7168), 64)
        return candidates(live(made, **how), ("policies",), coverage)

    assert tried(818) == ["policy 0", "policy 1", "policy 2"]
    assert tried(819) == ["policy 0", "policy 2"]
    assert tried(896, baseline=2) == ["policy 2", "policy 0"]


@pytest.mark.parametrize("variable", sorts.BACKEND_VARIABLES)
def test_a_backend_that_the_user_set_is_gone_beyond_only_by_all_or_a_name(with_flydsl, variable):
    found, environ = live(with_flydsl), {variable: "0"}
    assert names(found, GROUPS["aiter"], environ=environ) == []
    assert names(found, ("ck",), environ=environ) == ["ck"]
    assert "flydsl" in names(found, GROUPS["all"], environ=environ)


def test_opus_is_a_candidate_of_its_own_where_another_is_the_default(made):
    assert names(live(made), ("opus",)) == []
    made._USE_CK_MOE_SORTING = True
    assert names(live(made), ("opus",)) == ["opus"]


def test_opus_is_a_candidate_where_somebody_stands_in_its_place(made):
    own = made._moe_sorting_impl

    @functools.wraps(own)
    def small_batches(*args, **kwargs):
        return own(*args, **kwargs)

    made._moe_sorting_impl = small_batches
    for local_ids in (False, True):
        found = live(made, num_outputs=5 + local_ids, return_local_topk_ids=local_ids)
        (opus,) = offered(found, SHAPE, ("opus",), {})
        opus.call(*range(8), True)
        assert made.log.pop() == (0, True, local_ids, True)


# Only what is known


def test_an_argument_we_do_not_know_leaves_the_policies_only(with_flydsl):
    assert names(live(with_flydsl, accumulate=True, flat=False)) != []
    assert names(live(with_flydsl, invented=3)) == []
    assert names(live(with_flydsl, output=Buffer((7168,), torch.bfloat16))) == []
    assert candidates(live(with_flydsl, invented=3), GROUPS["all"])[1:] == ["policy 1", "policy 2"]


def test_an_implementation_we_do_not_know_is_not_called(made):
    own = made._moe_sorting_impl
    assert names(live(made), ("ck",)) == ["ck"]

    def another(topk_ids, topk_weights, use_opus):
        pass

    made._moe_sorting_impl = another
    assert names(live(made), ("ck",)) == []

    known = inspect.signature(own)
    invented = inspect.Parameter("invented", inspect.Parameter.KEYWORD_ONLY, default=0)
    later = functools.partial(own)
    later.__signature__ = known.replace(parameters=[*known.parameters.values(), invented])
    made._moe_sorting_impl = later
    assert names(live(made), ("ck",)) == []


def test_results_of_another_number_are_nobodys_else(with_flydsl):
    assert names(live(with_flydsl, num_outputs=7)) == []
    assert names(live(with_flydsl, num_outputs=0)) == []


def test_local_ids_are_opus_business(with_flydsl):
    with_flydsl._USE_CK_MOE_SORTING = True
    found = live(with_flydsl, num_outputs=6, return_local_topk_ids=True)
    assert names(found, ("ck", "flydsl", "triton one-shot")) == []
    # It is Opus that answers these, whatever the flag says.
    assert found.backend(0) == "opus"


def test_a_length_not_known_leaves_out_who_makes_its_own_buffers(with_flydsl):
    assert names(live(with_flydsl, rounded=None)) == ["ck"]


def test_our_sort_is_for_gpus_and_shapes_it_takes(made):
    pytest.importorskip("triton")
    ours = ("triton one-shot", "triton multi-phase")
    assert names(live(made), ours) == list(ours)
    assert names(live(made, device=torch.device("cpu")), ours) == []
    assert names(live(made), ours, SortingShape(1024, 16, 64, block_size=256)) == list(ours)
    assert names(live(made), ours, SortingShape(256, 8, 64, block_size=8)) == []
    assert names(live(made), ours, SortingShape(256, 8, 64, block_size=512)) == []


def test_ck_is_offered_where_it_is_built_or_can_be(made, tmp_path):
    assert names(live(made), ("ck",)) == ["ck"]
    built = tmp_path / "aiter" / "jit" / "module_moe_sorting.so"
    built.rename(built.with_name("module_moe_sorting_opus.so"))
    assert names(live(made), ("ck",)) == []
    header = "composable_kernel/example/ck_tile/13_moe_sorting/moe_sorting_api.hpp"
    source = tmp_path / "aiter_meta" / "3rdparty" / header
    source.parent.mkdir(parents=True)
    source.write_text("CK")
    assert names(live(made), ("ck",)) == ["ck"]


def test_a_flydsl_that_waits_for_the_device_is_not_offered_padded_rows(with_flydsl, tmp_path):
    padded = SortingShape(256, 8, 7168, num_local_tokens=True)
    assert names(live(with_flydsl), ("flydsl",), padded) == ["flydsl"]
    (tmp_path / "moe_sorting_kernel.py").write_text("num_local_tokens.item()\n")
    assert names(live(with_flydsl), ("flydsl",), padded) == []
    assert names(live(with_flydsl), ("flydsl",)) == ["flydsl"]


# How they are called


def test_backends_are_called_past_the_flags(made):
    made._USE_CK_MOE_SORTING = True
    found = {sort.name: sort for sort in offered(live(made), SHAPE, ("ck", "opus"), {})}
    for accumulate in (True, False):
        assert found["ck"].call(*range(8), accumulate) == "outputs"
        assert found["opus"].call(*range(8), accumulate) == "outputs"
    assert made.log == [
        (0, False, False, True),
        (0, True, False, True),
        (0, False, False, False),
        (0, True, False, False),
    ]
    assert made._USE_CK_MOE_SORTING is True


@pytest.mark.parametrize(("rounded", "length"), [(True, 288), (False, 266)])
@pytest.mark.parametrize(
    ("masked", "accumulate", "rows"), [(False, True, 6), (False, False, 0), (True, False, 6)]
)
def test_flydsl_gets_buffers_as_the_baseline_makes_them(
    with_flydsl, rounded, length, masked, accumulate, rows
):
    (flydsl,) = offered(live(with_flydsl, rounded=rounded), SHAPE, ("flydsl",), {})
    ids = torch.zeros((6, 2), dtype=torch.int32)
    mask = torch.ones(8, dtype=torch.int32) if masked else None
    arguments = (ids, torch.zeros((6, 2)), 8, 64, torch.float16, 32, mask, None)
    torch.set_default_dtype(torch.bfloat16)  # as ATOM does for the whole process
    try:
        outputs = flydsl.call(*arguments, accumulate)
    finally:
        torch.set_default_dtype(torch.float32)
    dtypes = [torch.int32, torch.float32, torch.int32, torch.int32, torch.float16]
    assert [o.dtype for o in outputs] == dtypes
    assert [len(o) for o in outputs] == [length, length, 9, 2, rows]
    (given,) = with_flydsl.kernels.sorted
    assert given[:2] == arguments[:2]
    assert all(a is b for a, b in zip(given[2:7], outputs, strict=True))
    assert given[7:] == (8, 32, mask, None, None)  # no workspace that others share


# Adding one


def test_one_module_and_one_line_add_a_sort(made, added):
    found = live(made, device=torch.device("cpu"))
    assert candidates(found, ("policies", "bitonic"))[-1] == "bitonic"
    kernel, serving = live_kernel(found, Coverage.up_to(SHAPE, 64), ("bitonic",))
    assert serving["bitonic"](1, 2)[0] == "bitonic"
    assert kernel.candidates[1].name == "bitonic"


@pytest.mark.parametrize("kind", ["missing", "raises"])
def test_a_module_that_fails_costs_its_own_sorts_only(made, added, monkeypatch, caplog, kind):
    if kind == "raises":
        module = ModuleType("somebodys.other")

        def sorts(live, shape):
            yield OtherSort("other", print, "other 1.0")
            raise RuntimeError("no such GPU")

        module.sorts = sorts
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(REGISTRY, "other", "somebodys.other")
    with caplog.at_level("WARNING", "adaptive_moe"):
        for _ in range(2):
            assert names(live(made), ("policies", "other", "bitonic")) == ["bitonic"]
    (line,) = [r.message for r in caplog.records if "somebodys.other" in r.message]
    assert "not offered" in line


def test_nobody_is_asked_who_is_not_admitted(made, monkeypatch):
    monkeypatch.setitem(REGISTRY, "bitonic", "a.module.that.is.not.there")
    assert "bitonic" not in candidates(live(made), ("policies",))


def test_what_measures_is_what_serves(made, added):
    kernel, serving = live_kernel(
        live(made, accumulate=False), Coverage.up_to(SHAPE, 64), ("bitonic",)
    )
    given = inputs()
    measured = kernel.candidates[1].bind(given)()
    assert measured == serving["bitonic"](*given.arguments(0)[:-1], False)


def test_a_package_of_its_own_registers_a_sort_by_an_entry_point(tmp_path):
    """Without a line in ours."""
    (tmp_path / "their_sorts.py").write_text("sorts = None")
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[adaptive_moe.sorts]\nbitonic = their_sorts\nopus = their_sorts\n"
    )
    code = (
        "from adaptive_moe.kernels.sorts import REGISTRY\n"
        "from adaptive_moe.settings import read_settings\n"
        "print(REGISTRY['bitonic'], REGISTRY['opus'])\n"
        "print(read_settings({'ADAPTIVE_MOE_SORTS': 'bitonic'}).sorts)\n"
        "print('bitonic' in read_settings({'ADAPTIVE_MOE_SORTS': 'all'}).sorts)\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])},
    )
    assert done.stdout.splitlines() == [
        "their_sorts adaptive_moe.kernels.aiter_sorts",
        "('bitonic',)",
        "True",
    ]
