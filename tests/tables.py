"""Hand-made policy tables for tests that are not about measuring."""

from types import SimpleNamespace

from adaptive_moe.policy.decision import Rule, Verdict
from adaptive_moe.policy.environment import Environment
from adaptive_moe.policy.table import SCHEMA, Bucket, Calibration, Fill, PolicyTable
from adaptive_moe.shape import SortingShape

ENVIRONMENT = Environment("test device", "none", 1, "", "0", "0")


def make_table(eager: dict[int, int], graph: dict[int, int] | None = None, **shape) -> PolicyTable:
    """A table whose buckets, token count -> policy, are given."""
    return PolicyTable(
        Calibration(
            schema=SCHEMA,
            shape=SortingShape(**{"num_experts": 16, "topk": 4, "model_dim": 64, **shape}),
            kernel="made by hand",
            policies=(0, 1, 2),
            environment=ENVIRONMENT,
            rule=Rule(),
            max_tokens=max(eager),
            created="2026-01-01T00:00:00+00:00",
            seconds=0.0,
            eager=_buckets(eager),
            graph=_buckets(graph or {}),
        )
    )


def _buckets(policies: dict[int, int]) -> tuple[Bucket, ...]:
    return tuple(
        Bucket(count, policy, "made by hand", (Fill(1.0, _verdict(policy)),))
        for count, policy in sorted(policies.items())
    )


def _verdict(policy: int) -> Verdict:
    return Verdict(policy, True, 4, "made by hand", ())


def measure_as(eager: dict[int, int], graph: dict[int, int] | None = None, log: list | None = None):
    """A stand-in for `calibrate` that returns the same table for every shape, and keeps a record
    of what it was asked."""

    def measure(kernel, shape, plan, *, expert_mask=None):
        if log is not None:
            log.append(SimpleNamespace(kernel=kernel, shape=shape, plan=plan, mask=expert_mask))
        return make_table(eager, graph)

    return measure
