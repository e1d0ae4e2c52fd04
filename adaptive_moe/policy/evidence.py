"""What one calibration measured: results, and nothing that can be derived from them. Pure.

A table's choices, verdicts and arrays are computed from these results by one judge (verdict.py),
after measuring and after loading alike.
"""

import math
from dataclasses import dataclass, field

from adaptive_moe.policy.coverage import Coverage, Situation

# Raise when the text of a table has another form.
SCHEMA = 3
# Raise when the same samples would be taken or judged differently than before.
DECISION_VERSION = 5


@dataclass(frozen=True)
class Rule:
    """When a candidate may replace the baseline.

    margin          fraction of the baseline's time it must surely save
    confidence      of that, however often the samples were looked at
    tie_confidence  of ruling a gain out; lower, because a mistake there costs only a small gain
    min_rounds      before any verdict
    max_rounds      after them what is unsettled stays with the baseline
    """

    margin: float = 0.01
    confidence: float = 0.99
    tie_confidence: float = 0.95
    min_rounds: int = 4
    max_rounds: int = 500


@dataclass(frozen=True)
class Environment:
    """Where a calibration was measured.

    device         GPU or CPU name. On AMD it differs by driver image for one and the same GPU
    arch           gfx942, sm_90, or the CPU's
    compute_units  CUs, SMs, or the threads torch uses
    memory_gib     of the device, rounded to 16 GiB; 0 on a CPU
    runtime        ROCm or CUDA version; empty on a CPU
    host           CPU model: the host's time is a part of what is decided
    """

    device: str
    arch: str
    compute_units: int
    memory_gib: int
    runtime: str
    torch: str
    python: str
    host: str


@dataclass(frozen=True)
class Ratios:
    """The rounds of one pass, as logarithms of the candidate's time over the baseline's.

    spread  sum of squared deviations from the mean
    memory  how much wider the interval is because rounds resemble the ones before (interval.py)
    """

    rounds: int
    mean: float
    spread: float
    memory: float = 1.0

    def __post_init__(self) -> None:
        sane = self.rounds >= 1 and self.spread >= 0.0 and self.memory >= 1.0
        if not (sane and math.isfinite(self.mean + self.spread + self.memory)):
            raise ValueError(f"impossible measurement: {self!r}")


@dataclass(frozen=True)
class Result:
    """What was measured of one candidate in one bucket; the baseline's ratios are to itself.

    median_us   of a call: device time where the device runs ahead of or from a graph
    first       the first pass, and
    second      the second one, which confirms a gain later and with everything prepared anew
    host        the host's time to enqueue the same calls, of both passes; None where it is not read
    host_us     median of that time for a call
    dropped     times slower than the fastest at the first look, where that ended its measurement
    """

    candidate: str
    median_us: float | None = None
    first: Ratios | None = None
    second: Ratios | None = None
    host: Ratios | None = None
    host_us: float | None = None
    dropped: float | None = None


@dataclass(frozen=True)
class Fill:
    """The results with `fraction` of the rows real, the others padding; the baseline's come
    first."""

    fraction: float
    results: tuple[Result, ...]


@dataclass(frozen=True)
class Bucket:
    """What was measured at one token count in one situation."""

    num_tokens: int
    fills: tuple[Fill, ...]

    def __repr__(self) -> str:
        return f"Bucket({self.num_tokens} tokens, {len(self.fills)} fills)"


@dataclass(frozen=True)
class Exclusion:
    """A candidate that may not serve. wrong: it returned something else than the baseline; else it
    raised, which may pass."""

    candidate: str
    wrong: bool
    reason: str


@dataclass(frozen=True)
class Evidence:
    """Everything one calibration measured.

    candidates  the first is the baseline
    budget_s    seconds it was given
    created     UTC in ISO 8601
    seconds     wall-clock time it took
    starts      engine starts that measured for it; a start continues what another left open
    cut_short   did the budget end while more seemed worth measuring?
    excluded    candidates that failed or were wrong at any count
    graph       empty where nothing is captured
    """

    schema: int
    coverage: Coverage
    kernel: str
    candidates: tuple[str, ...]
    environment: Environment
    rule: Rule
    budget_s: float
    created: str
    seconds: float
    starts: int = 1
    cut_short: bool = False
    excluded: tuple[Exclusion, ...] = ()
    graph: tuple[Bucket, ...] = field(default=())
    eager: tuple[Bucket, ...] = field(default=())

    def __repr__(self) -> str:
        return (
            f"Evidence({self.coverage.describe()} on {self.kernel}, "
            f"{len(self.graph) + len(self.eager)} buckets, {self.created})"
        )

    def buckets(self, situation: Situation) -> tuple[Bucket, ...]:
        """The buckets of one situation, by token count."""
        return self.graph if situation is Situation.GRAPH else self.eager
