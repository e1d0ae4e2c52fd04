"""Tables decided from made-up samples: real evidence, no kernel, no clock."""

import random
from collections.abc import Sequence
from dataclasses import replace

from adaptive_moe.disk.file import DECISION_VERSION, Key, Request, Stored
from adaptive_moe.policy.decision import Candidate, Rule, Standing, combine, decide
from adaptive_moe.policy.environment import Environment
from adaptive_moe.policy.table import SCHEMA, Bucket, Calibration, Fill, PolicyTable
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.routing import fills

SHAPE = SortingShape(256, 8, 7168)
RULE = Rule()
HERE = Environment("AMD Instinct MI300X", "gfx942", 304, "ROCm 7.0", "2.9.0", "3.12.3")
EAGER = tuple(1 << k for k in range(14))
GRAPH = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def made_up_table(
    seed: int,
    *,
    gains: Sequence[float] = (0.0, 0.05, -0.10),
    noise: float = 0.01,
    speed: float = 1.0,
    eager: Sequence[int] = EAGER,
    graph: Sequence[int] = GRAPH,
    shape: SortingShape = SHAPE,
    kernel: str = "aiter 0.1.9 opus",
    environment: Environment = HERE,
    max_tokens: int = 16384,
    rounds: int = 40,
    rule: Rule = RULE,
    out: dict[int, tuple[Standing, str]] | None = None,
) -> PolicyTable:
    """gains: what each policy truly saves of policy 0's time. speed: policy 0's time is over it."""
    chance = random.Random(seed)

    def bucket(count: int) -> Bucket:
        parts = []
        for fraction in fills(shape):
            base = [(5.0 + 0.01 * count) / speed * chance.gauss(1.0, noise) for _ in range(rounds)]
            candidates = []
            for policy, gain in enumerate(gains):
                times = [(1.0 - gain) * t * chance.gauss(1.0, noise) for t in base]
                found = Candidate(policy, tuple(base if policy == 0 else times))
                if out and policy in out:
                    found = replace(found, out=out[policy][0], reason=out[policy][1])
                candidates.append(found)
            parts.append(Fill(fraction, decide(candidates, rule)))
        policy, reason = combine([part.verdict for part in parts])
        return Bucket(count, policy, reason, tuple(parts))

    return PolicyTable(
        Calibration(
            schema=SCHEMA,
            shape=shape,
            kernel=kernel,
            policies=tuple(range(len(gains))),
            environment=environment,
            rule=rule,
            max_tokens=max_tokens,
            created="2026-01-01T00:00:00+00:00",
            seconds=1.0,
            eager=tuple(bucket(count) for count in eager),
            graph=tuple(bucket(count) for count in graph),
        )
    )


def key_of(table: PolicyTable) -> Key:
    return stored_of(table).key


def stored_of(table: PolicyTable) -> Stored:
    captured = tuple(b.num_tokens for b in table.evidence.graph)
    return Stored(Request(DECISION_VERSION, captured, ()), table)
