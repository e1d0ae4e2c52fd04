"""The Triton sorts on a GPU against the output contract, over the whole matrix of shapes.

    python -m calibration.check_triton_contract --out calibration/results/triton_contract.json

Every combination of the lists below (a topk above the number of experts is no routing and is left
out) is sorted under all three policies and compared bit for bit, where defined, with a reference
made of torch's own stable sort (exact_memory.py). Nothing waits for the device until the end of a
job, which is all combinations of so many experts, slots and tokens. `--devices` spreads the jobs
over the GPUs of this machine; `--part 1/4` does every fourth of them, and `--merge FILE ...` puts
parts together; `--seconds` may end it, and the result says what was done. Then each policy is
captured into a graph and replayed on inputs it has not seen. Exit status 1 where anything differs.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from calibration import record
from calibration.exact_memory import Expected, Memory, expected, grouped

EXPERTS = (1, 8, 64, 128, 160, 256, 257, 385, 512, 513, 1024)
TOPK = (1, 2, 4, 6, 8, 9, 22, 32)
TOKENS = (1, 2, 7, 16, 61, 64, 128, 500, 1024, 4096, 20000)
BLOCKS = (16, 32, 64, 128)
# Routing, and which rows are the -1 that engines pad a batch with.
ROUTINGS = (
    *itertools.product(("uniform", "skewed", "one expert"), ("none", "some")),
    ("uniform", "all"),
)
OPTIONS = tuple(itertools.product((False, True), repeat=2))  # expert_mask, num_local_tokens
ROUNDED = (True, False)  # both of AITER's buffer lengths
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MODEL_DIMS = (24, 7, 1000)  # small, so that the sorts are what takes the time
WIDE_DIM = 7168  # instead, for every 17th combination of up to 1,024 tokens
POLICIES = (0, 1, 2)
A_JOB = len(ROUTINGS) * len(OPTIONS) * len(BLOCKS) * len(ROUNDED)  # combinations
Sort = Callable[..., tuple[torch.Tensor, ...]]
Case = tuple[tuple[object, ...], tuple[Any, ...], Memory, tuple[torch.Tensor, torch.Tensor], int]


def the_sort() -> Sort:
    from adaptive_moe.kernels.triton_sort import moe_sorting

    return moe_sorting


def route(
    kind: str, tokens: int, experts: int, topk: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    device = generator.device
    weights = torch.rand(tokens, topk, device=device, generator=generator)
    if kind == "one expert":
        return torch.full_like(weights, experts // 2, dtype=torch.int32), weights
    score = torch.rand(tokens, experts, device=device, generator=generator)
    if kind == "skewed":
        score = score.log() * torch.arange(1, experts + 1, device=device)
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


def cases(experts: int, topk: int, tokens: int, device: str) -> Iterator[Case]:
    """Words for each combination, the sort's arguments, its memory, what is to stand there, and how
    many rows are real. Ids and weights begin at any alignment."""
    generator = torch.Generator(device).manual_seed(experts * topk + tokens)
    half = torch.rand(experts, device=device, generator=generator).lt(0.5).int()
    number = 0
    for turn, (kind, padded) in enumerate(ROUTINGS, experts + topk + tokens):
        ids, weights = route(kind, tokens, experts, topk, generator)
        ids, weights = shifted(pad_rows(ids, padded), turn % 4), shifted(weights, turn % 3)
        for masked, local in OPTIONS:
            mask = half if masked else None
            rows, some = None, tokens
            if local:
                some = (0, 1, tokens // 2, tokens)[(turn + 2 * masked) % 4]
                rows = torch.full((1,), some, dtype=torch.int32, device=device)
            entries = grouped(ids, weights, experts, mask, rows)
            for block in BLOCKS:
                right = expected(entries, block)
                wide = number // 2 % 17 == 0 and tokens <= 1024
                dim = WIDE_DIM if wide else MODEL_DIMS[number // 2 % 3]
                dtype = DTYPES[number // 6 % 3]
                for rounded in ROUNDED:
                    memory, wanted = memory_for(right, block, rounded, (tokens, dim), dtype)
                    words = (kind, padded, block, masked, local, rounded, dim, str(dtype))
                    arguments = (ids, weights, experts, dim, dtype, block, mask, rows)
                    yield words, arguments, memory, wanted, some
                    number += 1


def shifted(tensor: torch.Tensor, words: int) -> torch.Tensor:
    """A copy that begins so many elements behind what its memory is aligned to."""
    behind = torch.empty(words + tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return behind[words:].view(tensor.shape).copy_(tensor)


def memory_for(
    right: Expected, block: int, rounded: bool, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Memory, tuple[torch.Tensor, torch.Tensor]]:
    length = len(right.words[0])
    if rounded:
        length = math.ceil(length / block) * block
    memory = Memory(length, block, shape, dtype, right.words[0].device)
    return memory, memory.wanted(right)


def check(
    job: tuple[int, int, int, float], sort: Sort | None = None, device: str = "cuda"
) -> dict[str, Any]:
    """All combinations of so many experts, slots and tokens, unless the job's deadline is over."""
    *size, deadline = job
    if time.time() > deadline:
        return {"combinations": 0, "left_out": A_JOB, "failures": []}
    sort = sort or the_sort()
    flags = torch.zeros(A_JOB, len(POLICIES), 3, dtype=torch.bool, device=device)
    elsewhere = torch.zeros(A_JOB, len(POLICIES), dtype=torch.bool)
    for i, (words, arguments, memory, wanted, rows) in enumerate(cases(*size, device)):
        for p, policy in enumerate(POLICIES):
            with memory.lent() as guards:
                outputs = sort(*arguments, policy, rounded=words[5])
            elsewhere[i, p] = memory.differs(wanted, outputs, guards, flags[i, p], rows)
    bad = flags.any(2).cpu() | elsewhere
    failures = []
    if bool(bad.any()):  # a second time, and waiting, to say what it is
        for i, (words, arguments, memory, wanted, rows) in enumerate(cases(*size, device)):
            for p in bad[i].nonzero().flatten().tolist():
                with memory.lent() as guards:
                    outputs = sort(*arguments, POLICIES[p], rounded=words[5])
                again = torch.zeros(3, dtype=torch.bool, device=device)
                moved = memory.differs(wanted, outputs, guards, again, rows)
                names = memory.names(again, moved) or ["not again"]
                failures.append([*size, *words, POLICIES[p], names])
    return {"combinations": A_JOB, "left_out": 0, "failures": failures}


