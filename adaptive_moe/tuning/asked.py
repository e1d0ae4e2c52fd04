"""Whom an eager bucket need not measure, as another situation has answered already. Pure.

An eager call of as few tokens as graphs hold is rare, and gets another candidate only where that
one is the choice for graphs, too (policy/table.py): nobody else is measured there. And who is
slower on the busy device, wherever the bucket may serve, can serve nowhere below `busy_from`.
"""

from collections.abc import Iterable, Sequence

from adaptive_moe.policy.decision import Standing, Verdict

SLOWER_BUSY = "not measured: it is slower on a busy device"
NOT_IN_GRAPH = "not measured: it is not faster in a graph"
# Neighbouring eager buckets of few tokens are at most so far apart, as a ratio.
APART = 4

# The verdicts of one bucket, by fill.
Fills = Sequence[Verdict]


def unasked(
    names: Iterable[str], graph: Sequence[Fills] | None, busy: Sequence[Fills] | None
) -> dict[str, str]:
    """Whom not to measure, and why.

    graph, busy: the buckets of that situation which the eager one shares counts with; None where
    the situation says nothing about them.
    """
    names = list(names)
    found: dict[str, str] = {}
    if busy is not None:
        slower = {Standing.SLOWER, Standing.HOPELESS}
        found = {n: SLOWER_BUSY for n in names if all(_stands(f, n) & slower for f in busy)}
    if graph is not None:
        won = {n for n in names if any(Standing.FASTER in _stands(f, n) for f in graph)}
        found |= {n: NOT_IN_GRAPH for n in names if n not in won}
    return found


def _stands(fills: Fills, name: str) -> set[Standing]:
    return {r.standing for verdict in fills for r in verdict.results if r.candidate == name}
