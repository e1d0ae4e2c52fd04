"""Tables decided from made-up samples: real evidence, no kernel, no clock."""

import random
from collections.abc import Sequence
from dataclasses import replace

from adaptive_moe.disk.file import Key, Request, Stored
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Rule, Samples, Standing, decide
from adaptive_moe.policy.environment import Environment
from adaptive_moe.policy.evidence import SCHEMA, Bucket, Calibration, Fill
from adaptive_moe.policy.losses import combine
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.shape import SortingShape

SHAPE = SortingShape(256, 8, 7168)
PADDED = replace(SHAPE, local_experts=32, num_local_tokens=True)
RULE = Rule()
HERE = Environment("AMD Instinct MI300X", "gfx942", 304, "ROCm 7.0", "2.9.0", "3.12.3")
ENGINE = "vllm 0.33.0"
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
    captured: Sequence[int] | None = None,
    idle: Sequence[int] = (),
    busy_from: int = 1,
    shape: SortingShape = SHAPE,
    kernel: str = "aiter 0.1.9 opus",
    environment: Environment = HERE,
    max_tokens: int = 16384,
    rounds: int = 40,
    rule: Rule = RULE,
    budget_s: float = 0.75,
    names: Sequence[str] = ("policy 0", "policy 1", "policy 2", "flydsl"),
    out: dict[int, tuple[Standing, str]] | None = None,
) -> PolicyTable:
    """gains: what each candidate truly saves of the baseline's time. speed: the baseline's time is
    over it. out: by candidate. captured: all captured sizes, where more than in `graph`."""
    chance = random.Random(seed)
    candidates = tuple(names[: len(gains)])

    def bucket(count: int) -> Bucket:
        parts = []
        for fraction in (0.125, 0.5, 1.0) if shape.num_local_tokens else (1.0,):
            base = [(5.0 + 0.01 * count) / speed * chance.gauss(1.0, noise) for _ in range(rounds)]
            samples = []
            for place, gain in enumerate(gains):
                times = [(1.0 - gain) * t * chance.gauss(1.0, noise) for t in base]
                found = Samples(candidates[place], tuple(times if place else base))
                if out and place in out:
                    found = replace(found, out=out[place][0], reason=out[place][1])
                samples.append(found)
            parts.append(Fill(fraction, decide(samples, rule)))
        return Bucket(count, *combine([part.verdict for part in parts], rule.margin), tuple(parts))

    sizes = graph if captured is None else captured
    return PolicyTable(
        Calibration(
            schema=SCHEMA,
            coverage=Coverage.up_to(
                shape, max_tokens, sizes, baseline=names[0], busy_from=busy_from
            ),
            kernel=kernel,
            candidates=candidates,
            environment=environment,
            rule=rule,
            budget_s=budget_s,
            created="2026-01-01T00:00:00+00:00",
            seconds=1.0,
            graph=tuple(bucket(count) for count in graph),
            busy=tuple(bucket(count) for count in eager),
            idle=tuple(bucket(count) for count in idle),
        )
    )


def key_of(table: PolicyTable) -> Key:
    return stored_of(table).key


def stored_of(table: PolicyTable) -> Stored:
    return Stored(Request(ENGINE), table)
