"""What each table is for: the counts that occur with its key, and no others."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptive_moe.engines.block_sizes import Piece, VllmInt4
from adaptive_moe.engines.wanted import Batches, coverages
from adaptive_moe.kernels.aiter import SortRequest
from adaptive_moe.kernels.call import Buffer
from adaptive_moe.policy.coverage import BUSY_FROM, MAX_TOKENS
from tests.engines.seen import aiter_module, hook_with, seen_call
from tests.tables import make_table

GPU = {"device": 0}


def by_block(hook, batches):
    wanted, problems = coverages(hook, batches)
    assert problems == []
    return {one.key.block_size: one.coverage for one in wanted}


def block_at(padded):
    return 32 if padded <= 64 else 64 if padded <= 1024 else 128


# Spans of counts


@pytest.mark.parametrize("seen", [64, MAX_TOKENS + 64])
def test_batches_that_no_table_can_cover_are_covered_as_far_as_one_can(seen):
    """Of 64 ranks that gather their tokens."""
    batches = Batches(32768, captured=(512, 32768), pooled=64)
    (coverage,) = by_block(hook_with(seen_call(seen, **GPU)), batches).values()
    assert coverage.eager == ((1, MAX_TOKENS),)
    assert coverage.captured == (32768,)


def test_each_block_size_covers_exactly_the_counts_that_bring_it():
    hook = hook_with(seen_call(2000, block_size=128, **GPU), module=aiter_module(block_at))
    found = by_block(hook, Batches(5000, captured=(1, 8, 64, 65, 512)))
    assert {block: c.eager for block, c in found.items()} == {
        32: ((1, 64),),
        64: ((65, 1024),),
        128: ((1025, 5000),),
    }
    assert {block: c.captured for block, c in found.items()} == {
        32: (1, 8, 64),
        64: (65, 512),
        128: (),
    }


def test_one_block_size_can_have_several_spans():
    hook = hook_with(
        seen_call(8, **GPU), module=aiter_module(lambda padded: 64 if 64 < padded <= 256 else 32)
    )
    found = by_block(hook, Batches(1000))
    assert found[32].eager == ((1, 64), (257, 1000))
    assert found[64].eager == ((65, 256),)


def test_aiter_is_asked_once_a_padded_class():
    log = []
    hook = hook_with(seen_call(8, **GPU), module=aiter_module(block_at, log=log))
    by_block(hook, Batches(16384))
    assert log == [16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]


@given(
    st.lists(st.integers(1, 4000), min_size=1, max_size=6, unique=True),
    st.integers(1, 4000),
    st.integers(1, 4000),
)
def test_every_count_is_covered_by_the_block_it_comes_with(edges, last, seen):
    """Whatever AITER's classes and choices are."""
    edges = sorted({*edges, 4096})

    def pad(count):
        return next(edge for edge in edges if edge >= count)

    def block(padded):
        return (16, 32, 64)[padded % 3]

    hook = hook_with(
        seen_call(seen, block_size=block(pad(seen)), **GPU), module=aiter_module(block, pad)
    )
    found = by_block(hook, Batches(last))
    for count in range(1, max(last, seen) + 1):
        covering = {size for size, c in found.items() if any(a <= count <= b for a, b in c.eager)}
        assert covering == {block(pad(count))}


def test_counts_at_which_aiter_does_not_sort_are_left_out():
    module = aiter_module(block_at)
    choose = module.get_2stage_cfgs
    module.get_2stage_cfgs = lambda padded: SimpleNamespace(
        **{**vars(choose(padded)), "flat": padded == 16}
    )
    hook = hook_with(seen_call(64, **GPU), module=module)
    assert by_block(hook, Batches(64, captured=(1, 32)))[32].eager == ((17, 64),)
    assert by_block(hook, Batches(64, captured=(1, 32)))[32].captured == (32,)


