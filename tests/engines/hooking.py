"""What the tests of the hook share: the stand-in's calls, and tables made by hand."""

from collections.abc import Mapping

import torch

from adaptive_moe.engines.hook import AiterHook, Key
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Rule, Verdict
from adaptive_moe.policy.environment import Environment
from adaptive_moe.policy.evidence import SCHEMA, Bucket, Calibration, Fill
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.settings import Mode, Settings
from adaptive_moe.shape import SortingShape

AUTO = Settings(mode=Mode.AUTO)
KEY = Key(16, 4, 64, torch.bfloat16, 32, False, False, True, False, (), 0, -1)
ENVIRONMENT = Environment("test device", "none", 1, "", "0", "0")


def table(
    eager: Mapping[int, object],
    graph: Mapping[int, object] | None = None,
    *,
    baseline: object = 0,
    others: tuple[str, ...] = (),
) -> PolicyTable:
    """Token count -> who sorts from there on: a policy, or the name of another sort."""
    rest = [f"policy {policy}" for policy in (0, 1, 2) if policy != baseline]
    return PolicyTable(
        Calibration(
            schema=SCHEMA,
            coverage=Coverage(
                SortingShape(16, 4, 64), f"policy {baseline}", ((1, max(eager)),), busy_from=1
            ),
            kernel="made by hand",
            candidates=(f"policy {baseline}", *rest, *others),
            environment=ENVIRONMENT,
            rule=Rule(),
            budget_s=1.0,
            created="2026-01-01T00:00:00+00:00",
            seconds=0.0,
            graph=_buckets(graph or {}),
            busy=_buckets(eager),
            idle=(),
        )
    )


def _buckets(chosen: Mapping[int, object]) -> tuple[Bucket, ...]:
    names = {n: who if isinstance(who, str) else f"policy {who}" for n, who in chosen.items()}
    return tuple(
        Bucket(n, name, "by hand", (Fill(1.0, Verdict(name, True, 4, "by hand", ())),))
        for n, name in sorted(names.items())
    )


def batch(num_tokens, *, experts=16, topk=4, dim=64, seed=0):
    """What fused_moe is called with: hidden_states, w1, w2, topk_weight, topk_ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand((num_tokens, experts), generator=generator).argsort(1)[:, :topk]
    return (
        torch.zeros((num_tokens, dim), dtype=torch.bfloat16),
        torch.zeros((experts, 32, dim), dtype=torch.bfloat16),
        torch.zeros((experts, dim, 16), dtype=torch.bfloat16),
        torch.rand((num_tokens, topk), generator=generator),
        ids.int().contiguous(),
    )


def sort_arguments(num_tokens, **shape):
    """The leading arguments of moe_sorting, as fused_moe passes them."""
    hidden, _, w2, weights, ids = batch(num_tokens, **shape)
    return [ids, weights, w2.shape[0], hidden.shape[1], hidden.dtype, 32, None, None, 0]


def sorts(number=1):
    """The latest calls that arrived at the sort itself."""
    import aiter.sort

    return list(aiter.sort.calls)[-number:]


def arrived():
    """The policy with which the latest call arrived at the sort itself."""
    return sorts()[0].policy


def installed(module, settings=AUTO, tables=None, **options):
    hook = AiterHook(settings, **options)
    assert hook.install(module)
    hook.set_tables(tables or {})
    return hook
