"""Sorts for the interpreter to run: any call that AITER takes, drawn at random."""

import random
from dataclasses import dataclass, replace

import torch

from adaptive_moe.kernels import cpu_sort, triton_sort
from adaptive_moe.kernels.contract import (
    SortingInputs,
    compare,
    differences,
    expected,
    poisoned_memory,
)
from calibration.sort_contract import check_contract
from tests.wave64 import cdna
from tests.wave64.launches import on_wave64

EXPERTS = (1, 8, 32, 33, 64, 72, 128, 160, 256, 257, 320, 384, 385, 512, 513, 1024)
TOPK = (1, 2, 4, 6, 8, 9, 10, 16, 22, 32)
TOKENS = (1, 1, 2, 3, 4, 7, 8, 16, 30, 61, 64, 100, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Every 50th case is one of these: more tiles than one, and launches of many programs.
LARGE = ((512, 8, 300, 1), (128, 8, 1100, 2), (257, 9, 930, 2), (8, 2, 600, 1), (1024, 22, 100, 2))


@dataclass(frozen=True)
class Case:
    """routing: uniform, skewed or one expert; padded: which rows are -1, none, some or all.

    rows: how many are real, where the call says so on the device. many_counts, most_entries: as in
    Tuning.
    """

    experts: int
    topk: int
    tokens: int
    policy: int
    block_size: int = 32
    model_dim: int = 24
    dtype: torch.dtype = torch.bfloat16
    routing: str = "uniform"
    padded: str = "some"
    masked: bool = False
    rows: int | None = None
    rounded: bool = True
    many_counts: int = 1 << 24
    most_entries: int = 1 << 17
    seed: int = 0

    def inputs(self) -> SortingInputs:
        random_ = torch.Generator().manual_seed(self.seed)
        score = torch.rand(self.tokens, self.experts, generator=random_)
        if self.routing == "skewed":
            score *= torch.linspace(0.1, 1, self.experts) ** 3
        ids = score.argsort(1)[:, : self.topk].int()
        if self.routing == "one expert":
            ids[:] = torch.arange(self.topk) + self.seed % (self.experts - self.topk + 1)
        share = {"none": 0.0, "some": 0.3, "all": 1.0}[self.padded]
        ids[torch.rand(self.tokens, generator=random_) < share] = -1
        if self.seed % 10 == 0:
            ids[self.seed % self.tokens, self.seed % self.topk] = self.experts + self.seed % 5
        weights = torch.rand(self.tokens, self.topk, generator=random_)
        mask = (torch.rand(self.experts, generator=random_) < 0.5).int() if self.masked else None
        rows = None if self.rows is None else torch.tensor([self.rows], dtype=torch.int32)
        return SortingInputs(
            ids.contiguous(), weights, self.experts, self.model_dim, self.dtype, self.block_size,
            mask, rows,
        )  # fmt: skip


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    if seed % 50 == 0:
        experts, topk, tokens, policy = LARGE[seed // 50 % len(LARGE)]
    else:
        experts = rng.choice(EXPERTS)
        topk = rng.choice([topk for topk in TOPK if topk <= experts])
        tokens = rng.choice([tokens for tokens in TOKENS if tokens * topk <= 1100])
        policy = rng.choice((1, 1, 2))
    return Case(
        experts,
        topk,
        tokens,
        policy,
        block_size=rng.choice((16, 32, 64, 128)),
        model_dim=rng.choice((24, 7, 1000 if tokens < 70 else 24)),
        # It only changes the width of the stores that zero: not each with every number of bins.
        dtype=rng.choice(DTYPES) if experts in (8, 257) else DTYPES[0],
        routing=rng.choice(("uniform", "skewed", "one expert")),
        padded=rng.choice(("none", "some", "some", "all" if rng.random() < 0.2 else "none")),
        masked=rng.random() < 0.5,
        rows=rng.choice((None, None, 0, tokens, rng.randint(0, tokens))),
        rounded=rng.random() < 0.5,
        # Run-time choices: three launches for batches that would be sorted in two, larger chunks.
        many_counts=rng.choice((1, 1 << 24)),
        most_entries=rng.choice((0, 1 << 17)),
        seed=seed,
    )


def problems_of(case: Case, target: str) -> list[str]:
    """What is wrong with the sort of that case, by the contract and beside the CPU sort."""
    inputs = case.inputs()
    # Run-time choices, too: programs that pad and that zero take most of a small sort.
    tuning = replace(
        triton_sort.TUNING, pads=3, few_fills=3, max_fills=3, local_fills=3, many_tiles=2,
        many_counts=case.many_counts, most_entries=case.most_entries,
    )  # fmt: skip
    cdna.RCP = case.seed % 3 - 1
    kept, triton_sort.TUNING = triton_sort.TUNING, tuning
    triton_sort._bound.clear()
    try:
        with on_wave64(target, case.seed), poisoned_memory():
            outputs = triton_sort.moe_sorting(*inputs.arguments(case.policy), rounded=case.rounded)
    except cdna.Fault as fault:
        return [f"fault: {fault}"]
    finally:
        triton_sort.TUNING = kept
        triton_sort._bound.clear()
    right = expected(cpu_sort.moe_sorting(*inputs.arguments(1), rounded=case.rounded))
    return check_contract(inputs, outputs) + differences([compare(right, outputs, inputs)])[0]
