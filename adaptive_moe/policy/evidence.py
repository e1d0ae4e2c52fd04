"""What one calibration measured, JSON-able, and enough to explain any decision later. Pure."""

from dataclasses import dataclass

from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Rule, Verdict
from adaptive_moe.policy.environment import Environment
from adaptive_moe.policy.situation import Situation

SCHEMA = 2
# Raise when the same samples would be taken or judged differently than before.
DECISION_VERSION = 4


@dataclass(frozen=True)
class Fill:
    """The verdict with `fraction` of the rows real; the others are padding."""

    fraction: float
    verdict: Verdict


@dataclass(frozen=True)
class Bucket:
    """What was measured and decided at one token count, in one situation."""

    num_tokens: int
    candidate: str
    reason: str
    fills: tuple[Fill, ...]

    def __repr__(self) -> str:
        return f"Bucket({self.num_tokens} tokens: {self.candidate}, {self.reason})"

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        return tuple(fill.verdict for fill in self.fills)


@dataclass(frozen=True)
class Calibration:
    """Everything one calibration measured.

    candidates[0] is the baseline. graph is empty where nothing is captured; idle where no eager
    call meets an idle device, as on the CPU kernel, where one clock serves all.
    budget_s: seconds it was given. created: UTC in ISO 8601. seconds: wall-clock time it took.
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
    graph: tuple[Bucket, ...]
    busy: tuple[Bucket, ...]
    idle: tuple[Bucket, ...]

    def __repr__(self) -> str:
        return (
            f"Calibration({self.coverage.describe()} on {self.kernel}, "
            f"{len(self.buckets)} buckets, {self.created})"
        )

    def section(self, situation: Situation) -> tuple[Bucket, ...]:
        """The buckets of one situation, by token count."""
        found: tuple[Bucket, ...] = getattr(self, situation.value)
        return found

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Those of all situations."""
        return (*self.graph, *self.busy, *self.idle)
