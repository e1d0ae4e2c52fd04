"""Whom an eager bucket need not measure: by what the other situations say of its neighbours."""

from collections.abc import Sequence

import pytest

from adaptive_moe.policy.decision import Result, Standing, Verdict
from adaptive_moe.tuning.asked import NOT_IN_GRAPH, SLOWER_BUSY, Fills, unasked

FASTER, TIED, SLOWER, HOPELESS = (
    Standing.FASTER,
    Standing.TIED,
    Standing.SLOWER,
    Standing.HOPELESS,
)


def fills(*standings: Sequence[Standing]) -> Fills:
    """One bucket: for each fill the standings of a, b and so on."""
    return [
        Verdict("base", True, 8, "", tuple(Result(n, s) for n, s in zip("abc", one, strict=True)))
        for one in standings
    ]


@pytest.mark.parametrize(
    ("graph", "busy", "left_out"),
    [
        (None, None, {}),
        # Slower wherever the bucket may serve, in one fill at least.
        (None, [fills((SLOWER, TIED, HOPELESS))], {"a": SLOWER_BUSY, "c": SLOWER_BUSY}),
        (None, [fills((TIED, FASTER, TIED), (SLOWER, FASTER, TIED))], {"a": SLOWER_BUSY}),
        (None, [fills((SLOWER,) * 3), fills((TIED, SLOWER, FASTER))], {"b": SLOWER_BUSY}),
        # Faster in a graph somewhere, in one fill at least.
        ([fills((FASTER, TIED, SLOWER))], None, {"b": NOT_IN_GRAPH, "c": NOT_IN_GRAPH}),
        ([fills((TIED,) * 3, (TIED, FASTER, TIED)), fills((FASTER, TIED, TIED))], None, {"c": 0}),
        ([], None, {"a": NOT_IN_GRAPH, "b": NOT_IN_GRAPH, "c": NOT_IN_GRAPH}),
        # Both must be for it.
        (
            [fills((FASTER, FASTER, TIED))],
            [fills((SLOWER, TIED, TIED))],
            {"a": SLOWER_BUSY, "c": NOT_IN_GRAPH},
        ),
    ],
)
def test_who_can_serve_nowhere_is_not_asked(
    graph: list[Fills] | None, busy: list[Fills] | None, left_out: dict[str, str]
) -> None:
    assert unasked("abc", graph, busy) == {n: why or NOT_IN_GRAPH for n, why in left_out.items()}
