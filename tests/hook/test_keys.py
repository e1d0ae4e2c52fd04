"""What tells the calls of one table from others."""

import pytest
import torch

from adaptive_moe.hook.entries import Entries
from adaptive_moe.kernels.call import CallKey
from tests.hook.hooking import (
    KEY,
    batch,
    installed,
    policy_of,
    policy_that_arrived,
    seam_of,
    sort_arguments,
)
from tests.tables import make_table

DIFFERENT = {
    "num_experts": {"experts": 32},
    "topk": {"topk": 2},
    "model_dim": {"dim": 128},
    "dtype": {4: torch.float16},
    "block_size": {5: 64},
    "has_expert_mask": {6: torch.ones(16, dtype=torch.int32)},
    "has_num_local_tokens": {7: torch.tensor([8], dtype=torch.int32)},
    "accumulate": {"accumulate": False},
    "local_ids": {"return_local_topk_ids": True},
    "baseline": {8: 2},
}


@pytest.mark.parametrize("field", DIFFERENT)
def test_shapes_are_told_apart_by(aiter, field):
    hook = installed(aiter, tables={KEY: make_table({1: 1, 64: 1})}, engine_policy=2)
    change = DIFFERENT[field]
    arguments = sort_arguments(
        8, **{k: v for k, v in change.items() if k in ("experts", "topk", "dim")}
    )
    aiter.moe_sorting(*sort_arguments(8))  # the latest key must not answer for another
    for position, value in change.items():
        if isinstance(position, int):
            arguments[position] = value
    options = {k: v for k, v in change.items() if k in ("accumulate", "return_local_topk_ids")}
    aiter.moe_sorting(*arguments, **options)
    assert policy_that_arrived() == (2 if field == "baseline" else 0)
    (noted,) = hook.seen
    assert [name for name in CallKey._fields if getattr(noted, name) != getattr(KEY, name)] == [
        field
    ]
    aiter.moe_sorting(*sort_arguments(8))
    assert policy_that_arrived() == 1


def test_a_key_in_words():
    assert KEY.describe() == "16 experts, topk 4, dim 64, bfloat16, block 32"
    assert KEY._replace(device=0).describe() == KEY.describe()
    assert KEY._replace(device=1).describe() == f"{KEY.describe()}, cuda:1"


@pytest.mark.parametrize(("devices", "noted"), [(0, -1), (1, 0), (2, -1)])
def test_only_a_process_that_sees_several_devices_asks_each_call_for_its_own(
    monkeypatch, devices, noted
):
    """-1 is the CPU, where these ids are."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    module = seam_of(policy_of)
    hook = installed(module, tables={KEY._replace(device=noted): make_table({64: 2})})
    assert module.moe_sorting(*sort_arguments(8)) == 2
    module.moe_sorting(*sort_arguments(8, dim=128))
    assert [key.device for key in hook.seen] == [noted]


def test_two_devices_of_one_process_are_told_apart(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    module = seam_of(policy_of)
    hook = installed(module, tables={KEY._replace(device=1): make_table({1: 2, 64: 2})})
    assert module.moe_sorting(*sort_arguments(8)) == 0
    (noted,) = hook.seen
    assert noted.device == -1
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 1)
    assert module.moe_sorting(*sort_arguments(8)) == 2


def test_a_later_aiters_argument_tells_shapes_apart_by_its_value():
    module = seam_of(policy_of, order="rising")
    hook = installed(module, tables={KEY._replace(more=("rising",)): make_table({1: 2, 64: 2})})
    assert module.moe_sorting(*sort_arguments(8)) == 2
    assert module.moe_sorting(*sort_arguments(8), order="falling") == 0
    # A tensor is another object at each call.
    before = set(hook.seen)
    assert module.moe_sorting(*sort_arguments(8), order=torch.zeros(3)) == 0
    assert set(hook.seen) == before
    assert hook.counts().unreadable == 1


def test_a_masked_call_accumulates_whatever_it_says(aiter):
    masked = KEY._replace(has_expert_mask=True)
    installed(aiter, tables={masked: make_table({1: 2, 64: 2})})
    arguments = sort_arguments(8)
    arguments[6] = torch.ones(16, dtype=torch.int32)
    aiter.moe_sorting(*arguments, accumulate=False)
    assert policy_that_arrived() == 2


def test_layers_that_come_with_the_same_key_are_looked_up_once(aiter):
    class Counting(Entries):
        looked_up = 0

        def __getitem__(self, key):
            Counting.looked_up += 1
            return super().__getitem__(key)

    hook = installed(aiter, tables={KEY: make_table({1: 2, 64: 2})})
    hook.wrapped.entries = Counting(hook.wrapped.entries)
    for count in (8, 9, 10):
        aiter.moe_sorting(*sort_arguments(count))
        assert policy_that_arrived() == 2
    assert Counting.looked_up == 1


def test_counts_up_to_the_largest_so_far_make_no_entry_anew(aiter):
    hook = installed(aiter)
    aiter.moe_sorting(*sort_arguments(8))
    entries = hook.wrapped.entries
    for count in (8, 7, 1):
        aiter.moe_sorting(*sort_arguments(count))
        assert hook.wrapped.entries is entries
    aiter.moe_sorting(*sort_arguments(9))
    assert hook.wrapped.entries is not entries
    assert hook.counts().unknown == hook.counts().total == 5


def test_a_table_set_while_calls_come_serves_the_next_one(aiter):
    hook = installed(aiter)
    for _ in range(2):
        aiter.fused_moe(*batch(8))
    hook.set_tables({KEY: make_table({1: 2, 64: 2})})
    aiter.fused_moe(*batch(8))
    assert policy_that_arrived() == 2
    hook.set_tables({KEY: make_table({64: 0})})
    aiter.fused_moe(*batch(8))
    assert policy_that_arrived() == 0
