"""The ranks of one engine end with one table for each coverage, or with none.

Ranks measure alone. Then every rank comes here, whether it measured, found its tables on disk,
failed or has no MoE layer, and brings every table it has: whatever two ranks brought together once,
they run alike from then on, also where one was restarted or had missed an exchange. How they meet
is in exchange.py, what they say in messages.py, what comes of it in merging.py.

A rank that is missing when the leader's time is up voids all coverages: nobody knows which it has.
A coverage that a rank could not calibrate, or was asked another question about, is voided for all.
What is voided gets no table, which is the baseline.

What can still differ: a rank that cannot reach the store at all (its host died, the network is cut)
keeps the baseline, while others may have a decision. That is harmless: every candidate sorts to the
same output, and nothing it does is collective. It costs that rank time.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.ranks.channel import Channel, open_channel
from adaptive_moe.ranks.exchange import NoDecisionError, exchange, look, short
from adaptive_moe.ranks.messages import (
    Decision,
    decide,
    encode_decision,
    encode_message,
    read_decision,
)
from adaptive_moe.ranks.summary import canonical

__all__ = ["LIMIT_S", "Agreement", "Channel", "agree", "limit_for", "look", "open_channel"]

logger = logging.getLogger("adaptive_moe")

# How far apart ranks may come apart from measuring: one may build kernels while another has its
# tables on disk.
LIMIT_S = 120.0

_WITHOUT = "the ranks have no common table, the engine's own policy serves"


@dataclass(frozen=True)
class Agreement:
    """tables: of the coverages that have one, the same on every rank that has that coverage.
    refused: why this rank's other tables are not run; each is still what this rank measured.
    problems: in words, all that went wrong on any rank; they were logged."""

    tables: dict[Coverage, PolicyTable]
    refused: dict[Coverage, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    seconds: float = 0.0


def limit_for(coverages: int, budget_s: float) -> float:
    """Seconds to wait for ranks that may have to measure so many coverages, each within budget_s;
    twice that, since what a budget does not count (inputs, checks, a shared host) takes as long."""
    return LIMIT_S + 2.0 * coverages * budget_s


def agree(
    tables: Mapping[Coverage, PolicyTable],
    failed: Mapping[Coverage, str],
    channel: Channel | None,
    *,
    limit_s: float = LIMIT_S,
    over: int | None = None,
) -> Agreement:
    """Exchange once with the other ranks, and return what all of them run.

    tables are all that this rank has, measured now or earlier; `failed` says why a coverage has
    none. over is what `look` said as this warm-up began: with it, a rank that measured for longer
    than the others wait leaves at once. Without a channel there is nobody to agree with: the tables
    are returned as they are. Never raises, and never waits longer than exchange.WHOLE limits: its
    own, or the longest that a rank has announced by `look`.
    """
    begun = time.monotonic()
    if channel is None:
        return Agreement(dict(tables))
    try:
        message = encode_message(tables, failed)
        decision = read_decision(
            exchange(channel, message, lambda m: encode_decision(decide(m)), limit_s, over)
        )
        agreed = _ours(tables, decision)
    # A store can fail in any way its transport likes; that must only cost the tables.
    except Exception as error:
        known = isinstance(error, (NoDecisionError, TimeoutError))
        problem = f"{_WITHOUT} all shapes: {error if known else short(error)}"
        logger.warning("%s", problem)
        refused = dict.fromkeys(tables, problem)
        return Agreement({}, refused, (problem,), time.monotonic() - begun)
    problems = _problems(tables, decision)
    refused = {one: _why(one, decision) for one in tables if one not in agreed}
    seconds = time.monotonic() - begun
    # One rank says it aloud, or a large engine says it a thousand times.
    aloud = channel.rank == 0
    for problem in problems:
        logger.log(logging.WARNING if aloud else logging.DEBUG, "%s", problem)
    if agreed:
        said = f"{channel.size} ranks run the same {len(agreed)} tables, agreed in {seconds:.3f} s"
        logger.log(logging.INFO if aloud else logging.DEBUG, "%s", said)
    return Agreement(agreed, refused, problems, seconds)


def _ours(
    tables: Mapping[Coverage, PolicyTable], decision: Decision
) -> dict[Coverage, PolicyTable]:
    names = {coverage: canonical(coverage) for coverage in tables}
    return {
        coverage: PolicyTable.from_json(decision.tables[name])
        for coverage, name in names.items()
        if name in decision.tables
    }


def _why(coverage: Coverage, decision: Decision) -> str:
    return _missing(decision) or decision.voided.get(canonical(coverage), "the leader lost it")


def _problems(tables: Mapping[Coverage, PolicyTable], decision: Decision) -> tuple[str, ...]:
    if decision.missing:
        return (f"{_WITHOUT} all shapes: {_missing(decision)}",)
    described = {canonical(coverage): coverage.describe() for coverage in tables}
    return tuple(
        f"{_WITHOUT} {described.get(name, name)}: {why}" for name, why in decision.voided.items()
    )


def _missing(decision: Decision) -> str:
    few = [f"rank {rank} {why}" for rank, why in list(decision.missing.items())[:8]]
    more = len(decision.missing) - len(few)
    return "; ".join(few) + (f"; and {more} more ranks" if more else "")
