"""Merge time and message sizes for 8 to 4,096 simulated ranks, in one process on one core."""

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.ranks.messages import decide, encode_decision, encode_message
from adaptive_moe.ranks.summary import MAX_BYTES, encode, summarize
from adaptive_moe.shape import SortingShape

from .made_up import EAGER, GRAPH, PADDED, SHAPE, made_up_table

# What 4,096 ranks may cost the one that merges, on one core.
MOST_S = 1.0
# Where bisection around a crossover may put buckets; each rank takes a few of them.
BETWEEN = (3, 6, 12, 20, 23, 24, 28, 40, 45, 48, 56, 72, 91, 96, 181, 362, 724, 1448, 3000, 6000)


def run(sizes: Sequence[int]) -> dict[str, Any]:
    """Every rank measured with noise of its own and refined at counts of its own."""
    rows = [
        {"shape": name, **_row(shape, size)}
        for name, shape in (("plain", SHAPE), ("padded, 3 fills", PADDED))
        for size in sizes
    ]
    same = _message(made_up_table(0))
    begun = time.perf_counter()
    decide(dict.fromkeys(range(max(sizes)), same))
    warm_s = time.perf_counter() - begun
    largest = _largest_message()
    return {
        "rows": rows,
        "all_ranks_warm_ranks": max(sizes),
        "all_ranks_warm_wall_s": round(warm_s, 4),
        "largest_message_bytes": largest,
        "failures": [
            row
            for row in rows
            if row["read_and_merge_cpu_s"] > MOST_S or row["decision_bytes"] > MAX_BYTES
        ]
        + ([largest] if largest > MAX_BYTES else []),
    }


def _row(shape: SortingShape, size: int) -> dict[str, Any]:
    messages = _messages(shape, size)
    begun, used = time.perf_counter(), time.process_time()
    decision = decide(messages)
    used, seconds = time.process_time() - used, time.perf_counter() - begun
    assert not decision.missing, decision.missing
    assert not decision.voided, decision.voided
    return {
        "ranks": size,
        "largest_message_bytes": max(map(len, messages.values())),
        "decision_bytes": len(encode_decision(decision)),
        "buckets": next(iter(decision.tables.values())).count('"num_tokens"'),
        "read_and_merge_cpu_s": round(used, 4),
        "read_and_merge_wall_s": round(seconds, 4),
    }


def _messages(shape: SortingShape, size: int) -> dict[int, bytes]:
    chance = random.Random(size)
    noise = np.random.default_rng(size)
    # Deciding thousands of tables from samples takes minutes; noise goes onto the evidence of some.
    kinds = []
    for seed in range(min(size, 48)):
        more = chance.sample(BETWEEN, 6)
        kinds.append(
            made_up_table(
                seed,
                shape=shape,
                eager=sorted({*EAGER, *(n for n in more if n <= EAGER[-1])}),
                graph=sorted({*GRAPH, *(n for n in more if n <= GRAPH[-1])}),
                captured=range(1, GRAPH[-1] + 1),
                rounds=12,
            )
        )
    messages = {}
    for rank in range(size):
        table = kinds[rank % len(kinds)]
        summary = summarize(table.evidence)
        sections = tuple(
            replace(
                s,
                numbers=s.numbers * noise.normal(1.0, 0.01, s.numbers.shape),
            )
            for s in summary.sections
        )
        content = encode(replace(summary, sections=sections))
        header, _, rest = _message(table).partition(b"\n")
        assert len(rest) == len(content)
        messages[rank] = header + b"\n" + content
    return messages


def _message(table: PolicyTable) -> bytes:
    return encode_message({table.evidence.coverage: table}, {})


def _largest_message() -> int:
    """A table with far more buckets than anybody measures, at the worst shape."""
    table = made_up_table(
        1, shape=PADDED, eager=range(1, 400), graph=range(1, 400), max_tokens=400, rounds=5
    )
    return len(_message(table))
