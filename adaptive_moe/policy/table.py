"""PolicyTable: one byte a token count, for graph-captured and for eager calls, and the evidence.

The hot path holds one of the two arrays and indexes it: `table.eager[num_tokens]`. A byte is an
index into the evidence's candidates, so that 0 is the baseline: the call stays as it came. Arrays
are plain `bytes`, so that is the whole cost. Index 0 is never used (an empty batch is not sorted);
a count past the end takes the last byte, which the caller reads when the index raises IndexError.

The arrays are always derived from the evidence, also on load: a table cannot contradict its own
measurements.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

from adaptive_moe.policy.buckets import bucket_of, spread
from adaptive_moe.policy.coverage import MAX_TOKENS
from adaptive_moe.policy.decision import Standing
from adaptive_moe.policy.evidence import SCHEMA, Bucket, Calibration
from adaptive_moe.policy.losses import combine
from adaptive_moe.policy.plain import from_plain, to_plain
from adaptive_moe.policy.situation import Situation

MAX_CANDIDATES = 256
Run = tuple[int, int, str]


@dataclass(frozen=True)
class PolicyTable:
    """Dense arrays over num_tokens, from a calibration.

    Raises ValueError where the evidence is not whole: no bucket, counts that do not rise or are out
    of bounds, or a candidate that was not among those offered.
    """

    evidence: Calibration
    eager: bytes = field(init=False)
    graph: bytes = field(init=False)

    def __post_init__(self) -> None:
        found = self.evidence
        if found.schema != SCHEMA:
            raise ValueError(f"schema {found.schema!r} is not {SCHEMA}: calibrate again")
        if found.candidates[:1] != (found.coverage.baseline,):
            raise ValueError(
                f"the first of {found.candidates} is not the baseline, {found.coverage.baseline}"
            )
        different = len(set(found.candidates))
        if not different == len(found.candidates) <= MAX_CANDIDATES:
            raise ValueError(f"{found.candidates} are not at most {MAX_CANDIDATES} different names")
        for situation in Situation:
            _check(found.section(situation), found.candidates)
        eager = _eager(found)
        graph = eager
        if found.graph:
            graph = _spread(found, [(b.num_tokens, b.candidate) for b in found.graph])
        # The dataclass is frozen; these two are derived, once.
        object.__setattr__(self, "eager", eager)
        object.__setattr__(self, "graph", graph)

    def __repr__(self) -> str:
        return f"PolicyTable({self.evidence.coverage.describe()}, {self.evidence.kernel})"

    @property
    def sound(self) -> bool:
        """Did every candidate run and return what the baseline returns, wherever it was tried?

        What did not may be a failure of the moment: such a table may serve, and is not kept.
        """
        return not any(
            result.standing in (Standing.FAILED, Standing.WRONG)
            for bucket in self.evidence.buckets
            for fill in bucket.fills
            for result in fill.verdict.results
        )

    @property
    def settled(self) -> bool:
        """Would more rounds change nothing?"""
        return all(f.verdict.settled for b in self.evidence.buckets for f in b.fills)

    def candidate(self, num_tokens: int, *, captured: bool = False) -> str:
        """Who sorts such a batch; ValueError for anything but an integer of 1 or more."""
        if not isinstance(num_tokens, int) or isinstance(num_tokens, bool) or num_tokens < 1:
            raise ValueError(f"num_tokens={num_tokens!r} is not accepted: give an integer >= 1")
        array = self.graph if captured else self.eager
        return self.evidence.candidates[array[min(num_tokens, len(array) - 1)]]

    def bucket(self, num_tokens: int, situation: Situation) -> Bucket | None:
        """The measured bucket that speaks for that count in that situation, if one does."""
        buckets = self.evidence.section(situation)
        if not buckets:
            return None
        return buckets[bucket_of(num_tokens, [b.num_tokens for b in buckets])]

    def runs(self, *, captured: bool = False) -> list[Run]:
        """(first, last, candidate) for each run of equal candidates over num_tokens >= 1."""
        found: list[Run] = []
        first = 1
        for index, group in groupby((self.graph if captured else self.eager)[1:]):
            length = sum(1 for _ in group)
            found.append((first, first + length - 1, self.evidence.candidates[index]))
            first += length
        return found

    def to_json(self) -> str:
        """The evidence as JSON, with the arrays run-length encoded beside it for readers."""
        plain = to_plain(self.evidence)
        plain["applied"] = {"eager": self.runs(), "graph": self.runs(captured=True)}
        return json.dumps(plain, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "PolicyTable":
        """Rebuild a table; ValueError saying what is wrong where the text is not a whole one."""
        try:
            plain: Any = json.loads(text)
        except RecursionError:
            raise ValueError("the JSON is nested too deeply") from None
        if isinstance(plain, dict):
            plain.pop("applied", None)
        return cls(from_plain(Calibration, plain))


def _eager(found: Calibration) -> bytes:
    """By the busy verdicts from busy_from on; below, by what loses in neither situation, and where
    graphs are captured of as many tokens is the choice for them, too."""
    last, busy_from = found.coverage.max_tokens, found.coverage.busy_from
    busy_counts = [b.num_tokens for b in found.busy]
    idle_counts = [b.num_tokens for b in found.idle]
    graph_counts = [b.num_tokens for b in found.graph]
    if not busy_counts:
        raise ValueError("a calibration without busy buckets has no table: calibrate again")
    below = [count for count in graph_counts if count < busy_from and count <= last]
    edges = {*busy_counts, *idle_counts, *below, min(busy_from - 1, last)} - {0}
    chosen = []
    for count in sorted(edges):
        busy = found.busy[bucket_of(count, busy_counts)]
        name = found.coverage.baseline
        if count >= busy_from:
            name = busy.candidate
        elif idle_counts:
            idle = found.idle[bucket_of(count, idle_counts)]
            name = combine([*busy.verdicts, *idle.verdicts], found.rule.margin)[0]
            if graph_counts and count <= graph_counts[-1]:
                captured = found.graph[bucket_of(count, graph_counts)].candidate
                name = name if name == captured else found.coverage.baseline
        chosen.append((count, name))
    return _spread(found, chosen, last)


def _spread(found: Calibration, chosen: Sequence[tuple[int, str]], last: int = 0) -> bytes:
    counts = [count for count, _ in chosen]
    last = last or counts[-1]
    if not counts[-1] <= last <= MAX_TOKENS:
        raise ValueError(f"max_tokens={last} is not from {counts[-1]} to {MAX_TOKENS}")
    index = {name: i for i, name in enumerate(found.candidates)}
    return spread([index[name] for _, name in chosen], counts, last)


def _check(buckets: Sequence[Bucket], candidates: Sequence[str]) -> None:
    counts = [b.num_tokens for b in buckets]
    if counts and (counts[0] < 1 or any(low >= high for low, high in pairwise(counts))):
        raise ValueError(f"bucket token counts must rise from 1: {counts[:8]}")
    for bucket in buckets:
        if bucket.candidate not in candidates:
            raise ValueError(f"{bucket.candidate!r} is not one of those offered, {candidates}")
