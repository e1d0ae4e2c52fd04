"""The words of reports: what candidates and situations are called, and how numbers are written.

Logs, the command line, plots and the page all take them from here.
"""

from collections.abc import Iterator, Sequence

from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Result, Standing, Verdict
from adaptive_moe.policy.evidence import Bucket, Calibration
from adaptive_moe.policy.coverage import Situation

# What a candidate's name does not say by itself.
_MEANINGS = {
    "policy 0": "AITER's rule",
    "policy 1": "one-shot",
    "policy 2": "multi-phase",
    # What became of a 0 and a 2 where AITER's schema made a bool of it.
    "policy False": "AITER's rule",
    "policy True": "multi-phase",
}
_SITUATIONS = {
    Situation.GRAPH: "graph replay",
    Situation.BUSY: "eager, device busy",
    Situation.IDLE: "eager, device idle",
}


def candidate_words(name: str) -> str:
    """Such as `policy 1 (one-shot)`; other sorts' names speak for themselves."""
    meaning = _MEANINGS.get(name)
    return f"{name} ({meaning})" if meaning else name


def calls_words(coverage: Coverage) -> str:
    """What a table is for, such as `8 experts, ..., block 64, 33 to 2048 tokens`. Where AITER picks
    the block size by token count, each table is for some of them only."""
    spans = ", ".join(f"{a} to {b}" if a < b else f"{a}" for a, b in coverage.eager)
    if coverage.eager == ((1, coverage.max_tokens),):
        spans = f"up to {coverage.max_tokens}"
    return f"{coverage.describe()}, {spans} tokens"


def sections(found: Calibration) -> Iterator[Situation]:
    """The situations that were measured, in the order they are read."""
    return (situation for situation in Situation if found.section(situation))


def situation_words(found: Calibration, situation: Situation) -> str:
    """What a section is called; one that serves all eager calls is not called busy or idle."""
    if situation is Situation.BUSY and found.coverage.busy_from == 1 and not found.idle:
        return "eager"
    return _SITUATIONS[situation]


def was_measured(verdict: Verdict) -> bool:
    """Was it begun, or decided without?"""
    return verdict.settled or verdict.rounds > 0


def bucket_words(bucket: Bucket, verdicts: Sequence[Verdict]) -> str:
    """Why the bucket gets what it gets, as far as these verdicts of it go."""
    if any(map(was_measured, verdicts)):
        return bucket.reason
    return f"kept {bucket.candidate}: not measured, no time was left"


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100.0 * fraction:.1f}%"


def time_us(verdict: Verdict, candidate: str) -> float | None:
    """What a call took, in microseconds; None for what was not measured.

    The baseline's median, and of another what that is less what it saves: rounds are compared in
    pairs, and medians of a machine that changes its speed may contradict them.
    """
    result, base = verdict.result(candidate), verdict.baseline.median_us
    if result is None or result.median_us is None:
        return None
    paired = base * (1.0 - result.gain) if base and result.gain is not None else 0.0
    return paired or result.median_us


def gain_words(result: Result) -> str:
    """Such as `saves 20.0% (surely 12.0% to 24.0%)` or `takes 6.2% longer (surely ...)`."""
    gain, low, high = result.gain or 0.0, result.gain_low, result.gain_high
    if gain < 0.0:
        # The other way round, so that both words and both ends are of positive numbers.
        words, gain = "takes {} longer", -gain
        low, high = (None if end is None else -end for end in (high, low))
    else:
        words = "saves {}"
    if low is None or high is None:
        sure = "too few rounds for an interval"
    else:
        sure = f"surely {percent(low)} to {percent(high)}"
    return f"{words.format(percent(gain))} ({sure})"


def result_words(verdict: Verdict, result: Result) -> str:
    """One candidate of one verdict: where it stands, its time, and what it saves."""
    line = f"{candidate_words(result.candidate)}: {result.standing.value}"
    if (took := time_us(verdict, result.candidate)) is not None:
        line += f", {took:.1f} us"
    if result.gain is not None and result.standing is not Standing.BASELINE:
        line += f", {gain_words(result)}"
    return line + (f": {result.reason}" if result.reason else "")


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
