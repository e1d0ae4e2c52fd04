"""Cost of the hot path's table lookup, as a caller performs it.

Against indexing a plain `bytes` in the same loop, and against what it replaces: vLLM's cached
static read, a class attribute behind a classmethod behind a decorator that checks a flag.
"""

import argparse
import functools
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Result, Rule, Standing, Verdict
from adaptive_moe.policy.environment import Environment
from adaptive_moe.policy.evidence import SCHEMA, Bucket, Calibration, Fill
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.shape import SortingShape
from calibration.record import main, stamp

LAST = 16384


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=200, help="interleaved rounds [200]")
    parser.add_argument("--lookups", type=int, default=10_000, help="lookups a sample [10000]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    counts = [1 + (i * 7919) % LAST for i in range(args.lookups)]
    few, many = table_of(3), table_of(1000)
    plain = bytes(few.eager)
    loops: dict[str, Callable[[], None]] = {
        "bytes": functools.partial(index_bytes, plain, counts),
        "lookup": functools.partial(look_up, few.eager, counts),
        "lookup_many_buckets": functools.partial(look_up, many.eager, counts),
        "static_read": functools.partial(read_static, counts),
    }
    times = _interleaved(loops, args.rounds)

    def ratio(over: str, under: str) -> float:
        pairs = zip(times[over], times[under], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 4)

    return {
        **stamp(),
        "lookups_a_sample": args.lookups,
        "rounds": args.rounds,
        "ratio_to_bytes": ratio("lookup", "bytes"),
        "ratio_to_static_read": ratio("lookup", "static_read"),
        "ratio_1000_buckets_to_3": ratio("lookup_many_buckets", "lookup"),
        "allocations": allocations(few.eager, counts),
    }


def look_up(array: bytes, counts: Sequence[int]) -> None:
    """The hot path's lookup, once for each count."""
    for num_tokens in counts:
        try:
            array[num_tokens]
        except IndexError:
            array[-1]


def index_bytes(array: bytes, counts: Sequence[int]) -> None:
    for num_tokens in counts:
        array[num_tokens]


def read_static(counts: Sequence[int]) -> None:
    for _ in counts:
        _Static.get_policy()


def allocations(array: bytes, counts: Sequence[int]) -> int:
    """Bytes a loop of lookups takes at its peak beyond a loop without any, seen by tracemalloc."""

    def peak(looked_up: bytes | None) -> int:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for num_tokens in counts:
            if looked_up is not None:
                looked_up[num_tokens]
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    try:
        return max(0, peak(array) - peak(None))
    finally:
        tracemalloc.stop()


def table_of(buckets: int) -> PolicyTable:
    """A table over 1..LAST with that many buckets, in each of which the next candidate is ahead."""
    counts = sorted({1 + i * (LAST - 1) // (buckets - 1) for i in range(buckets)})
    names = ("policy 0", "policy 1", "policy 2")
    coverage = Coverage.up_to(SortingShape(8, 2, 64), LAST, busy_from=1)

    def bucket(count: int, place: int) -> Bucket:
        verdict = Verdict(names[place], True, 0, "made up", (Result(names[0], Standing.BASELINE),))
        return Bucket(count, names[place], "made up", (Fill(1.0, verdict),))

    return PolicyTable(
        Calibration(
            schema=SCHEMA,
            coverage=coverage,
            kernel="none",
            candidates=names,
            environment=Environment("none", "none", 1, "", "none", "none"),
            rule=Rule(),
            budget_s=1.0,
            created="",
            seconds=0.0,
            graph=(),
            busy=tuple(bucket(count, place % 3) for place, count in enumerate(counts)),
            idle=(),
        )
    )


def _interleaved(loops: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            begun = time.perf_counter()
            loops[name]()
            times[name].append(time.perf_counter() - begun)
    return times


def _if_enabled(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if _Static.enabled else None

    return wrapper


class _Static:
    """The shape of an engine's cached read, for comparison."""

    enabled = True
    _policy: int | None = 2

    @classmethod
    @_if_enabled
    def get_policy(cls) -> int | None:
        if cls._policy is None:
            cls._policy = 0
        return cls._policy


if __name__ == "__main__":
    main(__doc__, add_options, run)
