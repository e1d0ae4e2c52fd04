"""Token counts to measure, and the one mapper from a token count to a measured bucket.

Tuning and lookup must agree on that mapping, or the table applies a winner that was measured for
another count (flashinfer#5450). So exploring, tables and reports all map through `bucket_of`.

A *domain* is the rising sequence of token counts that can occur: `range(1, max + 1)` for eager
calls, the engine's capture sizes for graph-captured ones.
"""

from bisect import bisect_left
from collections.abc import Sequence


def bucket_of(num_tokens: int, buckets: Sequence[int]) -> int:
    """Index into the rising `buckets` of the one that serves `num_tokens`.

    That is the smallest bucket not below it (engines pad up, too); counts past the last bucket
    take the last. Raises ValueError where num_tokens is below 1 or there is no bucket.
    """
    if num_tokens < 1 or not buckets:
        raise ValueError(f"num_tokens={num_tokens!r} has no bucket: give 1 or more, and a bucket")
    return min(bisect_left(buckets, num_tokens), len(buckets) - 1)


def first_buckets(domain: Sequence[int], wanted: Sequence[int] = ()) -> tuple[int, ...]:
    """The coarse grid: `wanted` (or powers of two) moved up to counts of the domain, and its ends.

    Raises ValueError for an empty domain.
    """
    if not domain:
        raise ValueError("no token count to measure: the domain is empty")
    grid = wanted or tuple(1 << k for k in range(domain[-1].bit_length()))
    inside = {domain[min(bisect_left(domain, count), len(domain) - 1)] for count in grid}
    return tuple(sorted(inside | {domain[0], domain[-1]}))


def halfway(domain: Sequence[int], low: int, high: int) -> int | None:
    """The count of the domain halfway (in ratio) between two of its counts, or None if adjacent."""
    first, last = bisect_left(domain, low), bisect_left(domain, high)
    if last - first < 2:
        return None
    # Halving the ratio, not the difference, finds a crossover anywhere in log2 steps.
    middle = bisect_left(domain, round((low * high) ** 0.5))
    return domain[min(middle, last - 1)]
