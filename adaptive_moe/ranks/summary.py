"""What one rank tells the others of one coverage: its evidence as arrays, below 64 KiB.

Not the samples, nor the verdicts: each candidate's standing, time and gain with its interval, a row
for each fill of each bucket. Arrays, because one rank merges what thousands send.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Rule, Standing
from adaptive_moe.policy.evidence import DECISION_VERSION, Bucket, Calibration
from adaptive_moe.policy.plain import to_plain
from adaptive_moe.policy.coverage import Situation

# Most bytes a rank sends for one coverage.
MAX_BYTES = 64 * 1024
# Of those, room for the header and its texts.
_HEADER_BYTES = 20 * 1024
_MAX_TEXT, _MAX_TEXTS = 120, 128

# Of two standings on two ranks, the later one here is that of both: a candidate is faster where all
# say so, unsettled while nobody has ruled it out, and out where it is out for one.
ORDER = (
    Standing.BASELINE,
    Standing.FASTER,
    Standing.UNCONFIRMED,
    Standing.UNSETTLED,
    Standing.TIED,
    Standing.SLOWER,
    Standing.HOPELESS,
    Standing.FAILED,
    Standing.WRONG,
)


@dataclass(frozen=True)
class Subject:
    """What two ranks must have in common to be merged: the same question, judged the same way."""

    schema: int
    decision: int
    coverage: Coverage
    kernel: str
    rule: Rule


@dataclass(frozen=True)
class Section:
    """What was measured in one situation: n rows, by token count and fill, for p candidates.

    tokens    int32 [n]
    fraction  float64 [n], of the rows that are real
    rounds    int32 [n]
    standing  uint8 [n, p], an index into ORDER
    reason    uint8 [n, p], an index into the summary's texts
    numbers   float64 [4, n, p]: median us, gain and its lower and upper end; nan where not measured
    """

    tokens: NDArray[np.int32]
    fraction: NDArray[np.float64]
    rounds: NDArray[np.int32]
    standing: NDArray[np.uint8]
    reason: NDArray[np.uint8]
    numbers: NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """One rank's evidence for one coverage. subject and environment are JSON: they are compared far
    more often than read. sections: by situation."""

    subject: str
    environment: str
    candidates: tuple[str, ...]
    budget_s: float
    created: str
    seconds: float
    texts: tuple[str, ...]
    sections: tuple[Section, ...]


def summarize(found: Calibration) -> Summary:
    """The evidence as a summary; ValueError where it is not one table's."""
    subject = Subject(found.schema, DECISION_VERSION, found.coverage, found.kernel, found.rule)
    texts: dict[str, int] = {"": 0}
    most = max_rows(len(found.candidates))
    sections = tuple(
        _section(_thinned(found.section(s), most), found.candidates, texts) for s in Situation
    )
    return Summary(
        canonical(subject),
        canonical(found.environment),
        found.candidates,
        found.budget_s,
        found.created,
        found.seconds,
        tuple(texts),
        sections,
    )


def max_rows(candidates: int) -> int:
    """How many rows of one situation fit into MAX_BYTES."""
    each = 4 + 8 + 4 + candidates * (1 + 1 + 4 * 8)
    return (MAX_BYTES - _HEADER_BYTES) // (len(Situation) * each)


def canonical(value: Any) -> str:
    """The same text for equal dataclasses."""
    return json.dumps(to_plain(value), sort_keys=True)


