"""The Triton sorts on a GPU against the output contract, over the whole matrix of shapes.

    python calibration/check_triton_contract.py --out calibration/results/triton_contract.json

Every combination of the lists below (a topk above the number of experts is no routing and is left
out) is sorted under all three policies and compared bit for bit, where defined, with a reference
made of torch's own stable sort. Every buffer is poisoned before and has a guard behind its end, so
that neither what is left unwritten nor what is written outside goes unseen. The first pass gives
each combination one of AITER's two buffer lengths in turn, the second the other; `--seconds` may
end it, and the result says what was done. Then each policy is captured into a graph and replayed
on inputs it has not seen. Exit status 1 where anything differs.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import platform
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adaptive_moe.kernels.triton_sort import moe_sorting

EXPERTS = (1, 8, 32, 64, 128, 160, 256, 257, 385, 512, 513, 1024)
TOPK = (1, 2, 4, 6, 8, 9, 11, 16)
TOKENS = (1, 2, 7, 16, 61, 64, 128, 500, 1024, 4096, 16384, 65536)
BLOCKS = (16, 32, 64, 128)
# Routing, and which rows are the -1 that engines pad a batch with.
ROUTINGS = (
    *itertools.product(("uniform", "skewed", "one expert"), ("none", "some")),
    ("uniform", "all"),
)
OPTIONS = tuple(itertools.product((False, True), repeat=2))  # expert_mask, num_local_tokens
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MODEL_DIMS = (24, 7, 1000)  # small, so that the sorts are what takes the time
WIDE_DIM = 7168  # instead, for every 17th combination of up to 1,024 tokens
POLICIES = (0, 1, 2)
POISON = -7777  # in every dtype, and no valid output
GUARD = 1024  # elements behind each buffer's end
FLAGS = (
    "length",
    "sorted_ids",
    "sorted_weights",
    "sorted_expert_ids",
    "num_valid_ids",
    "moe_buf",
    "guard",
)


@dataclass(frozen=True)
class Sorted:
    """What the reference expects, and where it is defined."""

    ids: torch.Tensor
    weights: torch.Tensor
    experts: torch.Tensor
    valid: torch.Tensor
    defined: torch.Tensor
    real: torch.Tensor
    defined_blocks: torch.Tensor


def reference(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    block_size: int,
    expert_mask: torch.Tensor | None,
    num_local_tokens: torch.Tensor | None,
) -> Sorted:
    """The contract by torch's stable sort, on the device and without waiting for it."""
    num_tokens, topk = topk_ids.shape
    device = topk_ids.device
    length = num_tokens * topk + num_experts * block_size - topk
    flat = torch.arange(num_tokens * topk, device=device)
    rows = torch.tensor([num_tokens], device=device)
    if num_local_tokens is not None:
        rows = num_local_tokens.long()
    visible = torch.ones(num_experts, dtype=torch.bool, device=device)
    if expert_mask is not None:
        visible = expert_mask != 0
    key = topk_ids.flatten().long()
    is_expert = (key >= 0) & (key < num_experts) & (flat // topk < rows)
    is_expert &= visible[key.clamp(0, num_experts - 1)]
    key = torch.where(is_expert, key, num_experts)
    key, order = key.sort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.long, device=device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    first_sorted = counts.cumsum(0) - counts
    padded = (counts[:-1] + block_size - 1) // block_size * block_size
    ends = padded.cumsum(0)
    starts = torch.cat([ends - padded, torch.full_like(ends[:1], length)])
    # Entries of no expert all land on one place past the end, which is cut off.
    target = torch.where(key < num_experts, starts[key] + flat - first_sorted[key], length)
    ids = ((topk << 24) | rows).int().repeat(length + 1)
    ids[target] = (((order % topk) << 24) | (order // topk)).int()
    weights = torch.zeros(length + 1, device=device)
    weights[target] = topk_weights.flatten()[order]
    real = torch.zeros(length + 1, dtype=torch.bool, device=device)
    real[target] = True
    block_start = torch.arange(-(-length // block_size), device=device) * block_size
    expert = torch.searchsorted(ends, block_start, right=True).clamp(max=num_experts - 1)
    local = visible.long().cumsum(0) - 1
    return Sorted(
        ids[:-1],
        weights[:-1],
        local[expert].int(),
        torch.cat([ends[-1:], rows]).int(),
        torch.arange(length, device=device) < ends[-1],
        real[:-1],
        block_start < ends[-1],
    )


@contextmanager
def guarded_memory() -> Iterator[list[torch.Tensor]]:
    """Within it torch.empty gives poison, with a guard of poison behind it; yields the guards."""
    real, guards = torch.empty, []

    def empty(*size: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        shape = size[0] if isinstance(size[0], tuple) else size
        count = math.prod(shape)
        buffer = torch.full((count + GUARD,), POISON, dtype=dtype, device=device)
        guards.append(buffer[count:])
        return buffer[:count].view(shape)

    torch.empty = empty
    try:
        yield guards
    finally:
        torch.empty = real


def differs(
    wanted: Sorted, outputs: tuple[torch.Tensor, ...], guards: list[torch.Tensor], length: int
) -> torch.Tensor:
    """Whether any output differs in any bit where it is defined, as FLAGS. `length` is that of
    sorted_ids and sorted_weights; what is defined is never longer than `wanted` is."""
    ids, weights, experts, valid, moe_buf = outputs
    lengths = len(ids) == len(weights) == length and len(experts) == len(wanted.defined_blocks)
    ids, weights = ids[: len(wanted.ids)], weights[: len(wanted.ids)]
    bits, wanted_bits = weights.view(torch.int32), wanted.weights.view(torch.int32)
    return torch.stack(
        [
            torch.full((), not lengths, device=ids.device),
            ((ids != wanted.ids) & wanted.defined).any(),
            ((bits != wanted_bits) & wanted.real).any(),
            ((experts != wanted.experts) & wanted.defined_blocks).any(),
            (valid != wanted.valid).any(),
            moe_buf.any(),
            torch.stack([(guard != POISON).any() for guard in guards]).any(),
        ]
    )


def route(kind: str, tokens: int, experts: int, topk: int, seed: int) -> tuple[Any, Any]:
    generator = torch.Generator("cuda").manual_seed(seed)
    weights = torch.rand(tokens, topk, device="cuda", generator=generator)
    if kind == "one expert":
        return torch.full_like(weights, experts // 2, dtype=torch.int32), weights
    score = torch.rand(tokens, experts, device="cuda", generator=generator)
    if kind == "skewed":
        score = score.log() * torch.arange(1, experts + 1, device="cuda")
    return score.topk(topk, 1).indices.int().contiguous(), weights


def pad_rows(ids: torch.Tensor, which: str) -> torch.Tensor:
    """`ids` with -1 in no row, in every third and the last quarter, or in all."""
    row = torch.arange(len(ids), device=ids.device)[:, None]
    padded = {
        "none": row < 0,
        "some": (row % 3 == 2) | (row >= len(ids) - len(ids) // 4),
        "all": row >= 0,
    }
    return torch.where(padded[which], -1, ids)


def check(job: tuple[int, int, int, int, float]) -> dict[str, Any]:
    """All combinations with so many experts, slots and tokens, unless `deadline` has passed.

    first_length: whether the first of them gets the rounded buffers. Flags stay on the device
    until the end.
    """
    first_length, experts, topk, tokens, deadline = job
    if time.time() > deadline:
        skipped = len(ROUTINGS) * len(BLOCKS) * len(OPTIONS)
        return {"combinations": 0, "skipped": skipped, "failures": []}
    cases: list[tuple[object, ...]] = []
    flags: list[torch.Tensor] = []
    for kind, padded in ROUTINGS:
        ids, weights = route(kind, tokens, experts, topk, seed=len(cases))
        ids = pad_rows(ids, padded)
        generator = torch.Generator("cuda").manual_seed(len(cases))
        half = torch.rand(experts, device="cuda", generator=generator).lt(0.5).int()
        for block, (masked, local) in itertools.product(BLOCKS, OPTIONS):
            mask = half if masked else None
            rows = None
            if local:
                some = (0, 1, tokens // 2, tokens)[(len(cases) // 4 + len(cases) // 16) % 4]
                rows = torch.tensor([some], dtype=torch.int32, device="cuda")
            wanted = reference(ids, weights, experts, block, mask, rows)
            wide = len(cases) % 17 == 0 and tokens <= 1024
            dim = WIDE_DIM if wide else MODEL_DIMS[len(cases) % 3]
            dtype = DTYPES[len(cases) // 3 % 3]
            rounded = (len(cases) + len(cases) // 16 + first_length) % 2 == 0
            length = len(wanted.ids)
            if rounded:
                length = math.ceil(length / block) * block
            options = (block, masked, local, rounded, dim, str(dtype))
            cases.append((experts, topk, tokens, kind, padded, *options))
            for policy in POLICIES:
                with guarded_memory() as guards:
                    outputs = moe_sorting(
                        ids, weights, experts, dim, dtype, block, mask, rows, policy,
                        rounded=rounded,
                    )  # fmt: skip
                flags.append(differs(wanted, outputs, guards, length))
    bad = torch.stack(flags).view(len(cases), len(POLICIES), len(FLAGS)).cpu()
    failures = []
    for i, p in bad.any(2).nonzero().tolist():
        names = [name for name, flag in zip(FLAGS, bad[i, p], strict=True) if flag]
        failures.append([*cases[i], POLICIES[p], names])
    return {"combinations": len(cases), "skipped": 0, "failures": failures}


def check_replay() -> tuple[int, list[str]]:
    """A captured call sorts whatever its input tensors hold when the graph is replayed."""
    replays, failures = 0, []
    for policy, tokens in itertools.product(POLICIES, (1, 16, 500, 4096)):
        ids, weights = route("uniform", tokens, 256, 8, 1)
        mask = torch.ones(256, dtype=torch.int32, device="cuda")
        rows = torch.tensor([tokens], dtype=torch.int32, device="cuda")
        arguments = (256, 1000, torch.bfloat16, 32, mask, rows, policy)
        moe_sorting(ids, weights, *arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = moe_sorting(ids, weights, *arguments)
        for seed in range(5):
            new_ids, new_weights = route("skewed", tokens, 256, 8, seed)
            ids.copy_(pad_rows(new_ids, ("none", "some", "all")[seed % 3]))
            weights.copy_(new_weights)
            mask.copy_(torch.arange(256, device="cuda") % 5 != seed)
            rows.fill_(tokens - tokens * seed // 10)
            for output in outputs:
                output.fill_(POISON)
            graph.replay()
            wanted = reference(ids, weights, 256, 32, mask, rows)
            replays += 1
            guard = ids.new_full((1,), POISON)
            if bool(differs(wanted, outputs, [guard], outputs[0].numel()).any()):
                failures.append(f"policy {policy}, {tokens} tokens, replay {seed}")
    return replays, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start none after so long")
    arguments = parser.parse_args()
    began = time.time()
    context = multiprocessing.get_context("spawn")
    sizes = [size for size in itertools.product(EXPERTS, TOPK, TOKENS) if size[1] <= size[0]]
    random.Random(0).shuffle(sizes)  # so that what time leaves out is no end of a list
    deadline = began + arguments.seconds
    jobs = [(first_length, *size, deadline) for first_length in (0, 1) for size in sizes]
    with context.Pool(arguments.processes) as pool:
        results = pool.map(check, jobs, chunksize=1)
    replays, replay_failures = check_replay()
    combinations = sum(result["combinations"] for result in results)
    skipped = sum(result["skipped"] for result in results)
    failures = [failure for result in results for failure in result["failures"]]
    result = {
        "command": "python calibration/check_triton_contract.py",
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "matrix": {
            "experts": EXPERTS, "topk": TOPK, "tokens": TOKENS, "blocks": BLOCKS,
            "routings, rows of -1": ROUTINGS, "rounded buffers": (True, False),
            "expert_mask, num_local_tokens": OPTIONS, "policies": POLICIES,
        },
        "combinations": combinations,
        "combinations_left_out_for_time": skipped,
        "sorts": combinations * len(POLICIES),
        "failed_sorts": len(failures),
        "failures": failures[:50],
        "graph_replays": replays,
        "failed_replays": replay_failures,
        "seconds": round(time.time() - began, 1),
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{combinations} combinations ({skipped} left out), {result['sorts']} sorts, "
        f"{len(failures)} wrong; {replays} graph replays, {len(replay_failures)} wrong; "
        f"{result['seconds']} s"
    )
    for failure in failures[:10]:
        print("wrong:", failure)
    return 1 if failures or replay_failures else 0


if __name__ == "__main__":
    sys.exit(main())
