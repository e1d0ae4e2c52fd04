"""The hook in AMD's own package of AITER; run.py runs it.

AITER's Python runs as it is, from fused_moe down to where it calls what it compiled: its sort and
its GEMMs, in whose place compiled/ has a sort on the CPU and stages that only read what it wrote.
"""

import shutil
import sys
from importlib.metadata import packages_distributions
from types import SimpleNamespace

import pytest
import torch

import adaptive_moe

EXPERTS, TOPK, INTER = 32, 4, 1024
MAX_TOKENS = 1024
CAPTURE_SIZES = (1, 8, 64)
# What AITER's own chooser says for this layer on an MI300X, by token count.
BLOCK_SIZES = {1: 32, 8: 32, 33: 64, 64: 64, 65: 128, 100: 128, 129: 32, 500: 64, MAX_TOKENS: 128}


@pytest.fixture(scope="module")
def aiter():
    """AITER's module of the seam, and what stands in place of its compiled sort."""
    import gemms
    import module_moe_sorting

    # What AITER would have compiled for unquantised layers: both stages in one, and two stages.
    sys.modules["module_moe_asm"] = gemms
    two_stages = "module_moe_ck2stages_b16_b16_preshuffle_off_b16_silu_no_mulWeightStage2"
    sys.modules[two_stages] = gemms
    import aiter.fused_moe

    torch.set_num_threads(
        1
    )  # as engines' workers have it; two wait for each other on a busy machine
    return SimpleNamespace(module=aiter.fused_moe, sort=module_moe_sorting)