@pytest.mark.parametrize("why", ["another block", "no configuration", "it raises", "no classes"])
def test_where_aiter_does_not_explain_what_was_seen_only_that_is_known(why, caplog):
    caplog.set_level(logging.DEBUG, "adaptive_moe")
    module = aiter_module(block_at)
    seen = seen_call(8, **GPU)
    if why == "another block":
        seen = seen_call(8, block_size=16, **GPU)
    elif why == "no configuration":
        seen = seen_call(8, config=None, **GPU)
    elif why == "it raises":
        module.get_2stage_cfgs = lambda *args: 1 / 0
    else:
        del module.get_padded_M
    found = by_block(hook_with(seen, module=module), Batches(4096))
    assert list(found) == [seen.key.block_size]
    assert found[seen.key.block_size].eager == ((1, 4096),)
    error = "ZeroDivisionError('division by zero')"
    said = f"block sizes at other token counts are not known: {error}"
    assert caplog.messages == ([said] if why == "it raises" else [])


def test_aiters_own_tuner_is_not_set_off(monkeypatch):
    monkeypatch.setenv("AITER_ONLINE_TUNE", "1")
    log = []
    hook = hook_with(seen_call(8, **GPU), module=aiter_module(block_at, log=log))
    assert list(by_block(hook, Batches(4096))) == [32]
    assert log == []


def test_a_rank_whose_layer_stood_aside_names_its_tables_as_the_others_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiter.fused_moe", aiter_module(block_at))
    found = by_block(hook_with(seen_call(8, **GPU)), Batches(1024))
    assert {block: c.eager for block, c in found.items()} == {32: ((1, 64),), 64: ((65, 1024),)}


def test_the_chooser_is_asked_where_the_call_ran():
    asked_on = []
    module = aiter_module(lambda padded: asked_on.append(torch.is_inference_mode_enabled()) or 32)
    by_block(hook_with(seen_call(8, inference=True), module=module), Batches(16))
    assert asked_on == [True]


# Captured sizes and pooling


@pytest.mark.parametrize("seen", [8192, 16384])
def test_a_first_forward_that_is_a_multiple_of_max_tokens_multiplies_nothing(seen):
    hook = hook_with(seen_call(seen, **GPU))
    found = by_block(hook, Batches(4096, captured=(1, 8)))
    assert found[32].captured == (1, 8)
    assert found[32].eager == ((1, seen),)


def test_pooled_ranks_multiply_batches_and_captured_sizes():
    hook = hook_with(seen_call(4096, **GPU))
    found = by_block(hook, Batches(2048, captured=(1, 8), pooled=4))
    assert found[32].captured == (4, 32)
    assert found[32].eager == ((1, 8192),)


def test_a_layer_whose_rows_are_no_multiple_is_not_pooled():
    hook = hook_with(seen_call(2047, **GPU))
    assert by_block(hook, Batches(2048, captured=(8,), pooled=4))[32].captured == (8,)


def test_padded_layers_are_captured_at_their_capacity_too():
    seen = seen_call(1024, has_num_local_tokens=True, **GPU)
    assert by_block(hook_with(seen), Batches(64, captured=(1, 8)))[32].captured == (1, 8, 1024)
    assert by_block(hook_with(seen), Batches(64))[32].captured == ()


# From which count on the device is busy


@pytest.mark.parametrize(
    ("batches", "busy_from"),
    [
        (Batches(4096), BUSY_FROM),
        (Batches(4096, captured=(1, 512)), 513),
        (Batches(4096, captured=(1, 512), busy_from=1), 1),
        (Batches(4096, captured=(1, 512), pooled=2), 1025),
    ],
)
def test_busy_from_is_above_the_captured_sizes_unless_somebody_knows_better(batches, busy_from):
    assert by_block(hook_with(seen_call(8, **GPU)), batches)[32].busy_from == busy_from


# What else tells tables apart


def test_baseline_padding_rows_and_extras_are_part_of_it():
    seen = seen_call(8, baseline=2, local_ids=True, **GPU)
    (one,), _ = coverages(hook_with(seen), Batches(64, padding_rows=True))
    assert one.coverage.baseline == "policy 2"
    assert one.coverage.padding_rows
    assert "return_local_topk_ids" in one.coverage.extras


def test_the_experts_that_a_mask_keeps_are_part_of_it():
    mask = torch.tensor([1, 0, 2, -1] * 4, dtype=torch.int32)
    (one,), _ = coverages(hook_with(seen_call(8, expert_mask=mask)), Batches(64))
    assert one.coverage.shape.local_experts == 12


