"""Table -> what it saves and how much of it is settled, in numbers. Pure.

For logs, lists and the report file; nothing is decided by it.
"""

from dataclasses import dataclass

from adaptive_moe.policy.coverage import Situation
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.policy.verdict import Choice, Standing


@dataclass(frozen=True)
class Savings:
    """What one situation of a table comes to.

    counts       token counts that were measured
    settled      those of them whose candidate more rounds would not change
    improved     those of them that get another candidate than the baseline
    least, most  fraction of the baseline's time that is saved there; None where improved is 0
    """

    counts: int
    settled: int
    improved: int
    least: float | None
    most: float | None


def savings(table: PolicyTable, situation: Situation) -> Savings:
    """Of one situation; of all zeros where nothing was measured in it."""
    choices = table.choices(situation)
    gains = [round(gain, 4) for c in choices if (gain := gain_of(c)) is not None]
    return Savings(
        counts=len(choices),
        settled=sum(choice.settled for choice in choices),
        improved=len(gains),
        least=min(gains, default=None),
        most=max(gains, default=None),
    )


def gain_of(choice: Choice) -> float | None:
    """The fraction of the baseline's time that a choice saves where it wins; None where the
    baseline stays."""
    if choice.candidate == choice.baseline:
        return None
    judgements = [view.judgement(choice.candidate) for view in choice.verdicts]
    return max(
        (j.gain for j in judgements if j.standing is Standing.FASTER and j.gain is not None),
        default=0.0,
    )
