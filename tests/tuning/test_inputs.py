"""What a calibration sorts: how full, at which rows, and with rows of -1 where they occur."""

import pytest
import torch

from adaptive_moe.policy.coverage import Coverage, Situation
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.clocks import TRAIN_LENGTH
from adaptive_moe.tuning.inputs import CAPACITY_FILLS, PADDED_BELOW, Inputs

CPU = torch.device("cpu")
SHAPE = SortingShape(8, 2, 4, block_size=4)


def inputs(shape: SortingShape = SHAPE, captured: tuple[int, ...] = (), **other: bool) -> Inputs:
    return Inputs(Coverage.up_to(shape, 64, captured, **other), None, CPU)


@pytest.mark.parametrize(
    ("size", "real"),
    [(1, 1), (2, 2), (4, 3.5), (8, 6.5), (16, 12.5)],
)
def test_a_captured_size_is_filled_as_on_average_above_the_size_below(
    size: int, real: float
) -> None:
    sizes = (1, 2, 4, 8, 16)
    found = inputs(captured=sizes, padding_rows=True)
    assert found.fills(Situation.GRAPH, size) == (real / size,)
    # Not where nothing is filled up, and never for eager calls.
    assert found.fills(Situation.EAGER, size) == (1.0,)
    assert inputs(captured=sizes).fills(Situation.GRAPH, size) == (1.0,)


def test_a_capacity_is_measured_at_several_fills_in_every_situation() -> None:
    found = inputs(SortingShape(8, 2, 4, num_local_tokens=True), (8,), padding_rows=True)
    for situation in Situation:
        assert found.fills(situation, 8) == CAPACITY_FILLS
    assert found.train(Situation.EAGER, 64, 1 / 8)[0].num_local_tokens.tolist() == [8]  # type: ignore[union-attr]


def test_rows_that_are_not_real_lie_behind_the_others_and_have_ids_of_minus_one() -> None:
    found = inputs(captured=(8, 16), padding_rows=True)
    one = found.train(Situation.GRAPH, 16, 12.5 / 16)[3]
    assert one.num_local_tokens is None
    assert (one.topk_ids[:12] >= 0).all()
    assert (one.topk_ids[12:] == -1).all()
    # The routed rows themselves stay as they were.
    assert (found.train(Situation.GRAPH, 16, 1.0)[3].topk_ids >= 0).all()


@pytest.mark.parametrize("situation", Situation)
def test_the_calls_of_a_train_share_no_rows_as_long_as_there_are_enough(
    situation: Situation,
) -> None:
    train = inputs(captured=(4,)).train(situation, 4, 1.0)
    assert len(train) == TRAIN_LENGTH[situation]
    assert len({one.topk_ids.data_ptr() for one in train}) == len(train)
    # A batch as large as all rows has them all.
    for one in inputs().train(situation, 64, 1.0):
        assert len(one.topk_ids) == len(one.topk_weights) == 64


@pytest.mark.parametrize("topk", [1, 3, 6, 9])
def test_no_call_lacks_a_row_and_ids_begin_at_multiples_of_16_bytes(topk: int) -> None:
    """Kernels load several ids at once; a batch of an engine begins where its memory does."""
    found = inputs(SortingShape(16, topk, 4), captured=(64,))
    for num_tokens in range(1, 65):
        for one in found.train(Situation.GRAPH, num_tokens, 1.0):
            assert len(one.topk_ids) == len(one.topk_weights) == num_tokens
            offset = one.topk_ids.storage_offset() * one.topk_ids.element_size()
            assert offset % 16 == 0


def test_no_rows_of_minus_one_are_made_for_large_batches() -> None:
    """From 2,048 rows on AITER's kernels take them for indices."""
    sizes = (PADDED_BELOW - 8, PADDED_BELOW)
    coverage = Coverage.up_to(SHAPE, PADDED_BELOW, sizes, padding_rows=True)
    found = Inputs(coverage, None, CPU)
    for size, padded in zip(sizes, (True, False), strict=True):
        (fill,) = found.fills(Situation.GRAPH, size)
        train = found.train(Situation.GRAPH, size, fill)
        assert any(bool((one.topk_ids < 0).any()) for one in train) is padded


def test_every_other_call_is_routed_as_trained_routers_do() -> None:
    """Of 8 experts the most popular has a quarter of an even routing's entries more, at least; an
    even one's are all within that."""
    found = Inputs(Coverage.up_to(SHAPE, 4096), None, CPU)
    loads = [
        torch.bincount(one.topk_ids.flatten(), minlength=8).max().item() / (4096 * 2 / 8)
        for one in found.train(Situation.EAGER, 4096, 1.0)
    ]
    assert [load > 1.25 for load in loads] == [False, True, False, True]


def test_there_are_rows_for_the_largest_batch_eager_or_captured() -> None:
    assert inputs().rows == 64
    assert inputs(captured=(1, 96)).rows == 96
    assert Inputs(Coverage.up_to(SHAPE, 1), None, CPU).rows == 1