@pytest.fixture(autouse=True)
def undone(aiter, tmp_path, monkeypatch):
    """Each test begins with AITER as it is, and with nothing stored."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ADAPTIVE_MOE_BUDGET_S", "30")  # for a busy machine; it ends when settled
    yield
    adaptive_moe.uninstall()
    aiter.sort.slow.clear()
    aiter.sort.broken.clear()


def forward(aiter, num_tokens, *, dim, gated=True, **passed):
    """One unquantised layer through AITER's own fused_moe; what arrived at the compiled sort.

    Tests have different values of `dim`: a shape of one has no table from another.
    """
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand((num_tokens, EXPERTS), generator=generator).argsort(1)[:, :TOPK]
    weights = torch.rand((num_tokens, TOPK), generator=generator)
    zero = torch.zeros((), dtype=torch.bfloat16)
    before = len(aiter.sort.calls)
    result = aiter.module.fused_moe(
        zero.expand(num_tokens, dim),
        zero.expand(EXPERTS, INTER * (2 if gated else 1), dim),
        zero.expand(EXPERTS, dim, INTER),
        weights,
        ids.int().contiguous(),
        **passed,
    )
    (call,) = aiter.sort.calls[before:]
    assert call.num_tokens == num_tokens
    expected = weights.sum(1, keepdim=True).bfloat16().expand(num_tokens, dim)
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)
    return call


def test_this_is_amds_package_and_not_pypis_aiter(aiter):
    assert packages_distributions()["aiter"] == ["amd-aiter"]
    assert adaptive_moe.install()


@pytest.mark.parametrize("gated", [True, False])
def test_a_tables_policy_arrives_at_the_compiled_sort(aiter, gated):
    """With a gate AITER runs two stages here, without one both in one for small batches."""
    dim = 64 if gated else 72
    assert adaptive_moe.install()
    assert forward(aiter, MAX_TOKENS, dim=dim, gated=gated).policy == 0
    aiter.sort.slow |= {0, 1}
    made = adaptive_moe.warm_up(MAX_TOKENS, CAPTURE_SIZES).tables
    tables = {key.block_size: table for key, table in made.items() if key.model_dim == dim}
    before = adaptive_moe.counts()
    calls = [forward(aiter, count, dim=dim, gated=gated) for count in BLOCK_SIZES]
    found = [call.policy for call in calls]
    # A table's byte is an index into its candidates: the baseline, AITER's own rule, and 1 and 2.
    decided = [tables[call.block_size].eager[call.num_tokens] for call in calls]
    assert found == decided
    # On a busy machine a count may stay unsettled, and the baseline serves it.
    chosen = found.count(2)
    assert chosen > len(BLOCK_SIZES) / 2
    assert found.count(0) == len(BLOCK_SIZES) - chosen
    assert adaptive_moe.counts().chosen == before.chosen + chosen
    assert adaptive_moe.counts().unknown == before.unknown


def test_where_the_default_is_fastest_it_stays(aiter):
    assert adaptive_moe.install()
    forward(aiter, MAX_TOKENS, dim=80)
    aiter.sort.slow |= {1, 2}
    adaptive_moe.warm_up(MAX_TOKENS, CAPTURE_SIZES)
    already = {call.policy for call in aiter.sort.calls}
    assert already >= {0, 1, 2}  # they were measured
    assert [forward(aiter, count, dim=80).policy for count in BLOCK_SIZES] == [0] * 9


def test_uninstalled_aiter_is_as_it_was(aiter):
    as_packaged = aiter.module.moe_sorting
    assert adaptive_moe.install()
    forward(aiter, MAX_TOKENS, dim=88)
    aiter.sort.slow |= {0, 1}
    adaptive_moe.warm_up(MAX_TOKENS, CAPTURE_SIZES)
    assert forward(aiter, 8, dim=88).policy == 2
    adaptive_moe.uninstall()
    assert aiter.module.moe_sorting is as_packaged
    assert forward(aiter, 8, dim=88).policy == 0


def test_block_sizes_are_aiters_choice_by_count_and_each_is_measured(aiter):
    asked = [forward(aiter, count, dim=96).block_size for count in BLOCK_SIZES]
    assert asked == list(BLOCK_SIZES.values())
    assert adaptive_moe.install()
    forward(aiter, MAX_TOKENS, dim=96)
    aiter.sort.slow |= {0, 1}
    before = len(aiter.sort.calls)
    adaptive_moe.warm_up(MAX_TOKENS, CAPTURE_SIZES)
    assert {call.block_size for call in aiter.sort.calls[before:]} == {32, 64, 128}
    assert [forward(aiter, count, dim=96).block_size for count in BLOCK_SIZES] == asked


def test_only_counts_that_get_a_block_size_are_measured_with_it(aiter):
    assert adaptive_moe.install()
    forward(aiter, MAX_TOKENS, dim=104)
    aiter.sort.slow |= {0, 1}
    before = len(aiter.sort.calls)
    adaptive_moe.warm_up(MAX_TOKENS, CAPTURE_SIZES)
    chooser = aiter.module.get_block_size_M
    wrong = {
        (call.num_tokens, call.block_size)
        for call in aiter.sort.calls[before:]
        if call.block_size
        != chooser(aiter.module.get_padded_M(call.num_tokens), TOPK, EXPERTS, INTER)
    }
    assert not wrong


def test_a_callers_block_size_is_a_shape_of_its_own(aiter):
    assert adaptive_moe.install()
    assert forward(aiter, 64, dim=112, block_size_M=128).block_size == 128
    aiter.sort.slow |= {0, 1}
    adaptive_moe.warm_up(64, CAPTURE_SIZES)
    call = forward(aiter, 64, dim=112, block_size_M=128)
    assert (call.block_size, call.policy) == (128, 2)


def test_a_2_is_true_by_the_time_it_reaches_the_seam(aiter, monkeypatch):
    """This version's custom op has the policy as bool: what an engine means as multi-phase runs
    as one-shot. That is the baseline, and what is left untouched where nothing is known."""
    arrived = []
    real = aiter.module.moe_sorting

    def spy(*arguments, **keywords):
        arrived.append(arguments[8])
        return real(*arguments, **keywords)

    monkeypatch.setattr(aiter.module, "moe_sorting", spy)
    assert forward(aiter, 8, dim=120, moe_sorting_dispatch_policy=2).policy == 1
    assert adaptive_moe.install(engine_policy=2)
    assert forward(aiter, 8, dim=120, moe_sorting_dispatch_policy=2).policy == 1
    assert arrived == [True, True]
    assert all(type(policy) is bool for policy in arrived)


def test_an_engines_2_is_measured_against_what_it_runs_as(aiter):
    assert adaptive_moe.install(engine_policy=2)
    forward(aiter, MAX_TOKENS, dim=128, moe_sorting_dispatch_policy=2)
    aiter.sort.slow |= {0, 1}
    adaptive_moe.warm_up(MAX_TOKENS, CAPTURE_SIZES)
    calls = [forward(aiter, n, dim=128, moe_sorting_dispatch_policy=2) for n in (8, 100, 500)]
    assert [call.policy for call in calls] == [2, 2, 2]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), RuntimeError("no kernel")]
)
def test_an_error_in_the_compiled_sort_leaves_the_layer_serving(aiter, error):
    dim = 136 if isinstance(error, torch.OutOfMemoryError) else 144
    assert adaptive_moe.install()
    forward(aiter, MAX_TOKENS, dim=dim)
    aiter.sort.slow |= {0}
    aiter.sort.broken[2] = error
    adaptive_moe.warm_up(MAX_TOKENS, CAPTURE_SIZES)
    assert 2 not in {forward(aiter, count, dim=dim).policy for count in BLOCK_SIZES}


def test_a_masked_and_padded_call_keeps_its_arguments(aiter):
    mask = torch.ones(EXPERTS, dtype=torch.int32)
    local = torch.tensor([30], dtype=torch.int32)
    ids = torch.rand((64, EXPERTS)).argsort(1)[:, :TOPK].int().contiguous()
    weights = torch.rand((64, TOPK))

    def sort():
        arguments = (ids, weights, EXPERTS, 152, torch.bfloat16, 32, mask, local, 0)
        return aiter.module.moe_sorting(*arguments)

    assert adaptive_moe.install()
    before = sort()
    aiter.sort.slow |= {0, 1}
    adaptive_moe.warm_up(64, (64,))
    after = sort()
    assert aiter.sort.calls[-1].policy == 2
    assert aiter.sort.calls[-1].masked
    valid = int(before[3][0])
    for mine, aiters in zip(after, before, strict=True):
        assert mine.shape == aiters.shape
    assert after[3].tolist() == before[3].tolist() == [valid, 30]
    assert torch.equal(after[0][:valid], before[0][:valid])
    assert torch.equal(after[2][: valid // 32], before[2][: valid // 32])


def test_a_copied_cache_folder_is_what_the_next_start_finds(aiter, tmp_path, monkeypatch, caplog):
    # With such a margin every count is settled at once, on a busy machine, too.
    monkeypatch.setenv("ADAPTIVE_MOE_MARGIN", "0.5")
    monkeypatch.setenv("ADAPTIVE_MOE_BUDGET_S", "30")
    caplog.set_level("INFO", "adaptive_moe")
    for name, origin in (("a", "measured"), ("b", "stored")):
        monkeypatch.setenv("ADAPTIVE_MOE_CACHE_DIR", str(tmp_path / name))
        assert adaptive_moe.install()
        forward(aiter, MAX_TOKENS, dim=768)
        before = len(aiter.sort.calls)
        made = adaptive_moe.warm_up(MAX_TOKENS, CAPTURE_SIZES)
        assert set(made.origins.values()) == {origin}
        assert {key.block_size for key in made.tables} == set(BLOCK_SIZES.values())
        assert (len(aiter.sort.calls) == before) is (origin == "stored")
        assert caplog.text.count(f"table kept in {tmp_path / name}") == 3
        if name == "a":
            shutil.copytree(tmp_path / "a", tmp_path / "b")


def test_the_command_line_measures_amds_aiter(aiter, tmp_path, monkeypatch, capsys):
    from adaptive_moe.cli import main

    monkeypatch.setenv("ADAPTIVE_MOE_CACHE_DIR", str(tmp_path))
    layer = f"--experts {EXPERTS} --topk {TOPK} --hidden 768 --block-size 64"
    words = f"calibrate --kernel aiter {layer} --max-tokens 64 --capture-sizes none --budget 1"
    assert main(words.split()) == 0
    assert "block 64" in capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    assert "no-engine" in file.name
