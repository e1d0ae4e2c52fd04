"""PolicyTable: one byte for each token count, for captured and for eager calls, from the evidence.

The hot path holds one of the two arrays and indexes it: `table.eager[num_tokens]`. A byte is an
index into the evidence's candidates, so 0 is the baseline: the call stays as it came. Arrays are
plain `bytes`, so that is the whole cost. Index 0 is never used (an empty batch is not sorted), and
a count past the end has no byte: nothing was measured there, and the baseline serves.

The arrays are always derived from the evidence, also on load: a table cannot contradict its own
measurements.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from adaptive_moe.policy.buckets import bucket_of
from adaptive_moe.policy.coverage import Situation
from adaptive_moe.policy.evidence import SCHEMA, Bucket, Evidence
from adaptive_moe.policy.verdict import Choice, between, choices

# A byte indexes them, and hook/entries.py keeps 255 for itself.
MAX_CANDIDATES = 255
# First and last token count, and the candidate of all of them.
Run = tuple[int, int, str]


@dataclass(frozen=True)
class PolicyTable:
    """Dense arrays over num_tokens, and the choice of each measured bucket.

    Raises ValueError where the evidence is not whole: no eager bucket, counts that do not rise or
    are outside the coverage, or results of other candidates than those offered.
    """

    evidence: Evidence
    eager: bytes = field(init=False)
    graph: bytes = field(init=False)
    eager_choices: tuple[Choice, ...] = field(init=False)
    graph_choices: tuple[Choice, ...] = field(init=False)

    def __post_init__(self) -> None:
        _check(self.evidence)
        for situation in Situation:
            found = tuple(choices(self.evidence, situation))
            # The dataclass is frozen; these are derived, once.
            object.__setattr__(self, f"{situation.value}_choices", found)
            object.__setattr__(self, situation.value, _array(self.evidence, situation, found))

    def __repr__(self) -> str:
        return f"PolicyTable({self.evidence.coverage.describe()}, {self.evidence.kernel})"

    @property
    def open_counts(self) -> int:
        """Buckets whose candidate more rounds may still change."""
        return sum(not choice.settled for choice in (*self.graph_choices, *self.eager_choices))

    @property
    def failed(self) -> bool:
        """Did a candidate raise? What was wrong stays wrong; what raised may pass."""
        return any(not exclusion.wrong for exclusion in self.evidence.excluded)

    @property
    def unfinished(self) -> bool:
        """Would measuring further probably settle more, or bring back a candidate that raised?"""
        return self.failed or (self.evidence.cut_short and self.open_counts > 0)

    def choices(self, situation: Situation) -> tuple[Choice, ...]:
        """The choice of each bucket of one situation, by token count."""
        return self.graph_choices if situation is Situation.GRAPH else self.eager_choices

    def candidate(self, num_tokens: int, *, captured: bool = False) -> str:
        """The candidate for such a batch; ValueError for anything but an integer of 1 or more."""
        if not isinstance(num_tokens, int) or isinstance(num_tokens, bool) or num_tokens < 1:
            raise ValueError(f"num_tokens={num_tokens!r} is not accepted: give an integer >= 1")
        array = self.graph if captured else self.eager
        return self.evidence.candidates[array[num_tokens] if num_tokens < len(array) else 0]

    def choice_at(self, num_tokens: int, situation: Situation) -> Choice | None:
        """The choice of the bucket at or above that count; None where none was measured."""
        found = self.choices(situation)
        if not found or num_tokens > found[-1].num_tokens:
            return None
        return found[bucket_of(num_tokens, [choice.num_tokens for choice in found])]

    def runs(self, *, captured: bool = False) -> list[Run]:
        """(first, last, candidate) for each run of equal candidates over the counts that occur."""
        situation = Situation.GRAPH if captured else Situation.EAGER
        found: list[Run] = []
        counts = self.evidence.coverage.counts(situation)
        for name, group in groupby(counts, lambda n: self.candidate(n, captured=captured)):
            run = list(group)
            found.append((run[0], run[-1], name))
        return found


def _array(evidence: Evidence, situation: Situation, found: Sequence[Choice]) -> bytes:
    """A byte for each count up to the last that occurs; 0 where nothing was measured."""
    coverage = evidence.coverage
    domain = coverage.counts(situation)
    if not domain or not found:
        return b""
    index = {name: place for place, name in enumerate(evidence.candidates)}
    array = bytearray(domain[-1] + 1)
    below: Choice | None = None
    for choice in found:
        count, name = choice.num_tokens, choice.candidate
        array[count] = index[name]
        first = 1
        if below is not None:
            first, name = below.num_tokens + 1, between(below, choice, evidence.rule)
        if situation is Situation.EAGER and count >= coverage.busy_from:
            # Below busy_from the host's time decides as well, and it was not read here.
            first = min(max(first, coverage.busy_from), count)
        array[first:count] = bytes((index[name],)) * (count - first)
        below = choice
    occurring = bytearray(len(array))
    for first, last in domain.spans:
        occurring[first : last + 1] = array[first : last + 1]
    return bytes(occurring)


def _check(evidence: Evidence) -> None:
    if evidence.schema != SCHEMA:
        raise ValueError(f"schema {evidence.schema!r} is not {SCHEMA}: calibrate again")
    names, baseline = evidence.candidates, evidence.coverage.baseline
    if names[:1] != (baseline,):
        raise ValueError(f"the first of {names} is not the baseline, {baseline}")
    if not len(set(names)) == len(names) <= MAX_CANDIDATES:
        raise ValueError(f"{names} are not at most {MAX_CANDIDATES} different names")
    if not evidence.eager:
        raise ValueError("a calibration without eager buckets has no table: calibrate again")
    for situation in Situation:
        buckets = evidence.buckets(situation)
        counts = [bucket.num_tokens for bucket in buckets]
        if any(low >= high for low, high in pairwise(counts)):
            raise ValueError(f"bucket token counts must rise: {counts[:8]}")
        domain = evidence.coverage.counts(situation)
        for bucket in buckets:
            if bucket.num_tokens not in domain:
                raise ValueError(
                    f"{bucket.num_tokens} tokens ({situation.value}) are not in the coverage"
                )
            _check_results(bucket, names)
        if len({len(bucket.fills) for bucket in buckets}) > 1:
            raise ValueError(f"the {situation.value} buckets have different numbers of fills")


def _check_results(bucket: Bucket, names: Sequence[str]) -> None:
    if not bucket.fills:
        raise ValueError(f"no results at {bucket.num_tokens} tokens")
    for fill in bucket.fills:
        if tuple(result.candidate for result in fill.results) != tuple(names):
            raise ValueError(
                f"the results at {bucket.num_tokens} tokens are not of the candidates {names}"
            )