def test_what_no_shape_has_is_said_with_its_name():
    extras = {
        "accumulate": True,
        "order": "rising",
        "fast": False,
        "hint": None,
        "output": Buffer((64,), torch.bfloat16),
    }
    seen = seen_call(8, more=("rising", False, None, "output"), extras=extras)
    (one,), _ = coverages(hook_with(seen), Batches(64))
    assert one.coverage.describe().endswith("block 32, order=rising,fast=False,output=given")


def test_layers_on_two_gpus_get_a_table_each():
    hook = hook_with(seen_call(8, device=0), seen_call(8, device=1))
    wanted, _ = coverages(hook, Batches(64))
    assert [one.key.device for one in wanted] == [0, 1]
    assert [one.seen.device.index for one in wanted] == [0, 1]


def test_a_layer_that_cannot_be_understood_costs_only_itself():
    hook = hook_with(seen_call(8, num_experts=4096), seen_call(8, model_dim=128))
    wanted, (problem,) = coverages(hook, Batches(64))
    assert [one.key.model_dim for one in wanted] == [128]
    assert "num_experts=4096" in problem


def test_decode_and_prefill_of_one_layer_are_one_table_a_block():
    hook = hook_with(
        seen_call(8, **GPU), seen_call(4096, block_size=128, **GPU), module=aiter_module(block_at)
    )
    wanted, _ = coverages(hook, Batches(2048))
    assert sorted(one.key.block_size for one in wanted) == [32, 64, 128]
    # The call that came with that very block shows how it is made.
    assert {one.key.block_size: one.seen.num_tokens for one in wanted} == {32: 8, 64: 8, 128: 4096}
    assert next(o for o in wanted if o.key.block_size == 128).coverage.eager == ((1025, 4096),)


def test_later_arguments_tell_tables_apart_by_value_and_not_by_address():
    """Else each start would have a table of its own."""
    by_extras = [
        coverages(hook_with(seen_call(8, extras={"order": order}, **GPU)), Batches(64))[0]
        for order in ("rising", 7, object(), object())
    ]
    assert [one.coverage.extras for (one,) in by_extras] == [
        "order=rising",
        "order=7",
        "order=object",
        "order=object",
    ]


# Later warm-ups


def table_for(coverage):
    counts = [last for _, last in coverage.eager]
    return make_table(
        dict.fromkeys(counts, 1),
        dict.fromkeys(coverage.captured, 1) or None,
        coverage=coverage,
    )


def test_what_is_covered_is_not_wanted_again():
    hook = hook_with(seen_call(8, **GPU))
    (first,), _ = coverages(hook, Batches(512, captured=(1, 8)))
    hook.tables = {first.key: table_for(first.coverage)}
    assert coverages(hook, Batches(512, captured=(1, 8))) == ([], [])
    assert coverages(hook, Batches(100, captured=(8,))) == ([], [])


@pytest.mark.parametrize(
    ("batches", "eager", "captured"),
    [
        (Batches(4096), ((1, 4096),), (1, 8)),
        (Batches(512, captured=(2, 16)), ((1, 512),), (1, 2, 8, 16)),
    ],
)
def test_larger_batches_and_other_sizes_extend_what_is_there(batches, eager, captured):
    hook = hook_with(seen_call(8, **GPU))
    (first,), _ = coverages(hook, Batches(512, captured=(1, 8)))
    table = table_for(first.coverage)
    hook.tables = {first.key: table}
    (more,), _ = coverages(hook, batches)
    assert (more.coverage.eager, more.coverage.captured) == (eager, captured)
    assert more.earlier is table


def test_rows_that_may_be_padding_stay_covered():
    hook = hook_with(seen_call(8, **GPU))
    (first,), _ = coverages(hook, Batches(512))
    hook.tables = {first.key: table_for(first.coverage)}
    (padded,), _ = coverages(hook, Batches(512, padding_rows=True))
    assert (first.coverage.padding_rows, padded.coverage.padding_rows) == (False, True)
    hook.tables = {first.key: table_for(padded.coverage)}
    assert coverages(hook, Batches(512)) == ([], [])


