"""Hand-made evidence and tables for tests that are not about measuring."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from adaptive_moe.kernels.environment import describe_environment
from adaptive_moe.policy.coverage import Coverage, Situation
from adaptive_moe.policy.evidence import (
    SCHEMA,
    Bucket,
    Environment,
    Evidence,
    Fill,
    Ratios,
    Result,
    Rule,
)
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.shape import SortingShape

ENVIRONMENT = Environment("test device", "none", 1, 0, "", "0", "0", "test host")
CANDIDATES = ("policy 0", "policy 1", "policy 2")
BASE_US, HOST_US = 10.0, 20.0


def ratios(gain: float, rounds: int = 20, noise: float = 0.0) -> Ratios:
    """Rounds in which a candidate saves `gain` of the baseline's time, on average; noise is the
    standard deviation of their logarithms."""
    return Ratios(rounds, math.log1p(-gain), noise * noise * rounds)


def result(
    name: str,
    gain: float | None = None,
    *,
    second: float | None = None,
    host: float | None = None,
    rounds: int = 20,
    noise: float = 0.0,
    base_us: float = BASE_US,
    dropped: float | None = None,
) -> Result:
    """Of a candidate that saves `gain` in the first pass, `second` in the second one, and `host` of
    the host's time; None for what was not measured."""
    return Result(
        name,
        None if gain is None else base_us * (1.0 - gain),
        None if gain is None else ratios(gain, rounds, noise),
        None if second is None else ratios(second, rounds, noise),
        None if host is None else ratios(host, rounds, noise),
        None if host is None else HOST_US * (1.0 - host),
        dropped,
    )


def bucket(
    num_tokens: int, *fills: Sequence[Result], fractions: Sequence[float] = (1.0,)
) -> Bucket:
    """Each fill is the results of all candidates, the baseline first."""
    return Bucket(num_tokens, tuple(map(Fill, fractions, map(tuple, fills))))


def winning(num_tokens: int, index: int, candidates: Sequence[str] = CANDIDATES) -> Bucket:
    """A bucket in which that candidate surely saves 30%, and the others lose 20%."""
    results = [result(candidates[0], 0.0)]
    for place, name in enumerate(candidates[1:], start=1):
        won = place == index
        results.append(result(name, 0.3, second=0.3) if won else result(name, -0.2))
    return bucket(num_tokens, results)


def make_evidence(eager: Sequence[Bucket], graph: Sequence[Bucket] = (), **fields: Any) -> Evidence:
    """Evidence of these buckets; fields: of Evidence, or of the shape."""
    known = {n: fields.pop(n) for n in list(fields) if n in Evidence.__dataclass_fields__}
    names = tuple(r.candidate for r in eager[0].fills[0].results)
    shape = SortingShape(**{"num_experts": 16, "topk": 4, "model_dim": 64, **fields})
    sizes = tuple(b.num_tokens for b in graph)
    coverage = Coverage.up_to(shape, eager[-1].num_tokens, sizes, baseline=names[0], busy_from=1)
    facts = {
        "schema": SCHEMA,
        "coverage": coverage,
        "kernel": "made by hand",
        "candidates": names,
        "environment": ENVIRONMENT,
        "rule": Rule(),
        "budget_s": 1.0,
        "created": "2026-01-01T00:00:00+00:00",
        "seconds": 0.0,
    }
    return Evidence(**{**facts, **known, "eager": tuple(eager), "graph": tuple(graph)})


def make_table(
    eager: Mapping[int, int],
    graph: Mapping[int, int] | None = None,
    *,
    candidates: Sequence[str] = CANDIDATES,
    **fields: Any,
) -> PolicyTable:
    """A table in which each eager count has the candidate, by index, that is given for it or for
    the next count above; captured ones are given one by one. Device time alone decides: busy_from
    is 1 unless a coverage says otherwise. fields: as in make_evidence."""
    counts = sorted(eager)
    # Where the candidate changes there is a bucket on each side.
    edges = {low + 1: eager[high] for low, high in pairwise(counts)}
    spans = fields["coverage"].eager if "coverage" in fields else ((1, counts[-1]),)
    within = {n: i for n, i in edges.items() if any(a <= n <= b for a, b in spans)}
    sections = [
        [winning(n, index, candidates) for n, index in sorted(given.items())]
        for given in (within | dict(eager), graph or {})
    ]
    return PolicyTable(make_evidence(*sections, **fields))


def measure_as(
    eager: Mapping[int, int], graph: Mapping[int, int] | None = None, log: list | None = None
):
    """A stand-in for `calibrate`: the same choices for every coverage, up to its largest batch and
    at its captured sizes, and a record of what it was asked."""

    def measure(kernel, coverage, plan=None, *, expert_mask=None, earlier=None, **options):
        coverage = coverage.on(kernel.device.type)
        if log is not None:
            log.append(
                SimpleNamespace(
                    kernel=kernel, coverage=coverage, plan=plan, mask=expert_mask, earlier=earlier
                )
            )
        domain = list(coverage.counts(Situation.EAGER))
        last = domain[-1]
        wanted = {min(n, last): index for n, index in sorted(eager.items(), reverse=True)}
        return make_table(
            {n: index for n, index in wanted.items() if n in domain} or {last: 0},
            graph and {n: i for n, i in graph.items() if n in coverage.captured},
            candidates=[candidate.name for candidate in kernel.candidates],
            coverage=coverage,
            kernel=kernel.name,
            environment=describe_environment(kernel.device),
            starts=earlier.starts + 1 if earlier else 1,
        )

    return measure
