"""Which token counts to measure: a coarse grid, then the gaps that may cost most. Pure.

Winners change at one or two token counts, so a few buckets and some bisection find what a dense
grid would.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from adaptive_moe.buckets import between, first_buckets
from adaptive_moe.decision import Rule, needs_refining
from adaptive_moe.policy_table import Bucket


def explore(
    domain: Sequence[int],
    wanted: Sequence[int],
    rule: Rule,
    measure: Callable[[int], Bucket],
    has_time: Callable[[], bool],
) -> dict[int, Bucket]:
    """Measure the first buckets, small to large, then refine the costliest gap while there is time.

    domain and wanted as in buckets.first_buckets; measure(num_tokens) does the work.
    """
    found = {num_tokens: measure(num_tokens) for num_tokens in first_buckets(domain, wanted)}
    while has_time() and (gap := worst_gap(found, domain, rule)) is not None:
        found[gap] = measure(gap)
    return found


def worst_gap(found: Mapping[int, Bucket], domain: Sequence[int], rule: Rule) -> int | None:
    """The count inside the neighbours that may lose most, or None where none may lose enough."""
    counts = sorted(found)
    gaps = [
        (cost, middle)
        for low, high in pairwise(counts)
        if (cost := gap_cost(found[low], found[high], rule)) > 0.0
        and (middle := between(domain, low, high)) is not None
    ]
    return max(gaps)[1] if gaps else None


def gap_cost(low: Bucket, high: Bucket, rule: Rule) -> float:
    """needs_refining over the fills of two neighbouring buckets: the worst of them."""
    return max(
        needs_refining(a.verdict, b.verdict, rule)
        for a, b in zip(low.fills, high.fills, strict=True)
    )