def test_a_larger_batch_that_was_seen_since_extends_it_too():
    hook = hook_with(seen_call(8))
    (first,), _ = coverages(hook, Batches(512))
    hook.tables = {first.key: table_for(first.coverage)}
    hook.seen = {first.key: seen_call(1000)}
    (more,), _ = coverages(hook, Batches(512))
    assert more.coverage.eager == ((1, 1000),)


# Layers that do not ask AITER for their block_size


def flydsl(counts):
    """vLLM's module: tiles by token count, of which the nearest count's are used."""
    config = {count: {"tile_m": tile} for count, tile in counts.items()}
    return SimpleNamespace(try_get_optimal_config=lambda num_experts, inter_dim: config)


INT4 = {1: 16, 512: 16, 1024: 32, 2048: 64, 4096: 32, 8192: 64}


@pytest.mark.parametrize(("seen", "block"), [(8, 16), (8192, 64)])
def test_vllms_int4_layers_are_covered_at_all_their_block_sizes(seen, block):
    module = flydsl(INT4)
    chooser = VllmInt4(module)
    module.try_get_optimal_config(16, 512)
    hook = hook_with(seen_call(seen, block_size=block, dtype=torch.float16, **GPU))
    found = by_block(hook, Batches(8192, choosers=(chooser,)))
    assert {size: c.eager for size, c in found.items()} == {
        16: ((1, 768),),
        32: ((769, 1536), (3073, 6144)),
        64: ((1537, 3072), (6145, 8192)),
    }


@given(st.dictionaries(st.integers(1, 3000), st.sampled_from([16, 32, 64]), min_size=1, max_size=6))
def test_the_pieces_are_those_that_vllm_picks(counts):
    module = flydsl(dict(sorted(counts.items())))
    chooser = VllmInt4(module)
    config = module.try_get_optimal_config(16, 512)
    picked = config[min(config, key=lambda count: abs(count - 8))]["tile_m"]
    pieces = chooser(seen_call(8, block_size=picked), 4000)
    assert [p.first for p in pieces] == [1, *(p.last + 1 for p in pieces[:-1])]
    assert pieces[-1].last == 4000
    for piece in pieces:
        for count in (piece.first, piece.last):
            nearest = min(config, key=lambda known: abs(known - count))
            assert config[nearest]["tile_m"] == piece.request.block_size


def test_a_piece_may_be_a_single_count():
    module = flydsl({1: 16, 2: 32, 5: 64})
    chooser = VllmInt4(module)
    module.try_get_optimal_config(16, 512)
    pieces = chooser(seen_call(1, block_size=16), 9)
    assert [(p.first, p.last, p.request.block_size) for p in pieces] == [
        (1, 1, 16),
        (2, 3, 32),
        (4, 9, 64),
    ]


@pytest.mark.parametrize(
    "call",
    [
        {"num_experts": 32},
        {"block_size": 128},
        {"expert_mask": torch.ones(16, dtype=torch.int32)},
    ],
)
def test_other_layers_are_none_of_its_business(call):
    module = flydsl(INT4)
    chooser = VllmInt4(module)
    module.try_get_optimal_config(16, 512)
    assert chooser(seen_call(8, **{"block_size": 16, **call}), 4096) is None


def test_tiles_are_snapped_as_vllm_snaps_them():
    module = flydsl({1: 24})
    tiles = {"tile_m": 24, "tile_n": 1, "tile_k": 2, "tile_n2": 3, "tile_k2": 4}
    module.try_get_optimal_config = lambda num_experts, inter_dim: {1: tiles}
    module._snap_flydsl_int4_tiles = lambda m, n, k, n2, k2: (16, n, k, n2, k2)
    chooser = VllmInt4(module)
    module.try_get_optimal_config(16, 512)
    assert chooser(seen_call(8, block_size=16), 100) == [
        Piece(1, 100, SortRequest(16, accumulate=True, sorts=True))
    ]


def test_a_long_argument_is_told_from_others_in_few_words():
    """A text of more than plain.MAX_TEXT would be stored and never read again."""
    found = [
        coverages(hook_with(seen_call(8, extras={"order": "y" * 5000 + last}, **GPU)), Batches(64))
        for last in ("1", "2", "1")
    ]
    first, other, same = ([one.coverage.extras for one in wanted] for wanted, _ in found)
    assert first == same != other
    assert len(first[0]) < 100