def compile_ahead(variant: tuple[int, torch.dtype, bool, bool]) -> None:
    """What a job would compile at its first sorts, by few processes; here all can take part."""
    experts, dtype, masked, local = variant
    from adaptive_moe.kernels.triton_sort import TUNING

    ones = torch.ones(experts, dtype=torch.int32, device="cuda")
    # Every tile of one-shot, and multi-phase of two launches and of three, with both chunks.
    entries = [(1, tile.entries) for tile in TUNING.tiles]
    entries += [(2, 1), (2, 65536), (2, TUNING.most_entries + 1)]
    for policy, tokens in entries:
        ids = torch.zeros(tokens, 1, dtype=torch.int32, device="cuda")
        mask, rows = ones if masked else None, ones[:1] if local else None
        the_sort()(ids, ids.float(), experts, 8, dtype, 32, mask, rows, policy)
    torch.cuda.synchronize()


def check_replay() -> tuple[int, list[str]]:
    """A captured call sorts whatever its input tensors hold when the graph is replayed."""
    replays, failures = 0, []
    generator = torch.Generator("cuda").manual_seed(1)
    for policy, tokens in itertools.product(POLICIES, (1, 16, 500, 4096)):
        ids, weights = route("uniform", tokens, 256, 8, generator)
        mask = torch.ones(256, dtype=torch.int32, device="cuda")
        rows = torch.tensor([tokens], dtype=torch.int32, device="cuda")

        def right(inputs: tuple[Any, ...] = (ids, weights, 256, mask, rows)) -> Expected:
            return expected(grouped(*inputs), 32)

        arguments = (ids, weights, 256, 1000, torch.bfloat16, 32, mask, rows, policy)
        the_sort()(*arguments)
        memory, _ = memory_for(right(), 32, True, (tokens, 1000), torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), memory.lent() as guards:  # each replay poisons it anew
            outputs = the_sort()(*arguments)
        for seed in range(5):
            new_ids, new_weights = route("skewed", tokens, 256, 8, generator)
            ids.copy_(pad_rows(new_ids, ("none", "some", "all")[seed % 3]))
            weights.copy_(new_weights)
            mask.copy_(torch.arange(256, device="cuda") % 5 != seed)
            real = tokens - tokens * seed // 10
            rows.fill_(real)
            graph.replay()
            flags = torch.zeros(3, dtype=torch.bool, device="cuda")
            elsewhere = memory.differs(memory.wanted(right()), outputs, guards, flags, real)
            replays += 1
            if names := memory.names(flags, elsewhere):
                failures.append(f"policy {policy}, {tokens} tokens, replay {seed}: {names}")
    return replays, failures


