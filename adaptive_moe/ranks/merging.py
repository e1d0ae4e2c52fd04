"""One table from what several ranks measured of the same shape. Pure, and the same in any order.

All ranks wait for the slowest, so a policy's time in a bucket is the slowest rank's, and it is
judged against policy 0's slowest. An interval's pessimistic end is merged the same way. It keeps
its confidence: whichever rank truly is the slowest, only that rank's own bound has to hold. (The
optimistic end, which says when something is tied, becomes a little less sure with many ranks.)

Trust is not averaged: a policy that is wrong, failed, or far slower on one rank is out on all, and
where one rank did not measure, the others do not speak for it, and policy 0 stays.

Refinement puts buckets where a rank's own samples ask for them, so ranks measure different counts.
The merged table has the union. At a count that a rank did not measure, it speaks with the bucket
that serves that count in its own table: what it would have applied alone. Only the time of policy 0
is taken from between its neighbours, or that rank would look slow for having measured further up.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from adaptive_moe.disk.file import differences
from adaptive_moe.policy.buckets import bucket_of
from adaptive_moe.policy.decision import TIE_MARGINS, PolicyResult, Rule, Standing, Verdict, combine
from adaptive_moe.policy.environment import Environment
from adaptive_moe.policy.plain import from_plain
from adaptive_moe.policy.table import Bucket, Calibration, Fill, PolicyTable
from adaptive_moe.ranks.summary import OUT, WORSE, Section, Subject, Summary, max_buckets, parse

# Merged numbers are rounded, so that merging what was merged before changes nothing: 0.1 ns, and
# a millionth of policy 0's time.
_US_DIGITS, _GAIN_DIGITS = 4, 6
# Ranks merged in one step: as fast as any larger number, in a few MiB.
_GROUP = 256
_HOPELESS = "far slower than the fastest at the first look of some rank"


class DisagreementError(ValueError):
    """The summaries do not answer the same question; the text says in which field."""


def merge(summaries: Sequence[Summary]) -> PolicyTable:
    """The table that all these ranks run. Raises DisagreementError, or ValueError for a summary
    that no table could have given."""
    subject = _common_subject(summaries)
    fills, policies = len(subject.fractions), len(subject.policies)
    wanted = (fills, policies)
    for summary in summaries:
        shapes = {section.standing.shape[1:] for section in summary.sections}
        if shapes != {wanted} or len(summary.sections) != 1 + subject.has_graph:
            raise ValueError(f"a summary of {shapes} fills and policies for {wanted}")
    most = max_buckets(1 + subject.has_graph, fills, policies)
    reasons = _reasons(summaries, subject)
    parts = [
        _merge_section([s.sections[i] for s in summaries], subject, reasons, most)
        for i in range(1 + subject.has_graph)
    ]
    return PolicyTable(
        Calibration(
            schema=subject.schema,
            shape=subject.shape,
            kernel=subject.kernel,
            policies=subject.policies,
            environment=_environment(summaries),
            rule=subject.rule,
            max_tokens=subject.max_tokens,
            created=max(s.created for s in summaries),
            seconds=max(s.seconds for s in summaries),
            eager=parts[0],
            graph=parts[1] if subject.has_graph else (),
        )
    )


def _common_subject(summaries: Sequence[Summary]) -> Subject:
    texts = sorted({s.subject for s in summaries})
    subjects = [from_plain(Subject, parse(text), "subject") for text in texts]
    if len(subjects) > 1:
        fields = "; ".join(differences(subjects[1], subjects[0], "elsewhere"))
        raise DisagreementError(f"ranks differ in {fields}")
    return subjects[0]


def _environment(summaries: Sequence[Summary]) -> Environment:
    """The ranks' environment; where they differ, every value that occurs, or the least number."""
    found = [
        from_plain(Environment, parse(text), "environment")
        for text in sorted({s.environment for s in summaries})
    ]
    names = {name for one in found for name in vars(one)}
    merged: dict[str, str | int] = {}
    for name in names:
        values = sorted({getattr(one, name) for one in found})
        merged[name] = values[0] if isinstance(values[0], int) else " + ".join(values)
    return Environment(**merged)  # type: ignore[arg-type]


def _reasons(summaries: Sequence[Summary], subject: Subject) -> dict[int, str]:
    return {
        policy: min(words)
        for policy in subject.policies
        if (words := [s.reasons[str(policy)] for s in summaries if str(policy) in s.reasons])
    }


def _merge_section(
    sections: Sequence[Section], subject: Subject, reasons: dict[int, str], most: int
) -> tuple[Bucket, ...]:
    counts = _counts(sections, most)
    size = (len(counts), len(subject.fractions))
    rounds = np.full(size, np.iinfo(np.int32).max, np.int32)
    standing = np.zeros((*size, len(subject.policies)), np.uint8)
    base_us, slowest_us = np.zeros(size), np.full((3, *standing.shape), -np.inf)
    for group in _alike(sections):
        known = group[0].tokens.tolist()
        serving = [bucket_of(count, known) for count in counts]
        times = _base_us(group, counts)
        np.maximum(base_us, times.max(axis=0), out=base_us)
        rounds = np.minimum(rounds, np.stack([s.rounds[serving] for s in group]).min(axis=0))
        worst = np.stack([s.standing[serving] for s in group]).max(axis=0)
        np.maximum(standing, worst, out=standing)
        # Not measured is nan, and nan stays: one silent rank silences the merged bucket.
        ratios = 1.0 - np.stack([s.gains[:, serving] for s in group])
        ratios *= times[:, np.newaxis, :, :, np.newaxis]
        np.maximum(slowest_us, ratios.max(axis=0), out=slowest_us)
    gains = (1.0 - slowest_us / slowest_us[:1, :, :, :1]).round(_GAIN_DIGITS).tolist()
    base = base_us.round(_US_DIGITS).tolist()
    found = []
    for i, count in enumerate(counts):
        parts = []
        for f, fraction in enumerate(subject.fractions):
            results = [
                _result(policy, base[i][f], [g[i][f][p] for g in gains], standing[i, f, p], reasons)
                for p, policy in enumerate(subject.policies)
            ]
            parts.append(Fill(fraction, conclude(results, int(rounds[i, f]), subject.rule)))
        policy, reason = combine([part.verdict for part in parts])
        found.append(Bucket(count, policy, reason, tuple(parts)))
    return tuple(found)


