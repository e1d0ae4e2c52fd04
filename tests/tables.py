"""Hand-made policy tables for tests that are not about measuring."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Result, Rule, Standing, Verdict
from adaptive_moe.policy.environment import Environment
from adaptive_moe.policy.evidence import SCHEMA, Bucket, Calibration, Fill
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.shape import SortingShape

ENVIRONMENT = Environment("test device", "none", 1, "", "0", "0")
CANDIDATES = ("policy 0", "policy 1", "policy 2")


def make_table(
    eager: Mapping[int, int],
    graph: Mapping[int, int] | None = None,
    *,
    idle: Mapping[int, int] | None = None,
    candidates: Sequence[str] = CANDIDATES,
    coverage: Coverage | None = None,
    standing: Standing | None = None,
    **other,
) -> PolicyTable:
    """A table whose buckets, token count -> index of the candidate, are given.

    The eager ones were measured on a busy device, which decides alone: busy_from is 1 unless a
    coverage says otherwise. idle: those of an idle device. standing: of every candidate but the
    baseline and a bucket's winner (SLOWER). other: fields of the shape, or of the Calibration.
    """
    fields = Calibration.__dataclass_fields__.keys()
    evidence = {name: other.pop(name) for name in list(other) if name in fields}
    if coverage is None:
        shape = SortingShape(**{"num_experts": 16, "topk": 4, "model_dim": 64, **other})
        coverage = Coverage.up_to(
            shape, max(eager), tuple(graph or ()), baseline=candidates[0], busy_from=1
        )
    sections = {
        name: tuple(
            _bucket(count, index, candidates, standing or Standing.SLOWER)
            for count, index in sorted((given or {}).items())
        )
        for name, given in (("busy", eager), ("graph", graph), ("idle", idle))
    }
    facts = {
        "schema": SCHEMA,
        "coverage": coverage,
        "kernel": "made by hand",
        "candidates": tuple(candidates),
        "environment": ENVIRONMENT,
        "rule": Rule(),
        "budget_s": 1.0,
        "created": "2026-01-01T00:00:00+00:00",
        "seconds": 0.0,
    }
    return PolicyTable(Calibration(**{**facts, **sections, **evidence}))


def _bucket(count: int, index: int, candidates: Sequence[str], standing: Standing) -> Bucket:
    """The baseline takes 10 us, the winner 7, the others 12."""
    results = [Result(candidates[0], Standing.BASELINE, 10.0, 0.0)]
    for name in candidates[1:]:
        if name == candidates[index]:
            results.append(Result(name, Standing.FASTER, 7.0, 0.3, 0.25, 0.35))
        else:
            results.append(Result(name, standing, 12.0, -0.2, -0.25, -0.15))
    verdict = Verdict(candidates[index], True, 8, "made by hand", tuple(results))
    return Bucket(count, candidates[index], "made by hand", (Fill(1.0, verdict),))


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
        below = coverage.busy_from - 1
        return make_table(
            _up_to(coverage.max_tokens, eager),
            graph and {n: i for n, i in graph.items() if n in coverage.captured},
            idle=_up_to(min(below, coverage.max_tokens), eager) if below else None,
            candidates=[candidate.name for candidate in kernel.candidates],
            coverage=coverage,
            kernel=kernel.name,
        )

    return measure


def _up_to(last: int, buckets: Mapping[int, int]) -> dict[int, int]:
    """Those up to that count; it takes the choice of the bucket that serves it."""
    return {min(n, last): index for n, index in sorted(buckets.items(), reverse=True)}
