"""What one rank tells the others about one shape: its evidence as arrays, well below 64 KiB.

Not the samples, nor the words: each bucket's time of policy 0 and each policy's gain over it with
its interval, which is what deciding needs. Arrays, because one rank merges what thousands send.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive_moe.disk.file import DECISION_VERSION
from adaptive_moe.policy.decision import Rule, Standing
from adaptive_moe.policy.plain import to_plain
from adaptive_moe.policy.table import Bucket, Calibration
from adaptive_moe.shape import SortingShape

# Most bytes a rank sends for one shape.
MAX_BYTES = 64 * 1024
# Of those, room for the header and its texts.
_HEADER_BYTES = 8 * 1024
_MAX_TEXT = 200

# What the ranks' standings come to is the worst of them; 0 is settled, for or against.
WORSE = (None, Standing.UNSETTLED, Standing.HOPELESS, Standing.FAILED, Standing.WRONG)
OUT = WORSE[2:]


@dataclass(frozen=True)
class Subject:
    """What two ranks must have in common to be merged: the same question, judged the same way."""

    schema: int
    decision: int
    shape: SortingShape
    kernel: str
    policies: tuple[int, ...]
    rule: Rule
    max_tokens: int
    fractions: tuple[float, ...]
    has_graph: bool


@dataclass(frozen=True)
class Section:
    """One call mode's n buckets, with f fills and p policies.

    tokens   int32 [n], rising        rounds  int32 [n, f]
    base_us  float64 [n, f], policy 0's median; nan where it was not measured
    gains    float64 [3, n, f, p], the fraction of policy 0's time saved, its lower and its upper
             bound; nan where not measured
    standing uint8 [n, f, p], an index into WORSE
    """

    tokens: NDArray[np.int32]
    rounds: NDArray[np.int32]
    base_us: NDArray[np.float64]
    gains: NDArray[np.float64]
    standing: NDArray[np.uint8]


@dataclass(frozen=True)
class Summary:
    """One rank's evidence for one shape. subject and environment are JSON: they are compared far
    more often than read. reasons: why a policy is out, by policy, for FAILED and WRONG."""

    subject: str
    environment: str
    created: str
    seconds: float
    reasons: dict[str, str]
    sections: tuple[Section, ...]


def summarize(found: Calibration) -> Summary:
    """The evidence as a summary; ValueError where it is not one table's."""
    parts = [found.eager, found.graph] if found.graph else [found.eager]
    fractions = tuple(fill.fraction for fill in found.eager[0].fills)
    subject = Subject(
        found.schema,
        DECISION_VERSION,
        found.shape,
        found.kernel,
        found.policies,
        found.rule,
        found.max_tokens,
        fractions,
        bool(found.graph),
    )
    most = max_buckets(len(parts), len(fractions), len(found.policies))
    reasons: dict[str, str] = {}
    sections = tuple(
        _section(_thinned(buckets, most), fractions, found.policies, reasons) for buckets in parts
    )
    return Summary(
        canonical(subject),
        canonical(found.environment),
        found.created,
        found.seconds,
        reasons,
        sections,
    )


def max_buckets(sections: int, fills: int, policies: int) -> int:
    """How many buckets of a section fit into MAX_BYTES."""
    each = 4 + fills * (4 + 8 + policies * 25)
    return (MAX_BYTES - _HEADER_BYTES) // (sections * each)


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
    n, fills, policies = (0, 0, 0)
    counts = []
    for section in summary.sections:
        n, fills, policies = section.standing.shape
        counts.append(n)
    header = {
        "subject": summary.subject,
        "environment": summary.environment,
        "created": summary.created,
        "seconds": summary.seconds,
        "reasons": summary.reasons,
        "sizes": [*counts, fills, policies],
    }
    arrays = [
        array.astype(array.dtype.newbyteorder("<")).tobytes()
        for s in summary.sections
        for array in (s.base_us, s.gains, s.tokens, s.rounds, s.standing)
    ]
    return b"".join([json.dumps(header).encode(), b"\n", *arrays])


