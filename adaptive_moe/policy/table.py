"""PolicyTable: one byte a token count, for graph-captured and for eager calls, and the evidence.

The hot path holds one of the two arrays and indexes it: `table.eager[num_tokens]`. Arrays are plain
`bytes`, so that is the whole cost. Index 0 is never used (an empty batch is not sorted); a count
past the end takes the last byte, which the caller reads when the index raises IndexError:

    try:
        policy = eager[num_tokens]
    except IndexError:
        policy = eager[-1]

`PolicyTable.policy` is the same with its argument checked, for everybody who is not a hot path.

The arrays are always derived from the evidence, also on load: a table cannot contradict its own
measurements.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

from adaptive_moe.policy.buckets import bucket_of, spread
from adaptive_moe.policy.decision import Rule, Verdict
from adaptive_moe.policy.environment import Environment
from adaptive_moe.policy.plain import from_plain, to_plain
from adaptive_moe.settings import MAX_POLICY, MAX_TOKENS
from adaptive_moe.shape import SortingShape

SCHEMA = 1


@dataclass(frozen=True)
class Fill:
    """The verdict with `fraction` of the rows real (1.0 but for padded expert-parallel shapes)."""

    fraction: float
    verdict: Verdict


@dataclass(frozen=True)
class Bucket:
    """What was measured and decided at one token count."""

    num_tokens: int
    policy: int
    reason: str
    fills: tuple[Fill, ...]


@dataclass(frozen=True)
class Calibration:
    """Everything one calibration measured; JSON-able and enough to explain any decision later.

    graph is empty where calls are never captured: the eager buckets then serve both arrays.
    created is UTC in ISO 8601; seconds is wall-clock time.
    """

    schema: int
    shape: SortingShape
    kernel: str
    policies: tuple[int, ...]
    environment: Environment
    rule: Rule
    max_tokens: int
    created: str
    seconds: float
    eager: tuple[Bucket, ...]
    graph: tuple[Bucket, ...] = ()


@dataclass(frozen=True)
class PolicyTable:
    """Dense arrays over num_tokens, from a calibration.

    Raises ValueError where the evidence is not whole: no bucket, counts that do not rise or are out
    of bounds, or a policy that was not among those offered.
    """

    evidence: Calibration
    eager: bytes = field(init=False)
    graph: bytes = field(init=False)

    def __post_init__(self) -> None:
        found = self.evidence
        if found.schema != SCHEMA:
            raise ValueError(f"schema {found.schema!r} is not {SCHEMA}: calibrate again")
        eager = _expand(found.eager, found.policies, found.max_tokens)
        graph = eager
        if found.graph:
            graph = _expand(found.graph, found.policies, found.graph[-1].num_tokens)
        # The dataclass is frozen; these two are derived, once.
        object.__setattr__(self, "eager", eager)
        object.__setattr__(self, "graph", graph)

    def policy(self, num_tokens: int, *, captured: bool = False) -> int:
        """The policy for a batch; ValueError for anything but an integer of 1 or more."""
        if not isinstance(num_tokens, int) or isinstance(num_tokens, bool) or num_tokens < 1:
            raise ValueError(f"num_tokens={num_tokens!r} is not accepted: give an integer >= 1")
        array = self.graph if captured else self.eager
        return array[min(num_tokens, len(array) - 1)]

    def bucket(self, num_tokens: int, *, captured: bool = False) -> Bucket:
        """The measured bucket behind `policy(num_tokens)`."""
        buckets = self.evidence.graph if captured and self.evidence.graph else self.evidence.eager
        return buckets[bucket_of(num_tokens, [b.num_tokens for b in buckets])]

    def to_json(self) -> str:
        """The evidence as JSON, with the arrays run-length encoded beside it for readers."""
        plain = to_plain(self.evidence)
        plain["applied"] = {"eager": runs(self.eager), "graph": runs(self.graph)}
        return json.dumps(plain, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "PolicyTable":
        """Rebuild a table; ValueError saying what is wrong where the text is not a whole one."""
        try:
            plain: Any = json.loads(text, parse_constant=_no_constant)
        except RecursionError:
            raise ValueError("the JSON is nested too deeply") from None
        if isinstance(plain, dict):
            plain.pop("applied", None)
        return cls(from_plain(Calibration, plain))


def runs(array: bytes) -> list[tuple[int, int, int]]:
    """(first, last, policy) for each run of equal policies over num_tokens >= 1."""
    found: list[tuple[int, int, int]] = []
    first = 1
    for policy, group in groupby(array[1:]):
        length = sum(1 for _ in group)
        found.append((first, first + length - 1, policy))
        first += length
    return found


def _expand(buckets: Sequence[Bucket], policies: Sequence[int], last: int) -> bytes:
    counts = [b.num_tokens for b in buckets]
    if not counts:
        raise ValueError("a calibration without buckets has no table: calibrate again")
    if counts[0] < 1 or any(low >= high for low, high in pairwise(counts)):
        raise ValueError(f"bucket token counts must rise from 1: {counts[:8]}")
    if not counts[-1] <= last <= MAX_TOKENS:
        raise ValueError(f"max_tokens={last} is not from {counts[-1]} to {MAX_TOKENS}")
    for bucket in buckets:
        if bucket.policy not in policies or not 0 <= bucket.policy <= MAX_POLICY:
            raise ValueError(f"policy {bucket.policy!r} is not one of those offered, {policies}")
    return spread([b.policy for b in buckets], counts, last)


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not a number a calibration can hold")
