"""What people read: the summary line, the bucket table, why a count gets its policy."""

from collections import Counter
from collections.abc import Iterator, Sequence

from adaptive_moe.policy.decision import PolicyResult, Standing
from adaptive_moe.policy.table import Bucket, Calibration, PolicyTable, runs


def summary(table: PolicyTable) -> str:
    """Such as `policy 1 up to 24 tokens, 2 from 25; 3 buckets tied, kept 0`."""
    if table.graph == table.eager:
        return _applied(table.eager) + _kept(table.evidence.eager)
    graph = _applied(table.graph) + _kept(table.evidence.graph)
    return f"graph: {graph} | eager: {_applied(table.eager)}{_kept(table.evidence.eager)}"


def headline(table: PolicyTable, *, measured_now: bool = True) -> str:
    """One line: what was calibrated, on what, what was decided, and how long that took or when it
    was."""
    found = table.evidence
    when = f"{found.seconds:.2f} s" if measured_now else f"as measured {found.created}"
    return (
        f"{found.shape.describe()} on {found.kernel} ({found.environment.device}): "
        f"{summary(table)}; gain over policy 0 {_gain_span(found)}; {when}"
    )


def bucket_table(table: PolicyTable) -> list[str]:
    """The evidence as aligned lines: median us of each policy, gain of the choice, verdict."""
    found = table.evidence
    heads = ["tokens", *(f"policy {p} us" for p in found.policies), "gain", "rounds", "verdict"]
    lines: list[str] = []
    sections = [("graph", found.graph), ("eager", found.eager)]
    for name, buckets in sections if found.graph else sections[1:]:
        rows = [heads, *(row for bucket in buckets for row in _rows(bucket, found.policies))]
        widths = [max(len(row[i]) for row in rows) for i in range(len(heads) - 1)]
        if found.graph:
            lines.append(f"{name} calls")
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[-1]]))
    return lines


def explain(table: PolicyTable, num_tokens: int, *, captured: bool) -> list[str]:
    """Why a batch of num_tokens gets its policy, from the bucket that serves it."""
    policy = table.policy(num_tokens, captured=captured)
    bucket = table.bucket(num_tokens, captured=captured)
    found = table.evidence
    kind = "graph-captured" if captured else "eager"
    served = f"measured at {bucket.num_tokens} tokens"
    if num_tokens > bucket.num_tokens:
        served += ", the largest measured"
    elif num_tokens < bucket.num_tokens:
        served += ", the next bucket up"
    lines = [
        f"{num_tokens} tokens, {kind}: policy {policy} ({served})",
        f"  because {bucket.reason}",
    ]
    for fill in bucket.fills:
        if len(bucket.fills) > 1:
            lines.append(f"  with {100 * fill.fraction:.3g}% of the rows real:")
        lines += [f"  {_result_line(result)}" for result in fill.verdict.results]
    lines.append(
        f"  {found.kernel} on {found.environment.device}, torch {found.environment.torch}, "
        f"{found.created}; margin {found.rule.margin:.1%}, confidence {found.rule.confidence:.0%}"
    )
    return lines


def _applied(array: bytes) -> str:
    pieces = []
    spans = runs(array)
    for first, last, policy in spans:
        if len(spans) == 1:
            pieces.append(f"policy {policy} at every token count")
        elif first == 1:
            pieces.append(f"policy {policy} up to {last} tokens")
        elif last == len(array) - 1:
            pieces.append(f"{policy} from {first}")
        else:
            pieces.append(f"{policy} from {first} to {last}")
    return ", ".join(pieces)


def _kept(buckets: Sequence[Bucket]) -> str:
    words: Counter[str] = Counter()
    for bucket in buckets:
        if bucket.policy == 0:
            settled = all(fill.verdict.settled for fill in bucket.fills)
            standings = {r.standing for fill in bucket.fills for r in fill.verdict.results}
            tied = Standing.TIED in standings
            words["unsettled" if not settled else "tied" if tied else "best with 0"] += 1
    if not words:
        return ""
    count = ", ".join(f"{n} bucket{'s' if n > 1 else ''} {word}" for word, n in words.items())
    return f"; {count}, kept 0"


def _gain_span(found: Calibration) -> str:
    gains = [
        result.gain
        for bucket in (*found.graph, *found.eager)
        for result in _chosen(bucket)
        if bucket.policy != 0 and result.gain is not None
    ]
    if not gains:
        return "none"
    return f"{min(gains):.0%} to {max(gains):.0%} at {len(gains)} buckets"


def _chosen(bucket: Bucket) -> Iterator[PolicyResult]:
    for fill in bucket.fills:
        yield from (r for r in fill.verdict.results if r.policy == bucket.policy)


def _rows(bucket: Bucket, policies: Sequence[int]) -> Iterator[list[str]]:
    for fill in bucket.fills:
        by_policy = {r.policy: r for r in fill.verdict.results}
        times = [_time(by_policy.get(policy)) for policy in policies]
        chosen = by_policy.get(bucket.policy)
        gain = "" if bucket.policy == 0 or chosen is None else f"{chosen.gain or 0.0:.1%}"
        tokens = str(bucket.num_tokens)
        if len(bucket.fills) > 1:
            tokens += f" ({100 * fill.fraction:.3g}% real)"
        yield [tokens, *times, gain, str(fill.verdict.rounds), bucket.reason]


def _time(result: PolicyResult | None) -> str:
    if result is None:
        return ""
    return result.standing.value if result.median_us is None else f"{result.median_us:.1f}"


def _result_line(result: PolicyResult) -> str:
    line = f"policy {result.policy}: {result.standing.value}"
    if result.median_us is not None:
        line += f", median {result.median_us:.1f} us"
    if result.gain is not None and result.standing is not Standing.REFERENCE:
        low = "-inf" if result.gain_low is None else f"{result.gain_low:.1%}"
        high = "+inf" if result.gain_high is None else f"{result.gain_high:.1%}"
        line += f", saves {result.gain:.1%} of policy 0's time (surely {low} to {high})"
    return line + (f": {result.reason}" if result.reason else "")