def _counts(sections: Sequence[Section], most: int) -> list[int]:
    """Every count that some rank measured; where that is too many, the ends and the commonest."""
    votes: Counter[int] = Counter()
    for section in sections:
        votes.update(section.tokens.tolist())
    counts = sorted(votes)
    if len(counts) > most:
        inner = sorted(counts[1:-1], key=lambda count: (-votes[count], count))
        counts = sorted([counts[0], counts[-1], *inner[: most - 2]])
    return counts


def _alike(sections: Sequence[Section]) -> Iterator[list[Section]]:
    """Groups that measured the same counts, small enough to stack: one step merges a group."""
    groups: dict[bytes, list[Section]] = {}
    for section in sections:
        groups.setdefault(section.tokens.tobytes(), []).append(section)
    for group in groups.values():
        for first in range(0, len(group), _GROUP):
            yield group[first : first + _GROUP]


def _base_us(group: Sequence[Section], counts: Sequence[int]) -> NDArray[np.float64]:
    """Policy 0's time of each rank at each count: measured, or from between its neighbours."""
    known = group[0].tokens
    above = np.minimum(np.searchsorted(known, counts), len(known) - 1)
    below = np.maximum(above - 1, 0)
    span = np.maximum(known[above] - known[below], 1)
    down = np.clip((known[above] - counts) / span, 0.0, 1.0)[:, np.newaxis]
    times = np.stack([section.base_us for section in group])
    low, high = times[:, below], times[:, above]
    return np.where((down == 0.0) | np.isnan(low), high, high + down * (low - high))


def _result(
    policy: int, base_us: float, gains: Sequence[float], worst: int, reasons: dict[int, str]
) -> PolicyResult:
    """A policy's merged evidence, with the worst standing it has anywhere (SLOWER for settled);
    `conclude` has the last word."""
    standing = WORSE[worst] or Standing.SLOWER
    if standing in OUT:
        reason = _HOPELESS if standing is Standing.HOPELESS else reasons.get(policy, "")
        return PolicyResult(policy, standing, reason=reason)
    gain, low, high = gains
    if math.isnan(gain):
        return PolicyResult(policy, Standing.UNSETTLED)
    median_us = round(base_us * (1.0 - gain), _US_DIGITS)
    end = low if math.isfinite(low) else None
    return PolicyResult(policy, standing, median_us, gain, end, high)


def conclude(results: Sequence[PolicyResult], rounds: int, rule: Rule) -> Verdict:
    """The verdict that merged results support, by the rules of decision.decide."""
    reference, *others = results
    if reference.standing in OUT:
        reason = f"kept 0: policy 0 itself {reference.reason}"
        kept = [PolicyResult(r.policy, r.standing, reason=r.reason) for r in results]
        return Verdict(0, True, rounds, reason, tuple(kept))
    reference = PolicyResult(0, Standing.REFERENCE, reference.median_us, gain=0.0)
    others = [replace(r, standing=_standing(r, rounds, rule)) for r in others]
    merged = (reference, *others)
    faster = [r for r in others if r.standing is Standing.FASTER]
    if not faster:
        settled = all(r.standing is not Standing.UNSETTLED for r in others)
        words = [f"{r.policy} {r.standing.value}{r.reason and f' ({r.reason})'}" for r in others]
        reason = f"kept 0: {', '.join(words) or 'it is the only policy'}"
        return Verdict(0, settled, rounds, reason, merged)
    best = max(faster, key=lambda r: r.gain or 0.0)
    settled = not any(
        r.standing is Standing.UNSETTLED and (r.gain_high or 0.0) > (best.gain or 0.0)
        for r in others
    )
    reason = (
        f"policy {best.policy} saves {100 * (best.gain or 0.0):.1f}% "
        f"(at least {100 * (best.gain_low or 0.0):.1f}%)"
    )
    return Verdict(best.policy, settled, rounds, reason, merged)


def _standing(result: PolicyResult, rounds: int, rule: Rule) -> Standing:
    gain, low = result.gain, result.gain_low
    if result.standing in OUT or gain is None or rounds < rule.min_rounds:
        return result.standing
    if low is not None and low > rule.margin:
        return Standing.FASTER
    # Each rank has settled it, and not all in its favour.
    if result.standing is Standing.UNSETTLED or gain >= TIE_MARGINS * rule.margin:
        return Standing.UNSETTLED
    return Standing.TIED if gain > -TIE_MARGINS * rule.margin else Standing.SLOWER
