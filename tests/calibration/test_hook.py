"""calibration.hook and calibration.startup: what is compared with what."""

from argparse import ArgumentParser
from types import ModuleType

import pytest
import torch

from calibration import hook, seams, startup
from calibration.timing import AS_IT_COMES

CALL = (256, 7168, torch.bfloat16, 32, None, None, 0)


@pytest.fixture
def seam():
    """A module, what reaches its sort, and one call of it."""
    module, log = ModuleType("seam"), []

    def moe_sorting(
        topk_ids, topk_weights, num_experts, model_dim, moebuf_dtype, block_size=32,
        expert_mask=None, num_local_tokens=None, dispatch_policy=0, flat=False,
    ):  # fmt: skip
        log.append(dispatch_policy)

    module.moe_sorting = moe_sorting
    ids = torch.zeros((8, 8), dtype=torch.int32)
    return module, log, lambda **more: module.moe_sorting(ids, ids.float(), *CALL, **more)


def test_a_hooked_function_sorts_by_the_table_and_goes_again(seam):
    module, log, call = seam
    bare = module.moe_sorting
    with hook.hooked(module, call, {hook.LAST: 2}, None) as wrapper:
        call()
        module.moe_sorting = bare
        call()
        module.moe_sorting = wrapper
        call()
        call(flat=True)
        module.moe_sorting = bare
    assert log == [0, 2, 0, 2, 0]  # the first is seen; flat leaves nothing to choose
    assert module.moe_sorting is bare


def test_what_is_added_is_a_mean_within_rounds_of_us_a_call():
    found = hook.added({"bare": lambda: 40.0, "hooked": lambda: 48.0}, 0.0, 8)
    assert found == {"mean_us": 1.0, "interval_us": [1.0, 1.0], "bare_us": 5.0}


def test_a_rehearsal_on_the_cpu_has_every_case():
    parser = ArgumentParser()
    hook.add_options(parser)
    words = ["--kernel", "cpu", "--model", "qwen3-30b", "--counts", "2", "--layers", "1"]
    found = hook.run(parser.parse_args([*words, "--seconds", "0", "--calls", "20"]))
    assert set(found["step"]) == {"stays", "chooses", "asks"}
    assert list(found["step"]["stays"]["2"]) == [AS_IT_COMES]
    assert set(found["loop"]["calls"]) == {"stays", "chooses", "asks"}
    assert set(found["loop"]["nothing to choose"]) == {"flat", "output_aux", "empty"}


def test_a_warm_start_is_timed_apart_from_the_one_that_measures(monkeypatch):
    parser = ArgumentParser()
    startup.add_options(parser)
    args = parser.parse_args(["--kernel", "cpu", "--models", "mixtral-8x7b"])
    args.max_tokens, args.budget, args.repeats = 4, 0.2, 1
    made = seams.open_seam("cpu")
    found = startup.warm_start(made, args)
    assert min(found["warm"], found["cold"]) > 0.0
    shapes = startup.calibrations(made, args)["shapes"]
    assert [len(times) for times in shapes["mixtral-8x7b"]["seconds"].values()] == [1, 1]


def test_register_imports_nothing_heavy():
    assert startup.in_process(startup.REGISTER)["heavy_modules"] == []
