"""The Triton sorts against the output contract, on the CPU, under Triton's interpreter.

Triton decides at import whether to interpret, so the cases run in one child process: this file,
started as a script. It prints what was wrong with each case as JSON.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CHILD = __name__ == "__main__"
POLICIES = (0, 1, 2)
POISON = -7777  # in every dtype, and no valid output


def cases() -> dict[str, dict[str, object]]:
    """Name -> what differs from a plain sort of 61 tokens, 4 of 33 experts, blocks of 32."""
    named: dict[str, dict[str, object]] = {
        "plain": {},
        "one entry": {"tokens": 1, "topk": 1, "experts": 1, "block": 16},
        "no tokens": {"tokens": 0},
        "one token": {"tokens": 1, "topk": 8},
        "every slot": {"topk": 16, "tokens": 9},
        "topk 22": {"topk": 22, "experts": 512, "tokens": 30},
        "topk 32": {"topk": 32, "tokens": 9},
        "hundreds of entries in one tile": {"experts": 385, "tokens": 60, "mask": "half"},
        "two experts": {"experts": 8, "topk": 2, "tokens": 130},
        "bins exactly full": {"experts": 256, "topk": 8, "tokens": 16},
        "one expert too many for the bins": {"experts": 257, "topk": 9},
        "most experts": {"experts": 1024, "topk": 8, "tokens": 20, "block": 16},
        "placeholder": {"accumulate": False},
        "placeholder refused under a mask": {"accumulate": False, "mask": "half"},
        "ids that are no expert": {"routing": "invalid"},
        "fp16": {"dtype": "float16", "dim": 1},
        "fp32": {"dtype": "float32", "dim": 5000},
        "several stores a program": {"dim": 4000},
    }
    for block in (16, 48, 256):
        named[f"blocks of {block}, buffers as before AITER rounded them"] = {
            "block": block, "rounded": False
        }  # fmt: skip
    # Rows of -1, as engines pad a batch: skipped like experts of another rank.
    for padded, mask, local, small in itertools.product(
        ("none", "some", "all"), (None, "half"), (None, 29), (False, True)
    ):
        named[f"rows of -1: {padded}, mask {mask}, {local} real rows, small tiles {small}"] = {
            "padded": padded, "mask": mask, "local": local, "small": small
        }  # fmt: skip
    for block in (16, 32, 48, 64, 128, 256):
        named[f"blocks of {block}"] = {"block": block, "routing": "skewed"}
    for routing, mask, local in itertools.product(
        ("uniform", "skewed", "one expert"), (None, "half", "none", "first"), (None, 0, 7, 61)
    ):
        named[f"{routing}, mask {mask}, {local} real rows"] = {
            "routing": routing, "mask": mask, "local": local
        }  # fmt: skip
    # Small tiles reach at small sizes what otherwise takes thousands of tokens: chunks without
    # entries, several chunks and several tiles in a row of counts, more rows than are added up at
    # once in two launches and in three, both sizes of chunks in three.
    for tokens, mask, local in itertools.product((1, 33, 37, 130), (None, "half"), (None, 3, 29)):
        named[f"small tiles, {tokens} tokens, mask {mask}, {local} real rows"] = {
            "tokens": tokens, "mask": mask, "local": local, "routing": "skewed", "small": True
        }  # fmt: skip
    return named


@pytest.fixture(scope="module")
def problems() -> dict[str, list[str]]:
    """Case and policy -> what the contract checker found."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    child = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(child.stdout.splitlines()[-1])
    return found


def sorts() -> list[tuple[str, int]]:
    """Cases and policies. Policy 0 is one of the others; two cases show that it is either."""
    named = cases()
    sorts = [(name, policy) for name in named for policy in (1, 2)]
    return [*sorts, ("plain", 0), ("most experts", 0)]


@pytest.mark.parametrize(("name", "policy"), sorts())
def test_contract(problems: dict[str, list[str]], name: str, policy: int) -> None:
    assert problems[f"{name}/{policy}"] == []


@pytest.mark.parametrize(
    ("name", "policy"), [sort for sort in sorts() if sort[0].startswith(("rows of -1", "blocks"))]
)
def test_the_cpu_sort_agrees_on_padding_rows_and_lengths(name: str, policy: int) -> None:
    from adaptive_moe.kernels.cpu_sort import moe_sorting

    assert run_case(cases()[name], policy, moe_sorting) == []


def test_buffer_lengths() -> None:
    from adaptive_moe.kernels.contract import buffer_length

    # 3 tokens, 2 of 4 experts, blocks of 16: 6 entries, 64 places of which 2 are never needed.
    assert buffer_length(3, 2, 4, 16, rounded=False) == 68
    assert buffer_length(3, 2, 4, 16, rounded=True) == 80
    assert buffer_length(1, 2, 4, 16, rounded=True) == buffer_length(1, 2, 4, 16, rounded=False)


def test_example_written_by_hand(problems: dict[str, list[str]]) -> None:
    assert problems["example"] == []


