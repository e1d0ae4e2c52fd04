"""One table from what several ranks measured of the same coverage. Pure, and the same in any order.

All ranks wait for the slowest, so a candidate is worth what the rank is sure of that gains least by
it: of its standings, gains and both ends of its interval, the worst that any rank measured. Nothing
else is computed. No rank's time is compared with another's, and none is guessed where nothing was
measured: each gain is of one rank's own rounds, and a jump on one rank cannot lift a candidate that
another one saw losing. The lower end keeps its confidence: wherever the candidate is worst, only
that rank's own bound has to hold. Worst-of is the same in any order, and merging what was merged
changes nothing. What follows from it is judged by decision.conclude, as a single rank's evidence.

Refinement puts buckets where a rank's own samples ask for them, so ranks measure different counts.
The merged table has the union. At a count, those who measured it vote; the others may only veto: by
the bucket that serves that count in their own table, a candidate that is out there, or surely
slower than the baseline, is out.

Ranks that were offered different candidates merge those that all were offered: whoever was not
offered one may have a reason, such as an AITER in which it is not safe.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptive_moe.policy.decision import OUT, Result, Standing, conclude
from adaptive_moe.policy.environment import Environment
from adaptive_moe.policy.evidence import Bucket, Calibration, Fill
from adaptive_moe.policy.losses import combine
from adaptive_moe.policy.plain import differences, from_plain
from adaptive_moe.policy.coverage import Situation
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.ranks.summary import ORDER, Section, Subject, Summary, max_rows, parse

VETOED = "slower on another rank, in the bucket that serves this count"

# Ranks merged in one step: as fast as any larger number, in a few MiB.
_GROUP = 256
_TEXTS = 1 << 16  # a standing and a text in one number: see `_marks`
_UNSETTLED, _SLOWER, _HOPELESS = (
    _TEXTS * ORDER.index(s) for s in (Standing.UNSETTLED, Standing.SLOWER, Standing.HOPELESS)
)
_NEVER = np.iinfo(np.int32).max

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Row = tuple[int, float]


class DisagreementError(ValueError):
    """The summaries do not answer the same question; the text says in which field."""


@dataclass(frozen=True)
class _Stack:
    """Sections that measured the same rows, stacked: arrays as in Section, [k, ...] for k ranks,
    with the common candidates only. marks: standing and reason in one number, the worst largest."""

    tokens: NDArray[np.int32]
    fraction: Floats
    rounds: NDArray[np.int32]
    marks: Ints
    numbers: Floats


def merge(summaries: Sequence[Summary]) -> PolicyTable:
    """The table that all these ranks run. Raises DisagreementError, or ValueError for a summary
    that no table could have given."""
    subject = _common_subject(summaries)
    order = min(s.candidates for s in summaries)
    common = tuple(c for c in order if all(c in s.candidates for s in summaries))
    texts = sorted({VETOED, *(text for s in summaries for text in s.texts if text)})
    parts = {
        situation.value: _merge_section(
            list(_stacks(summaries, i, common, texts)), common, texts, subject.rule.margin
        )
        for i, situation in enumerate(Situation)
    }
    return PolicyTable(
        Calibration(
            schema=subject.schema,
            coverage=subject.coverage,
            kernel=subject.kernel,
            candidates=common,
            environment=_environment(summaries),
            rule=subject.rule,
            budget_s=min(s.budget_s for s in summaries),
            created=max(s.created for s in summaries),
            seconds=max(s.seconds for s in summaries),
            **parts,
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


def _stacks(
    summaries: Sequence[Summary], situation: int, common: Sequence[str], texts: Sequence[str]
) -> Iterator[_Stack]:
    """The ranks' sections of one situation: those that measured the same rows together."""
    groups: dict[tuple[bytes, bytes], list[tuple[Section, Ints, list[int] | slice]]] = {}
    # A text's place, backwards: the first of two is the larger, and no text at all the least.
    places = {text: len(texts) - i for i, text in enumerate(texts)} | {"": 0}
    for summary in summaries:
        section = summary.sections[situation]
        if not len(section.tokens):
            continue
        columns: list[int] | slice = slice(None)
        if summary.candidates != tuple(common):
            columns = [summary.candidates.index(name) for name in common]
        place = np.array([places[text] for text in summary.texts], np.int64)
        key = (section.tokens.tobytes(), section.fraction.tobytes())
        groups.setdefault(key, []).append((section, place, columns))
    for group in groups.values():
        for first in range(0, len(group), _GROUP):
            some = group[first : first + _GROUP]
            yield _Stack(
                some[0][0].tokens,
                some[0][0].fraction,
                np.stack([s.rounds for s, _, _ in some]),
                np.stack([_marks(s, place)[:, columns] for s, place, columns in some]),
                np.stack([s.numbers[:, :, columns] for s, _, columns in some]),
            )


def _marks(section: Section, place: Ints) -> Ints:
    return section.standing.astype(np.int64) * _TEXTS + place[section.reason]


