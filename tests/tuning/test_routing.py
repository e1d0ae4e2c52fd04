"""Synthetic routing: distinct experts, evenly or like trained routers, and nothing of the process
in it."""

import pytest
import torch
from torch import Tensor

from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.inputs import Routing, default_mask, route, sorting_inputs
from tests.tuning.engine import engine_defaults

CPU = torch.device("cpu")
SHAPE = SortingShape(16, 4, 8)
# More than are routed at a time.
ROWS = 5000


def counts(ids: Tensor) -> list[int]:
    return torch.bincount(ids.flatten(), minlength=16).tolist()


@pytest.mark.parametrize("routing", Routing)
def test_rows_name_distinct_experts_whatever_the_process_s_defaults(routing: Routing) -> None:
    usual = route(SHAPE, ROWS, routing, 3, CPU)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with engine_defaults():
        tokens = route(SHAPE, ROWS, routing, 3, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    ids, weights = tokens.topk_ids, tokens.topk_weights
    assert (ids.dtype, ids.device, ids.shape) == (torch.int32, CPU, (ROWS, 4))
    assert (weights.dtype, weights.device, weights.shape) == (torch.float32, CPU, (ROWS, 4))
    assert ids.min() >= 0
    assert ids.max() < 16
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    assert (weights.sum(1) - 1.0).abs().max() < 1e-6
    assert (weights > 0).all()
    # The same for a seed; another for another, where chance has a part in it.
    assert torch.equal(ids, usual.topk_ids)
    assert torch.equal(weights, usual.topk_weights)
    other = route(SHAPE, ROWS, routing, 4, CPU)
    assert torch.equal(ids, other.topk_ids) == (routing is Routing.ONE_EXPERT)
    assert not torch.equal(weights, other.topk_weights)


def test_uniform_rows_load_all_experts_alike() -> None:
    """Each has 1250 of them, give or take five standard deviations of 31."""
    found = counts(route(SHAPE, ROWS, Routing.UNIFORM, 1, CPU).topk_ids)
    assert all(abs(n - 1250) < 155 for n in found)


def test_skewed_rows_load_experts_as_one_over_their_rank() -> None:
    """Of a row's first draw, which is the best of all, the first rank has 1 / (1 + 1/2 + ... 1/16),
    30%, and the k-th a k-th of that. A seed says which expert has which rank."""
    first = route(SortingShape(16, 1, 8), 20_000, Routing.SKEWED, 1, CPU).topk_ids
    found = counts(first)
    shares = [n / 20_000 for n in sorted(found, reverse=True)]
    assert shares == pytest.approx([0.2958 / rank for rank in range(1, 17)], abs=0.012)
    again = counts(route(SortingShape(16, 1, 8), 20_000, Routing.SKEWED, 2, CPU).topk_ids)
    assert max(range(16), key=found.__getitem__) != max(range(16), key=again.__getitem__)


def test_all_rows_to_one_expert_are_all_to_the_first_ones() -> None:
    assert counts(route(SHAPE, 6, Routing.ONE_EXPERT, 1, CPU).topk_ids) == [6] * 4 + [0] * 12


@pytest.mark.parametrize(("local", "mask"), [(3, [1, 1, 1, 0, 0]), (5, [1] * 5), (None, None)])
def test_a_rank_s_mask_keeps_its_first_experts(local: int | None, mask: list[int] | None) -> None:
    with engine_defaults():
        found = default_mask(SortingShape(5, 2, 8, local_experts=local), CPU)
    assert (found if found is None else found.tolist()) == mask
    assert found is None or (found.dtype, found.device) == (torch.int32, CPU)


def test_a_sort_is_of_a_view_of_the_routed_rows_and_says_what_the_shape_says() -> None:
    tokens = route(SHAPE, 10, Routing.UNIFORM, 1, CPU)
    mask = torch.ones(16, dtype=torch.int32)
    with engine_defaults():
        one = sorting_inputs(SHAPE, tokens, 6, mask, first=3)
    assert one.topk_ids.data_ptr() == tokens.topk_ids[3].data_ptr()
    assert one.topk_weights.data_ptr() == tokens.topk_weights[3].data_ptr()
    assert len(one.topk_ids) == len(one.topk_weights) == 6
    told = (one.num_experts, one.model_dim, one.dtype, one.block_size, one.num_local_tokens)
    assert told == (16, 8, torch.bfloat16, SHAPE.block_size, None)
    assert one.expert_mask is mask
    assert sorting_inputs(SHAPE, tokens, 6, None).topk_ids.data_ptr() == tokens.topk_ids.data_ptr()


@pytest.mark.parametrize(("fill", "real"), [(1.0, 10), (0.54, 5), (0.56, 6), (0.01, 1)])
def test_rows_that_are_not_real_lie_behind_those_that_are(fill: float, real: int) -> None:
    tokens = route(SHAPE, 10, Routing.UNIFORM, 1, CPU)
    with engine_defaults():
        filled = sorting_inputs(SHAPE, tokens, 10, None, fill)
        counted = sorting_inputs(
            SortingShape(16, 4, 8, num_local_tokens=True), tokens, 10, None, fill
        )
    assert torch.equal(filled.topk_ids[:real], tokens.topk_ids[:real])
    assert (filled.topk_ids[real:] == -1).all()
    assert (tokens.topk_ids >= 0).all()
    local = counted.num_local_tokens
    assert local is not None
    assert (local.tolist(), local.dtype, local.device) == ([real], torch.int32, CPU)
    assert counted.topk_ids is not None
    assert (counted.topk_ids >= 0).all()


def test_all_rows_are_real_where_nothing_else_is_said() -> None:
    shape = SortingShape(16, 4, 8, num_local_tokens=True)
    one = sorting_inputs(shape, route(SHAPE, 10, Routing.UNIFORM, 1, CPU), 7, None)
    assert one.num_local_tokens is not None
    assert one.num_local_tokens.tolist() == [7]