def decode(content: bytes) -> Summary:
    """What `encode` wrote; ValueError for anything else."""
    line, _, rest = content.partition(b"\n")
    header = parse(line)
    try:
        *counts, fills, policies = header["sizes"]
        summary = Summary(
            header["subject"],
            header["environment"],
            header["created"],
            header["seconds"],
            header["reasons"],
            tuple(_take(rest, counts, fills, policies)),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a summary: {type(error).__name__} {error}") from None
    texts = (summary.subject, summary.environment, summary.created, *summary.reasons.values())
    if not all(isinstance(text, str) for text in texts) or not 0 <= summary.seconds < math.inf:
        raise ValueError("not a summary: its texts or seconds are of another kind")
    return summary


def _take(rest: bytes, counts: Sequence[int], fills: int, policies: int) -> list[Section]:
    place = 0

    def array(kind: str, *shape: int) -> NDArray[Any]:
        nonlocal place
        size = math.prod(shape)
        # A negative count would mean "all" to numpy.
        if min(shape) < 1 or size > len(rest):
            raise ValueError(f"not a summary: an array of shape {shape}")
        found = np.frombuffer(rest, kind, size, place).reshape(shape)
        place += found.nbytes
        return found

    sections = []
    for n in counts:
        base_us, gains = array("<f8", n, fills), array("<f8", 3, n, fills, policies)
        tokens, rounds = array("<i4", n), array("<i4", n, fills)
        standing = array("u1", n, fills, policies)
        rising = tokens[0] >= 1 and bool((np.diff(tokens) > 0).all())
        real = bool((np.isnan(base_us) | (base_us > 0.0) & np.isfinite(base_us)).all())
        if not rising or not real or standing.max() >= len(WORSE):
            raise ValueError("not a summary: token counts, times or standings out of bounds")
        sections.append(Section(tokens, rounds, base_us, gains, standing))
    if place != len(rest) or not 1 <= len(sections) <= 2:
        raise ValueError(f"not a summary: {len(rest)} bytes of arrays, {place} expected")
    return sections


def _thinned(buckets: Sequence[Bucket], most: int) -> Sequence[Bucket]:
    """At most `most` buckets, evenly spaced and with both ends; what remains serves the rest."""
    if len(buckets) <= most:
        return buckets
    if most < 2:
        raise ValueError("too many policies to exchange")
    last = len(buckets) - 1
    return [buckets[round(i * last / (most - 1))] for i in range(most)]


def _section(
    buckets: Sequence[Bucket],
    fractions: Sequence[float],
    policies: Sequence[int],
    reasons: dict[str, str],
) -> Section:
    shape = (len(buckets), len(fractions), len(policies))
    base_us = np.full(shape[:2], np.nan)
    gains = np.full((3, *shape), np.nan)
    rounds, standing = np.zeros(shape[:2], np.int32), np.zeros(shape, np.uint8)
    for i, bucket in enumerate(buckets):
        if tuple(fill.fraction for fill in bucket.fills) != tuple(fractions):
            raise ValueError(f"the bucket at {bucket.num_tokens} tokens has other fills")
        for f, fill in enumerate(bucket.fills):
            results = fill.verdict.results
            if tuple(r.policy for r in results) != tuple(policies):
                raise ValueError(f"the bucket at {bucket.num_tokens} tokens has other policies")
            rounds[i, f] = fill.verdict.rounds
            base_us[i, f] = results[0].median_us or np.nan
            for p, result in enumerate(results):
                if result.standing in WORSE:
                    standing[i, f, p] = WORSE.index(result.standing)
                if result.standing in OUT:
                    if result.standing is not Standing.HOPELESS:
                        text, name = result.reason[:_MAX_TEXT], str(result.policy)
                        reasons[name] = min(reasons.get(name, text), text)
                elif result.gain is not None:
                    # An interval without an end is stored as None; time saved is at most all.
                    low = -np.inf if result.gain_low is None else result.gain_low
                    high = 1.0 if result.gain_high is None else result.gain_high
                    gains[:, i, f, p] = result.gain, low, high
    gains[:, :, :, 0] = np.where(np.isnan(base_us), np.nan, 0.0)
    tokens = np.array([bucket.num_tokens for bucket in buckets], np.int32)
    return Section(tokens, rounds, base_us, gains, standing)