def test_our_sorts_are_offered_without_loading_triton() -> None:
    code = """
import sys
from types import SimpleNamespace

from adaptive_moe.kernels.ours import sorts

live = SimpleNamespace(device=SimpleNamespace(type="cuda"), rounded=True, num_outputs=5)
print([sort.name for sort in sorts(live, SimpleNamespace(block_size=32))])
print("triton" in sys.modules)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.splitlines() == ["['triton one-shot', 'triton multi-phase']", "False"]


def valid_arguments() -> dict[str, object]:
    return {
        "topk_ids": torch.zeros(4, 2, dtype=torch.int32),
        "topk_weights": torch.zeros(4, 2),
        "num_experts": 8,
        "model_dim": 16,
        "moebuf_dtype": torch.bfloat16,
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_size": 24}, ["block_size is 24", "multiples of 16 from 16 to 256"]),
        ({"block_size": 512}, ["block_size is 512"]),
        ({"num_experts": 1025}, ["num_experts is 1025", "1 to 1024"]),
        ({"num_experts": 1}, ["[4, 2] for 1 experts"]),
        ({"topk_ids": torch.zeros(4, 2)}, ["topk_ids is torch.float32", "torch.int32"]),
        ({"topk_ids": torch.zeros(2, 4, dtype=torch.int32).T}, ["strides (1, 4)", "contiguous"]),
        ({"topk_weights": torch.zeros(4, 3)}, ["topk_weights", "[4, 3]", "same shape"]),
        ({"topk_weights": torch.zeros(4, 2).half()}, ["torch.float16", "torch.float32"]),
        ({"moebuf_dtype": torch.int8}, ["torch.int8", "bfloat16, float16 and float32"]),
        ({"expert_mask": torch.ones(7, dtype=torch.int32)}, ["expert_mask", "7 elements"]),
        ({"expert_mask": torch.ones(8, dtype=torch.bool)}, ["expert_mask is torch.bool"]),
        ({"expert_mask": torch.ones(16).int()[::2]}, ["strides (2,)", "contiguous int32"]),
        ({"num_local_tokens": torch.ones(1).long()}, ["num_local_tokens is torch.int64"]),
        (
            {
                "topk_ids": torch.zeros(4, 33).int(),
                "topk_weights": torch.zeros(4, 33),
                "num_experts": 64,
            },
            ["[4, 33] for 64 experts", "1 to 32"],
        ),
        (
            {
                "topk_ids": torch.zeros((1 << 22) + 1, 32, dtype=torch.int32, device="meta"),
                "topk_weights": torch.zeros((1 << 22) + 1, 32, device="meta"),
                "num_experts": 64,
            },
            ["[4194305, 32]", "up to 2**27 entries"],
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, object], words: list[str]) -> None:
    from adaptive_moe.kernels.triton_sort import moe_sorting

    with pytest.raises(ValueError, match="accepted") as raised:
        moe_sorting(**{**valid_arguments(), **change})  # type: ignore[arg-type]
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "policy"),
    [
        (24, 256, 1),  # 31 rows of 257 columns fit in 32 KiB: two for sums, 24 in eights
        (25, 256, 2),
        (904, 8, 1),
        (905, 8, 2),
        (8, 511, 1),
        (1, 512, 2),
        (131072, 8, 2),
    ],
)
def test_policy_zero_asks_what_fits(num_tokens: int, num_experts: int, policy: int) -> None:
    from adaptive_moe.kernels.triton_launches import one_shot_tokens

    assert (1 if num_tokens <= one_shot_tokens(num_experts) else 2) == policy


def run_cases() -> dict[str, list[str]]:
    from adaptive_moe.kernels import triton_sort
    from adaptive_moe.kernels.triton_launches import Tile

    # An interpreted program takes its time, idle or not: few that pad and few that zero.
    usual = replace(triton_sort.TUNING, pads=3, few_fills=2)
    small = replace(
        usual,
        tiles=(Tile(16, 16, 16, 1), Tile(32, 32, 16, 1), Tile(4096, 32, 16, 1)),
        chunks=(16, 32, 64),
        max_rows=2,
        many_counts=140 * 256,
        most_entries=300,
        fill_tile=64,
        fill_tiles=1,
        scan_rows=4,
        scan_tile=64,
        count_tile=32,
        small_tile=16,
        many_tiles=1,
        max_fills=3,
        local_fills=2,
    )
    found = {}
    for name, case in cases().items():
        triton_sort.TUNING = small if case.get("small") else usual
        triton_sort._bound.clear()
        for policy in [policy for other, policy in sorts() if other == name]:
            found[f"{name}/{policy}"] = run_case(case, policy, triton_sort.moe_sorting)
    found["example"] = example()
    return found


def route(
    tokens: int,
    experts: int,
    topk: int,
    routing: object,
    padded: object,
    generator: torch.Generator,
) -> torch.Tensor:
    """topk_ids, with -1 in no row, in every third and the last quarter, or in all."""
    popularity = torch.zeros(experts)
    if routing == "skewed":
        popularity = -1.5 * torch.arange(1, experts + 1).log()
    noise = torch.rand(tokens, experts, generator=generator).clamp(1e-6, 1 - 1e-6)
    ids = (popularity - (-noise.log()).log()).topk(topk, 1).indices.int()
    if routing == "one expert":
        ids = torch.full_like(ids, experts // 2)
    if routing == "invalid":
        ids[::3, 0], ids[1::5, 1], ids[2::7, 2] = -1, experts, 1 << 30
    row = torch.arange(tokens)
    is_padding = {
        "none": row < 0, "some": (row % 3 == 1) | (row >= tokens - tokens // 4), "all": row >= 0
    }  # fmt: skip
    ids[is_padding[str(padded)]] = -1
    return ids.contiguous()


def run_case(
    case: dict[str, object], policy: int, moe_sorting: Callable[..., tuple[torch.Tensor, ...]]
) -> list[str]:
    from adaptive_moe.kernels.contract import SortingInputs
    from calibration.exact_memory import guarded_memory
    from calibration.sort_contract import check_contract

    plain = {"tokens": 61, "topk": 4, "experts": 33, "block": 32, "dim": 40, "dtype": "bfloat16"}
    full: dict[str, object] = {**plain, "routing": "uniform", "mask": None, "local": None, **case}
    tokens, topk, experts = (int(str(full[key])) for key in ("tokens", "topk", "experts"))
    generator = torch.Generator().manual_seed(0)
    ids = route(tokens, experts, topk, full["routing"], full.get("padded", "none"), generator)
    mask = None
    if full["mask"] is not None:
        visible = {"none": 0.0, "half": 0.5, "first": 0.0}[str(full["mask"])]
        mask = (torch.rand(experts, generator=generator) < visible).int()
        mask[0] |= full["mask"] == "first"
    local = None
    if full["local"] is not None:
        local = torch.tensor([min(int(str(full["local"])), tokens)], dtype=torch.int32)
    inputs = SortingInputs(
        ids, torch.rand(tokens, topk, generator=generator), experts,
        int(str(full["dim"])), getattr(torch, str(full["dtype"])), int(str(full["block"])),
        mask, local,
    )  # fmt: skip
    accumulate, rounded = bool(full.get("accumulate", True)), bool(full.get("rounded", True))
    with guarded_memory(POISON, 5000) as guards:
        outputs = moe_sorting(*inputs.arguments(policy), accumulate=accumulate, rounded=rounded)
    violations = check_contract(inputs, outputs, accumulate=accumulate)
    if not all(bool((guard == POISON).all()) for guard in guards):
        violations.append("wrote behind a buffer's end")
    length = tokens * topk + experts * inputs.block_size - topk
    if rounded:
        length = math.ceil(length / inputs.block_size) * inputs.block_size
    if not len(outputs[0]) == len(outputs[1]) == length:
        violations.append(f"buffers of {len(outputs[0])} and {len(outputs[1])}, not {length}")
    # Beyond the contract: all is in the input's order, also when a token meets an expert twice,
    # and padding names the first row that is not real.
    total, rows = outputs[3].tolist()
    entries = outputs[0][:total].long()
    token, slot = entries & 0xFFFFFF, entries >> 24
    if not bool((token[slot == topk] == rows).all()):
        violations.append("padding does not name the number of real rows")
    real = slot < topk
    if not violations:
        flat = token[real] * topk + slot[real]
        expert = inputs.topk_ids[token[real], slot[real]]
        if bool(((expert[1:] == expert[:-1]) & (flat[1:] <= flat[:-1])).any()):
            violations.append("not in the input's order")
    return violations


def example() -> list[str]:
    """Three tokens, two of four experts each, blocks of 16; expert 1 is on another rank."""
    from adaptive_moe.kernels.triton_sort import moe_sorting

    ids = torch.tensor([[2, 0], [1, 2], [3, 2]], dtype=torch.int32)
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    mask = torch.tensor([1, 0, 1, 1], dtype=torch.int32)
    pad = (2, 3)
    groups = [[(1, 0)], [(0, 0), (1, 1), (1, 2)], [(0, 2)]]  # (slot, token) of experts 0, 2, 3
    expected = [entry for group in groups for entry in group + [pad] * (16 - len(group))]
    violations = []
    for policy in POLICIES:
        sorted_ids, sorted_weights, experts, valid, _ = moe_sorting(
            ids, weights, 4, 8, torch.float32, 16, mask, dispatch_policy=policy
        )
        if [(int(x) >> 24, int(x) & 0xFFFFFF) for x in sorted_ids[:48]] != expected:
            violations.append(f"{policy}: sorted_ids {sorted_ids.tolist()}")
        if experts[:3].tolist() != [0, 1, 2] or valid.tolist() != [48, 3]:
            violations.append(f"{policy}: {experts.tolist()} {valid.tolist()}")
        places = {0: 0.2, 16: 0.1, 17: 0.4, 18: 0.6, 32: 0.5}
        if any(abs(float(sorted_weights[at]) - weight) > 1e-6 for at, weight in places.items()):
            violations.append(f"{policy}: sorted_weights {sorted_weights.tolist()}")
    return violations


if CHILD:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    print(json.dumps(run_cases()))
