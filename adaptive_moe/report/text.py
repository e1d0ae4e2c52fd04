"""A table in lines of text: the headline of logs, the bucket table, what to do where much is open.

Whoever prints one takes it from here; the words are those of words.py.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from adaptive_moe.policy.decision import OUT, Standing
from adaptive_moe.policy.evidence import Bucket, Calibration
from adaptive_moe.policy.coverage import Situation
from adaptive_moe.policy.table import PolicyTable, Run
from adaptive_moe.report.words import (
    bucket_words,
    calls_words,
    candidate_words,
    percent,
    plural,
    sections,
    situation_words,
    time_us,
    was_measured,
)

# From this share of open buckets on, a reader is told what to do about it.
MANY_OPEN = 0.25
UNSETTLED, UNMEASURED = "unsettled", "not measured"


def summary(table: PolicyTable) -> str:
    """What is applied, and what became of the buckets that stay with the baseline. Such as
    `policy 1 (one-shot) up to 24 tokens, policy 0 (AITER's rule) from 25; kept: 3 buckets tied`."""
    eager = _applied(table.runs())
    if table.graph == table.eager:
        return eager + _kept_words(table.evidence)
    graph = _applied(table.runs(captured=True))
    return f"graph: {graph} | eager: {eager}{_kept_words(table.evidence)}"


def headline(table: PolicyTable, *, measured_now: bool = True) -> str:
    """One line: what was calibrated, on what, what was decided, and how long that took or when it
    was."""
    found = table.evidence
    when = f"{found.seconds:.2f} s" if measured_now else f"as measured {found.created}"
    return (
        f"{calls_words(found.coverage)}, on {found.kernel} ({found.environment.device}), baseline "
        f"{candidate_words(found.coverage.baseline)}: {summary(table)}; {gains(table)}; {when}"
    )


def kept(found: Calibration) -> str:
    """How many buckets stay with the baseline, by why, such as `3 buckets tied`."""
    return ", ".join(f"{plural(n, 'bucket')} {why}" for why, n in sorted(_kept(found).items()))


def gains(table: PolicyTable) -> str:
    """What the buckets save whose winner is applied where they were measured."""
    found = table.evidence
    won = [
        bucket
        for situation in sections(found)
        for bucket in found.section(situation)
        if bucket.candidate != found.coverage.baseline
        and bucket.candidate
        == table.candidate(bucket.num_tokens, captured=situation is Situation.GRAPH)
    ]
    gains = [
        result.gain
        for bucket in won
        for verdict in bucket.verdicts
        if (result := verdict.result(bucket.candidate)) is not None and result.gain is not None
    ]
    if not gains:
        return "saves nothing"
    low, high = f"{min(gains):.0%}", f"{max(gains):.0%}"
    span = low if low == high else f"{low} to {high}"
    return f"saves {span} at {plural(len(won), 'bucket')}"


def bucket_table(table: PolicyTable) -> list[str]:
    """The evidence as aligned lines, a block a situation: us of each candidate (empty where nothing
    was measured), what the winner saves, rounds, and the verdict in words."""
    found = table.evidence
    lines: list[str] = []
    measured = list(sections(found))
    for situation in measured:
        if len(measured) > 1:
            lines.append(situation_words(found, situation))
        lines += _aligned([bucket_heads(found), *bucket_rows(found, situation)])
    return lines


def bucket_heads(found: Calibration) -> list[str]:
    """The columns of `bucket_rows`."""
    return ["tokens", *(f"{name} us" for name in found.candidates), "saves", "rounds", "verdict"]


def bucket_rows(found: Calibration, situation: Situation) -> Iterator[list[str]]:
    """One row of cells a bucket, or a row a fill where a bucket has several."""
    for bucket in found.section(situation):
        for fill in bucket.fills:
            verdict = fill.verdict
            took = [time_us(verdict, name) for name in found.candidates]
            times = ["" if us is None else f"{us:.1f}" for us in took]
            chosen = verdict.result(bucket.candidate)
            left = bucket.candidate != found.coverage.baseline and chosen is not None
            tokens = str(bucket.num_tokens)
            if len(bucket.fills) > 1:
                tokens += f" ({100 * fill.fraction:.3g}% real)"
            saves = percent(chosen.gain) if left and chosen else ""
            rounds = str(verdict.rounds or "")
            yield [tokens, *times, saves, rounds, bucket_words(bucket, [verdict])]


def advice(table: PolicyTable) -> list[str]:
    """What to do where much was left open; nothing where little was."""
    found = table.evidence
    why = _kept(found)
    open_still = [f"{why[word]} {word}" for word in (UNSETTLED, UNMEASURED) if why[word]]
    if why[UNSETTLED] + why[UNMEASURED] < MANY_OPEN * len(found.buckets):
        return []
    # One that ended before its budget did had nothing left that promised enough.
    more = ""
    if found.seconds >= found.budget_s:
        more = f", or give more time, such as {4 * found.budget_s:g} s "
        more += "(--budget, ADAPTIVE_MOE_BUDGET_S)"
    return [
        f"{' and '.join(open_still)} of {plural(len(found.buckets), 'bucket')}: times varied too "
        "much to tell a gain from noise, so these stay with the baseline.",
        f"Other work on this machine is the usual cause: calibrate again when it is quiet{more}. "
        "What is settled is not measured again.",
    ]


def _applied(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return f"{candidate_words(runs[0][2])} at every token count"
    pieces = []
    for first, last, name in runs:
        words = candidate_words(name)
        if first == 1:
            pieces.append(f"{words} up to {plural(last, 'token')}")
        elif (first, last, name) == runs[-1]:
            pieces.append(f"{words} from {first}")
        else:
            pieces.append(f"{words} at {first}" if first == last else f"{words} {first} to {last}")
    return ", ".join(pieces)


def _kept_words(found: Calibration) -> str:
    why = kept(found)
    return f"; baseline kept: {why}" if why else ""


def _kept(found: Calibration) -> Counter[str]:
    """How many buckets stay with the baseline, by why."""
    return Counter(_why_kept(b) for b in found.buckets if b.candidate == found.coverage.baseline)


def _why_kept(bucket: Bucket) -> str:
    results = [r for verdict in bucket.verdicts for r in verdict.results]
    failed = {r.candidate: r.standing for r in results if r.standing in OUT[1:]}
    if failed:
        return "where " + ", ".join(
            f"{name} {'failed' if standing is Standing.FAILED else 'was wrong'}"
            for name, standing in failed.items()
        )
    if not all(map(was_measured, bucket.verdicts)):
        return UNMEASURED
    if not all(verdict.settled for verdict in bucket.verdicts):
        return UNSETTLED
    tied = any(r.standing is Standing.TIED for r in results)
    return "tied" if tied else "where it is fastest"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """All cells but the last right-aligned in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([*(c.rjust(w) for c, w in zip(row[:-1], widths, strict=False)), row[-1]])
        for row in rows
    ]