def parse(text: str | bytes) -> Any:
    """json.loads, with nothing but ValueError where it fails."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def encode(summary: Summary) -> bytes:
    """A line of JSON, then the arrays."""
    header = {**vars(summary), "sections": [len(s.tokens) for s in summary.sections]}
    arrays = [
        array.astype(array.dtype.newbyteorder("<")).tobytes()
        for s in summary.sections
        for array in (s.fraction, s.numbers, s.tokens, s.rounds, s.standing, s.reason)
    ]
    return b"".join([json.dumps(header).encode(), b"\n", *arrays])


def decode(content: bytes) -> Summary:
    """What `encode` wrote; ValueError for anything else."""
    line, _, rest = content.partition(b"\n")
    header = parse(line)
    try:
        counts = header.pop("sections")
        candidates, texts = tuple(header.pop("candidates")), tuple(header.pop("texts"))
        words = (*candidates, *texts, header["subject"], header["environment"], header["created"])
        if not all(isinstance(word, str) for word in words) or not 0 < len(texts) <= _MAX_TEXTS:
            raise ValueError("not a summary: its texts are of another kind")
        for seconds in (header["seconds"], header["budget_s"]):
            if not 0 <= seconds < math.inf:
                raise ValueError("not a summary: its seconds are of another kind")
        sections = tuple(_take(rest, counts, len(candidates), len(texts)))
        return Summary(candidates=candidates, texts=texts, sections=sections, **header)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a summary: {type(error).__name__} {error}") from None


def _take(rest: bytes, counts: Sequence[int], candidates: int, texts: int) -> list[Section]:
    place = 0

    def array(kind: str, *shape: int) -> NDArray[Any]:
        nonlocal place
        size = math.prod(shape)
        # A negative count would mean "all" to numpy.
        if min(shape) < 0 or size > len(rest):
            raise ValueError(f"not a summary: an array of shape {shape}")
        found = np.frombuffer(rest, kind, size, place).reshape(shape)
        place += found.nbytes
        return found

    if len(counts) != len(Situation) or not candidates:
        raise ValueError(f"not a summary: {len(counts)} situations, {candidates} candidates")
    sections = []
    for n in counts:
        fraction, numbers = array("<f8", n), array("<f8", 4, n, candidates)
        tokens, rounds = array("<i4", n), array("<i4", n)
        standing, reason = array("u1", n, candidates), array("u1", n, candidates)
        section = Section(tokens, fraction, rounds, standing, reason, numbers)
        if n and not _is_real(section, texts):
            raise ValueError("not a summary: token counts, times or standings out of bounds")
        sections.append(section)
    if place != len(rest):
        raise ValueError(f"not a summary: {len(rest)} bytes of arrays, {place} expected")
    return sections


def _is_real(found: Section, texts: int) -> bool:
    """Extremes, since one rank looks through thousands of these. nan is what was not measured."""
    times = found.numbers[0]
    rising = found.tokens[0] >= 1 and bool((found.tokens[1:] >= found.tokens[:-1]).all())
    real = found.fraction.min() >= 0.0 and found.fraction.max() <= 1.0 and found.rounds.min() >= 0
    known = found.standing.max() < len(ORDER) and found.reason.max() < texts
    return bool(
        rising and real and known and not (times <= 0.0).any() and not np.isinf(times).any()
    )


def _thinned(buckets: Sequence[Bucket], most: int) -> Sequence[Bucket]:
    """At most `most` rows of buckets, evenly spaced and with both ends; what remains serves the
    rest."""
    fills = max((len(bucket.fills) for bucket in buckets), default=1)
    if len(buckets) * fills <= most:
        return buckets
    kept, last = most // fills, len(buckets) - 1
    if kept < 2:
        raise ValueError("too many candidates to exchange")
    return [buckets[round(i * last / (kept - 1))] for i in range(kept)]


def _section(
    buckets: Sequence[Bucket], candidates: Sequence[str], texts: dict[str, int]
) -> Section:
    rows = [(bucket.num_tokens, fill) for bucket in buckets for fill in bucket.fills]
    shape = (len(rows), len(candidates))
    standing, reason = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    numbers = np.full((4, *shape), np.nan)
    for i, (num_tokens, fill) in enumerate(rows):
        results = fill.verdict.results
        if tuple(r.candidate for r in results) != tuple(candidates):
            raise ValueError(f"the bucket at {num_tokens} tokens has other candidates")
        for p, result in enumerate(results):
            text = result.reason[:_MAX_TEXT]
            if len(texts) < _MAX_TEXTS:
                texts.setdefault(text, len(texts))
            standing[i, p], reason[i, p] = ORDER.index(result.standing), texts.get(text, 0)
            found = (result.median_us, result.gain, result.gain_low, result.gain_high)
            numbers[:, i, p] = [np.nan if number is None else number for number in found]
    return Section(
        np.array([num_tokens for num_tokens, _ in rows], np.int32),
        np.array([fill.fraction for _, fill in rows], np.float64),
        np.array([fill.verdict.rounds for _, fill in rows], np.int32),
        standing,
        reason,
        numbers,
    )
