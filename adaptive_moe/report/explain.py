"""Why one token count gets what it gets, in lines of text."""

from adaptive_moe.policy.evidence import Bucket, Calibration
from adaptive_moe.policy.coverage import Situation
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.report.words import bucket_words, candidate_words, result_words, situation_words


def explain(table: PolicyTable, num_tokens: int, *, captured: bool) -> list[str]:
    """Why a batch of num_tokens gets what it gets, from the buckets that speak for it."""
    found = table.evidence
    name = table.candidate(num_tokens, captured=captured)
    kind = "captured into a graph" if captured else "eager"
    lines = [f"{num_tokens} tokens, {kind}: {candidate_words(name)}"]
    for situation in _asked(found, num_tokens, captured):
        bucket = table.bucket(num_tokens, situation)
        if bucket is None:
            continue
        lines.append(f"  {situation_words(found, situation)}, {_served(num_tokens, bucket)}")
        lines.append(f"    {bucket_words(bucket, bucket.verdicts)}")
        for fill in bucket.fills:
            if len(bucket.fills) > 1:
                lines.append(f"    with {100 * fill.fraction:.3g}% of the rows real:")
            verdict = fill.verdict
            lines += [f"    {result_words(verdict, result)}" for result in verdict.results]
    if not is_for(table, num_tokens):
        lines.append("  this table is not for so many tokens: another one may be")
    if not captured and num_tokens < found.coverage.busy_from and found.idle:
        also = ", and is the choice for graphs, too" if _in_graphs(found, num_tokens) else ""
        lines.append(
            f"  below {found.coverage.busy_from} tokens an eager call may find the device busy or "
            f"idle: the baseline is left only for what is faster in one and loses in neither{also}"
        )
    lines.append(
        f"  {found.kernel} on {found.environment.device}, torch {found.environment.torch}, "
        f"{found.created}; margin {found.rule.margin:.1%}, confidence {found.rule.confidence:.0%}"
    )
    return lines


def is_for(table: PolicyTable, num_tokens: int) -> bool:
    """Is that count among those the table was made for?"""
    coverage = table.evidence.coverage
    return num_tokens in coverage.captured or num_tokens in coverage.counts(Situation.BUSY)


def _asked(found: Calibration, num_tokens: int, captured: bool) -> tuple[Situation, ...]:
    """The situations whose verdicts decide such a call."""
    if captured and found.graph:
        return (Situation.GRAPH,)
    if num_tokens >= found.coverage.busy_from:
        return (Situation.BUSY,)
    graphs = (Situation.GRAPH,) if found.idle and _in_graphs(found, num_tokens) else ()
    return (*graphs, Situation.BUSY, Situation.IDLE)


def _in_graphs(found: Calibration, num_tokens: int) -> bool:
    """Do graphs hold as many tokens? Then they have a say in eager calls, too (policy/table.py)."""
    return bool(found.graph) and num_tokens <= found.graph[-1].num_tokens


def _served(num_tokens: int, bucket: Bucket) -> str:
    where = f"measured at {bucket.num_tokens} tokens"
    if num_tokens > bucket.num_tokens:
        return f"{where}, the largest measured"
    return f"{where}, the next bucket up" if num_tokens < bucket.num_tokens else where
