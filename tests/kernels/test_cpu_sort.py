"""The CPU kernel's policies against the contract, and against the contract done by hand."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_moe.kernels import cpu_sort, load_kernel
from adaptive_moe.kernels.contract import SortingInputs, poisoned_memory
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.inputs import Routing, route, sorting_inputs
from calibration.sort_contract import check_contract

POLICIES = (0, 1, 2)
CPU = torch.device("cpu")
Outputs = tuple[torch.Tensor, ...]


def make_inputs(
    tokens: int = 37,
    experts: int = 8,
    topk: int = 2,
    block: int = 4,
    dim: int = 8,
    dtype: str = "bfloat16",
    routing: Routing = Routing.UNIFORM,
    mask: str | None = None,
    local: int | None = None,
) -> SortingInputs:
    shape = SortingShape(experts, topk, dim, dtype, block)
    found = sorting_inputs(shape, route(shape, tokens, routing, tokens, CPU), tokens, None)
    masks = {
        "half": torch.arange(experts) % 2,
        "first": (torch.arange(experts) < 1),
        "last": (torch.arange(experts) == experts - 1),
        "none": torch.zeros(experts),
        "all": torch.ones(experts),
    }
    return replace(
        found,
        expert_mask=None if mask is None else masks[mask].int(),
        num_local_tokens=None if local is None else torch.tensor([local], dtype=torch.int32),
    )


def sort(inputs: SortingInputs, policy: int, accumulate: bool = True) -> Outputs:
    with poisoned_memory():
        return cpu_sort.moe_sorting(*inputs.arguments(policy), accumulate=accumulate)


def by_hand(inputs: SortingInputs) -> tuple[list[int], list[float | None], list[int], list[int]]:
    """sorted_ids, weights (None for padding), one expert a block and num_valid_ids, in loops."""
    rows, topk = inputs.topk_ids.shape
    real = rows if inputs.num_local_tokens is None else int(inputs.num_local_tokens)
    ids, weights = inputs.topk_ids.tolist(), inputs.topk_weights.tolist()
    sorted_ids: list[int] = []
    sorted_weights: list[float | None] = []
    blocks: list[int] = []
    local_index = 0
    for expert in range(inputs.num_experts):
        if inputs.expert_mask is not None and not inputs.expert_mask[expert]:
            continue
        for token in range(real):
            for slot in range(topk):
                if ids[token][slot] == expert:
                    sorted_ids.append(slot << 24 | token)
                    sorted_weights.append(weights[token][slot])
        while len(sorted_ids) % inputs.block_size:
            sorted_ids.append(topk << 24 | real)
            sorted_weights.append(None)
        while len(blocks) < len(sorted_ids) // inputs.block_size:
            blocks.append(local_index)
        local_index += 1
    return sorted_ids, sorted_weights, blocks, [len(sorted_ids), real]


def assert_is_by_hand(inputs: SortingInputs, outputs: Outputs) -> None:
    ids, weights, blocks, valid = by_hand(inputs)
    assert outputs[3].tolist() == valid
    assert outputs[0][: valid[0]].tolist() == ids
    assert outputs[2][: len(blocks)].tolist() == blocks
    found = outputs[1][: valid[0]].tolist()
    assert [None if w is None else f for f, w in zip(found, weights, strict=True)] == weights
    assert not outputs[4][: valid[1]].any()


CASES = {
    "plain": {},
    "one token": {"tokens": 1},
    "one expert": {"experts": 1, "topk": 1},
    "one token of one expert": {"tokens": 1, "experts": 1, "topk": 1, "block": 1},
    "no real token": {"local": 0},
    "every expert of a token": {"experts": 4, "topk": 4},
    "topk 16": {"experts": 16, "topk": 16, "tokens": 5},
    "topk 32": {"experts": 33, "topk": 32, "tokens": 5},
    "block 1": {"block": 1},
    "block 32": {"block": 32},
    "block 48": {"block": 48},
    "block 1024": {"block": 1024},
    "more experts than entries": {"experts": 1024, "topk": 1, "tokens": 3, "block": 2},
    "float16": {"dtype": "float16"},
    "float32, one column": {"dtype": "float32", "dim": 1},
    "many entries": {"tokens": 1500, "experts": 60, "topk": 4, "block": 16},
    "many, masked and padded": {"tokens": 3000, "mask": "half", "local": 2100},
    "many of one expert": {"tokens": 2500, "routing": Routing.ONE_EXPERT},
    "skewed": {"routing": Routing.SKEWED, "tokens": 200, "experts": 64, "topk": 6},
}
for case in itertools.product(
    (Routing.UNIFORM, Routing.ONE_EXPERT),
    ("half", "first", "last", "none", "all"),
    (None, 0, 1, 36),
):
    routing, mask, local = case
    CASES[f"{routing.value}, {mask} kept, {local} real"] = dict(
        zip(("routing", "mask", "local"), case, strict=True)
    )


def assert_every_policy_is_right(inputs: SortingInputs) -> None:
    for policy in POLICIES:
        outputs = sort(inputs, policy)
        assert_is_by_hand(inputs, outputs)
        assert check_contract(inputs, outputs) == []


@pytest.mark.parametrize("name", CASES)
def test_every_policy_does_what_the_contract_says_done_by_hand(name: str) -> None:
    inputs = make_inputs(**CASES[name])
    assert_every_policy_is_right(inputs)


@settings(max_examples=60)
@given(st.data())
def test_any_ids_at_all_are_sorted_as_by_hand(data: st.DataObject) -> None:
    """Ids out of range belong to nobody; a token may name an expert twice."""
    experts = data.draw(st.integers(1, 6))
    topk = data.draw(st.integers(1, min(3, experts)))
    rows = data.draw(st.integers(1, 12))
    ids = data.draw(
        st.lists(st.integers(-2, experts + 1), min_size=rows * topk, max_size=rows * topk)
    )
    mask = data.draw(st.none() | st.lists(st.integers(0, 2), min_size=experts, max_size=experts))
    local = data.draw(st.none() | st.integers(0, rows))
    inputs = SortingInputs(
        torch.tensor(ids, dtype=torch.int32).view(rows, topk),
        torch.arange(rows * topk, dtype=torch.float32).view(rows, topk) / 7,
        experts,
        3,
        torch.float32,
        data.draw(st.integers(1, 5)),
        None if mask is None else torch.tensor(mask, dtype=torch.int32),
        None if local is None else torch.tensor([local], dtype=torch.int32),
    )
    assert_every_policy_is_right(inputs)


def test_rows_cut_out_of_a_wider_tensor_are_sorted_the_same() -> None:
    inputs = make_inputs()
    wide_ids, wide_weights = (torch.cat([t, t], 1) for t in (inputs.topk_ids, inputs.topk_weights))
    strided = replace(inputs, topk_ids=wide_ids[:, :2], topk_weights=wide_weights[:, :2])
    assert not strided.topk_ids.is_contiguous()
    for policy in POLICIES:
        assert_is_by_hand(inputs, sort(strided, policy))


def test_inputs_are_left_as_they_were() -> None:
    inputs = make_inputs(mask="half", local=20)
    ids, weights, mask = (
        t.clone() for t in (inputs.topk_ids, inputs.topk_weights, inputs.expert_mask)
    )
    for policy in POLICIES:
        sort(inputs, policy)
    assert torch.equal(inputs.topk_ids, ids)
    assert torch.equal(inputs.topk_weights, weights)
    assert torch.equal(inputs.expert_mask, mask)
    assert inputs.num_local_tokens.tolist() == [20]


@pytest.mark.parametrize("policy", POLICIES)
def test_without_accumulation_the_buffer_is_an_empty_placeholder(policy: int) -> None:
    inputs = make_inputs()
    outputs = sort(inputs, policy, accumulate=False)
    assert outputs[4].numel() == 0
    assert check_contract(inputs, outputs, accumulate=False) == []
    # An expert-parallel rank always needs the buffer: other ranks add to it.
    masked = make_inputs(mask="half")
    outputs = sort(masked, policy, accumulate=False)
    assert list(outputs[4].shape) == [37, 8]
    assert check_contract(masked, outputs, accumulate=False) == []


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_that_are_not_real_are_left_as_they_were(policy: int) -> None:
    outputs = sort(make_inputs(local=5), policy)
    assert not outputs[4][:5].any()
    assert outputs[4][5:].isnan().all()


@pytest.mark.parametrize("policy", [3, 7, 255])
def test_any_policy_but_0_and_1_is_multi_phase(policy: int) -> None:
    inputs = make_inputs()
    assert_is_by_hand(inputs, sort(inputs, policy))


@pytest.mark.parametrize(
    ("policy", "tokens", "sorts"),
    [(1, 20, True), (2, 20, False), (0, 20, True), (1, 3000, True), (0, 3000, False)],
)
def test_policies_1_and_2_are_different_algorithms_and_0_picks_between_them(
    policy: int, tokens: int, sorts: bool
) -> None:
    """torch's profiler tells them apart: one sorts the batch, the other counts."""
    inputs = make_inputs(tokens)
    with torch.profiler.profile() as profile:
        cpu_sort.moe_sorting(*inputs.arguments(policy))
    assert any(event.name == "aten::sort" for event in profile.events()) is sorts


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "policy"),
    [(904, 8, 1), (920, 8, 2), (56, 128, 1), (64, 128, 2), (24, 256, 1), (32, 256, 2), (1, 512, 2)],
)
def test_policy_0_goes_by_token_counts_as_aiters_does(num_tokens, num_experts, policy) -> None:
    assert cpu_sort.policy_zero(num_tokens, num_experts) == policy


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"topk_ids": torch.zeros(4, 2, dtype=torch.int64)}, "topk_ids is torch.int64"),
        ({"topk_ids": torch.zeros(4, dtype=torch.int32)}, r"topk_ids is torch.int32 \[4\]"),
        ({"topk_weights": torch.zeros(37, 2).half()}, "topk_weights is torch.float16"),
        ({"topk_weights": torch.zeros(37, 3)}, r"topk_weights is torch.float32 \[37, 3\]"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"block_size": 0}, "block_size=0"),
    ],
)
def test_arguments_that_cannot_be_sorted_are_refused_by_name(
    change: dict[str, object], words: str
) -> None:
    inputs = replace(make_inputs(), **change)
    with pytest.raises(ValueError, match=words):
        cpu_sort.moe_sorting(*inputs.arguments(1))


def test_the_kernel_is_found_by_name_and_an_unknown_one_is_refused() -> None:
    kernel = load_kernel("cpu")
    assert (kernel.name, kernel.device) == ("cpu", CPU)
    assert [candidate.name for candidate in kernel.candidates] == [
        f"policy {policy}" for policy in POLICIES
    ]
    for candidate in kernel.candidates:
        assert_is_by_hand(make_inputs(), candidate.bind(make_inputs())())
    with pytest.raises(ValueError, match="'gpu' is not known: give cpu or triton"):
        load_kernel("gpu")