def _merge_section(
    stacks: Sequence[_Stack], common: Sequence[str], texts: Sequence[str], margin: float
) -> tuple[Bucket, ...]:
    rows = _rows(stacks, max_rows(len(common)))
    if not rows:
        return ()
    size = (len(rows), len(common))
    rounds, marks = np.full(len(rows), _NEVER), np.zeros(size, np.int64)
    median_us, gains = np.full(size, -np.inf), np.full((3, *size), np.inf)
    for stack in stacks:
        votes = stack.rounds > 0
        here = np.array([rows.get(row, -1) for row in _keys(stack)], np.intp)
        known, at = here >= 0, here[here >= 0]
        voted = votes[:, known, np.newaxis]
        count = np.where(votes, stack.rounds, _NEVER).min(axis=0)
        rounds[at] = np.minimum(rounds[at], count[known])
        worst = np.where(voted, stack.marks[:, known], 0).max(axis=0)
        marks[at] = np.maximum(marks[at], worst)
        numbers = stack.numbers[:, :, known]
        times = np.where(voted & ~np.isnan(numbers[:, 0]), numbers[:, 0], -np.inf).max(axis=0)
        median_us[at] = np.maximum(median_us[at], times)
        # Not measured is nan, and nan stays: whoever votes must have timed the candidate, too.
        least = np.where(voted[:, np.newaxis], numbers[:, 1:], np.inf).min(axis=0)
        gains[:, at] = np.minimum(gains[:, at], least)
        np.maximum(marks, _vetoes(stack, list(rows), texts), out=marks)
    unmeasured = rounds == _NEVER
    rounds[unmeasured] = 0
    marks[unmeasured, 1:] = np.maximum(marks[unmeasured, 1:], _UNSETTLED)
    buckets: dict[int, list[Fill]] = {}
    for i, (num_tokens, fraction) in enumerate(rows):
        results = [
            _result(name, int(marks[i, p]), float(median_us[i, p]), gains[:, i, p].tolist(), texts)
            for p, name in enumerate(common)
        ]
        verdict = conclude(results, int(rounds[i]))
        buckets.setdefault(num_tokens, []).append(Fill(fraction, verdict))
    return tuple(
        Bucket(num_tokens, *combine([fill.verdict for fill in fills], margin), tuple(fills))
        for num_tokens, fills in buckets.items()
    )


def _rows(stacks: Sequence[_Stack], most: int) -> dict[Row, int]:
    """Every row that some rank measured, in order; where that is too many, the rows of both ends
    and of the commonest counts."""
    votes: Counter[Row] = Counter()
    for stack in stacks:
        votes.update(dict.fromkeys(_keys(stack), len(stack.rounds)))
    rows = sorted(votes)
    if len(rows) > most:
        counts: Counter[int] = Counter()
        for row in rows:
            counts[row[0]] += votes[row]
        ends = (rows[0][0], rows[-1][0])
        fills = max(Counter(num_tokens for num_tokens, _ in rows).values())
        ranked = sorted(counts, key=lambda n: (n not in ends, -counts[n], n))
        kept = set(ranked[: most // fills])
        rows = [row for row in rows if row[0] in kept]
    return {row: i for i, row in enumerate(rows)}


def _keys(stack: _Stack) -> list[Row]:
    return list(zip(stack.tokens.tolist(), stack.fraction.tolist(), strict=True))


def _vetoes(stack: _Stack, rows: Sequence[Row], texts: Sequence[str]) -> Ints:
    """The marks that these ranks set at rows they did not measure, [rows, candidates]."""
    wanted = np.array(rows)
    # The smallest count not below, else the last (policy/buckets.py); there, the fill that is next.
    place = np.minimum(np.searchsorted(stack.tokens, wanted[:, 0]), len(stack.tokens) - 1)
    serving = stack.tokens[place][:, np.newaxis] == stack.tokens
    apart = np.abs(wanted[:, 1, np.newaxis] - stack.fraction)
    serving_row = np.where(serving, apart, np.inf).argmin(axis=1)
    vetoed = _HOPELESS + len(texts) - texts.index(VETOED)
    marks = np.where(stack.marks < _HOPELESS, vetoed, stack.marks)
    marks = np.where(stack.marks < _SLOWER, 0, marks)[:, serving_row]
    same = (stack.tokens[serving_row] == wanted[:, 0]) & (
        stack.fraction[serving_row] == wanted[:, 1]
    )
    measured = same & (stack.rounds[:, serving_row] > 0)
    result: Ints = np.where(measured[:, :, np.newaxis], 0, marks).max(axis=0)
    return result


def _result(
    name: str, mark: int, median_us: float, gains: Sequence[float], texts: Sequence[str]
) -> Result:
    standing, place = ORDER[mark // _TEXTS], mark % _TEXTS
    reason = texts[len(texts) - place] if place else ""
    time_us = median_us if np.isfinite(median_us) else None
    if standing is Standing.BASELINE:
        return Result(name, standing, time_us, gain=0.0)
    gain, low, high = gains
    if standing in OUT or not np.isfinite(gain):
        return Result(name, standing, time_us, reason=reason)
    # An interval that has no end yet on one rank has none.
    ends = (low, high) if np.isfinite(low) and np.isfinite(high) else (None, None)
    return Result(name, standing, time_us, gain, ends[0], ends[1], reason)