def jobs(part: int, parts: int, deadline: float) -> list[tuple[int, int, int, float]]:
    sizes = [size for size in itertools.product(EXPERTS, TOPK, TOKENS) if size[1] <= size[0]]
    random.Random(0).shuffle(sizes)  # so that what time leaves out is no end of a list
    return [(*size, deadline) for size in sizes[part - 1 :: parts]]


def run_jobs(
    todo: Sequence[tuple[int, int, int, float]], devices: int, processes: int
) -> list[dict[str, Any]]:
    """On so many GPUs, each kept busy by so many processes; all compile first."""
    context = multiprocessing.get_context("spawn")
    variants = list(itertools.product(EXPERTS, DTYPES, *[(False, True)] * 2))
    with context.Pool(min(len(variants), multiprocessing.cpu_count())) as pool:
        pool.map(compile_ahead, variants, chunksize=1)
    pools = [context.Pool(processes, torch.cuda.set_device, (device,)) for device in range(devices)]
    pending = [
        pool.map_async(check, todo[device::devices], chunksize=1)
        for device, pool in enumerate(pools)
    ]
    results = [result for one in pending for result in one.get()]
    for pool in pools:
        pool.terminate()
    return results


def summary(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All that the parts found; ValueError where they are not parts of one whole."""
    of, *others = {int(name.split("/")[1]) for name in parts}
    if others:
        raise ValueError(f"parts {sorted(parts)} overlap: all must be of one N")
    missing = {f"{part}/{of}" for part in range(1, of + 1)} - parts.keys()

    def total(key: str) -> int:
        return sum(int(part[key]) for part in parts.values())

    def every(key: str) -> list[Any]:
        return [one for part in parts.values() for one in part[key]]

    matrix = {
        "experts": EXPERTS, "topk": TOPK, "tokens": TOKENS, "blocks": BLOCKS,
        "routings, rows of -1": ROUTINGS, "rounded buffers": ROUNDED,
        "expert_mask, num_local_tokens": OPTIONS, "policies": POLICIES,
    }  # fmt: skip
    return {
        "command": "python -m calibration.check_triton_contract",
        "matrix": matrix,
        "combinations_of_the_matrix": len(jobs(1, 1, 0.0)) * A_JOB,
        "combinations": total("combinations"),
        "left_out_for_time": total("left_out"),
        "parts_missing": sorted(missing),
        "sorts": total("combinations") * len(POLICIES),
        "wrong_sorts": len(every("failures")),
        "wrong": every("failures")[:50],
        "graph_replays": total("replays"),
        "wrong_replays": every("wrong_replays"),
        "parts": parts,
    }


def run_part(name: str, devices: int, processes: int, seconds: float) -> dict[str, Any]:
    import triton

    began = time.time()
    part, parts = map(int, name.split("/"))
    results = run_jobs(jobs(part, parts, began + seconds), devices, processes)
    replays, wrong_replays = check_replay()
    return {
        "gpu": torch.cuda.get_device_name(), "devices": devices, "torch": torch.__version__,
        "triton": triton.__version__, "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"), "seconds": round(time.time() - began, 1),
        "combinations": sum(result["combinations"] for result in results),
        "left_out": sum(result["left_out"] for result in results),
        "failures": [failure for result in results for failure in result["failures"]],
        "replays": replays, "wrong_replays": wrong_replays,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--devices", type=int, help="GPUs to use [all]")
    parser.add_argument("--processes", type=int, default=4, help="on each of them [4]")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start none after so long")
    parser.add_argument("--part", default="1/1", help="I/N: every Nth job, from the Ith on [1/1]")
    parser.add_argument("--merge", type=Path, nargs="+", help="results of parts; nothing is run")
    args = parser.parse_args()
    if args.merge:
        parts = [json.loads(path.read_text())["parts"] for path in args.merge]
        result = summary({name: part for one in parts for name, part in one.items()})
    else:
        devices = args.devices or torch.cuda.device_count()
        result = summary({args.part: run_part(args.part, devices, args.processes, args.seconds)})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(record.as_text(result) + "\n")
    print(record.as_text({key: value for key, value in result.items() if key != "matrix"}))
    return 1 if result["wrong_sorts"] or result["wrong_replays"] else 0


if __name__ == "__main__":
    sys.exit(main())
