"""Tables made by hand, as a calibration would have left them."""

import itertools
import math

from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.evidence import (
    SCHEMA,
    Bucket,
    Environment,
    Evidence,
    Exclusion,
    Fill,
    Ratios,
    Result,
    Rule,
)
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.shape import SortingShape
from adaptive_moe.store.key import Request, TableKey, key_of

SHAPE = SortingShape(16, 4, 64)
COVERAGE = Coverage.up_to(SHAPE, 64, (1, 8), busy_from=1)
HERE = Environment(
    device="AMD Instinct MI300X",
    arch="gfx942",
    compute_units=304,
    memory_gib=192,
    runtime="ROCm 7.2",
    torch="2.13.0",
    python="3.11.7",
    host="AMD EPYC 9654",
)
REQUEST = Request("vllm 0.33.0")
NAMES = ("policy 0", "policy 1", "policy 2")
UNSURE = Ratios(rounds=5, mean=math.log(0.6), spread=0.4)


def ratios(ratio: float, rounds: int = 20) -> Ratios:
    """Of a candidate that surely takes so many times as long as the baseline."""
    return Ratios(rounds, math.log(ratio), 1e-4 * rounds)


def result(name: str, ratio: float | None) -> Result:
    """ratio: over the baseline's time; None where it may be fastest, and is not settled."""
    if ratio is None:
        return Result(name, 6.0, UNSURE)
    second = ratios(ratio, 15) if ratio < 1.0 else None
    return Result(name, 10.0 * ratio, ratios(ratio), second)


def bucket(num_tokens: int, given: list[float | None], names=NAMES) -> Bucket:
    results = [Result(names[0], 10.0, ratios(1.0))]
    results += [result(name, ratio) for name, ratio in zip(names[1:], given, strict=True)]
    return Bucket(num_tokens, (Fill(1.0, tuple(results)),))


def made_table(
    *given: float | None,
    coverage: Coverage = COVERAGE,
    names: tuple[str, ...] = NAMES,
    wrong: tuple[str, ...] = (),
    failed: tuple[str, ...] = (),
    first: int = 1,
    **other,
) -> PolicyTable:
    """given: the ratio of each candidate but the baseline in every bucket, by default those of a
    policy 1 that wins; None where it is left open. other: fields of the evidence."""
    given = given or (0.7, 1.2)
    sizes = coverage.captured
    counts = [n for n in (first, 8, 64) if n in (range(1, coverage.max_tokens + 1))]
    excluded = [Exclusion(name, True, "sorted_ids has other entries") for name in wrong]
    excluded += [Exclusion(name, False, "raised OutOfMemoryError") for name in failed]
    facts = {
        "schema": SCHEMA,
        "coverage": coverage,
        "kernel": "aiter 0.1.22 opus, 0123456789ab",
        "candidates": names,
        "environment": HERE,
        "rule": Rule(),
        "budget_s": 1.5,
        "created": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "cut_short": None in given,
        "excluded": tuple(excluded),
        "graph": tuple(bucket(n, given, names) for n in sizes),
        "eager": tuple(bucket(n, given, names) for n in counts),
        **other,
    }
    return PolicyTable(Evidence(**facts))


_numbers = itertools.count(1)


def another(*given: float | None, **other) -> PolicyTable:
    """The same question, and other rounds: as each rank or start has its own."""
    return made_table(*given, **{"seconds": 1.0 + next(_numbers) / 1000, **other})


def key_for_table(table: PolicyTable, request: Request = REQUEST) -> TableKey:
    return key_of(request, table.evidence)


KEY = key_for_table(made_table())
