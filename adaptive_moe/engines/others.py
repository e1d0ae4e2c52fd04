"""The other ranks, as one warm-up meets them: before this rank measures, and once after."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from adaptive_moe.engines.own import OwnTables
from adaptive_moe.kernels.call import CallKey
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.ranks.agreement import Channel, agree, limit_for, look

logger = logging.getLogger("adaptive_moe")

# How the other ranks are reached; None is for a rank that is alone.
Connect = Callable[[], Channel | None]


def rank_and_size() -> tuple[int, int]:
    """This rank in torch.distributed, and how many there are. Rank 0 speaks for all."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


@dataclass(frozen=True)
class Others:
    """channel: None where there are no others. limit_s, over: see agreement.agree. lost: why they
    cannot be reached."""

    channel: Channel | None = None
    limit_s: float = 0.0
    over: int | None = None
    lost: str = ""

    @classmethod
    def reached(cls, connect: Connect | None, coverages: int, budget_s: float) -> "Others":
        """Before measuring: the others are told for how long that may take."""
        try:
            channel = None if connect is None else connect()
            if channel is None:
                return cls()
            limit_s = limit_for(coverages, budget_s)
            return cls(channel, limit_s, look(channel, limit_s))
        except Exception as error:
            lost = f"nothing was agreed, no table is used: {type(error).__name__}: {error}"
            logger.warning("%s", lost)
            return cls(lost=lost)

    def agree(
        self, own: OwnTables, before: Mapping[CallKey, PolicyTable]
    ) -> tuple[dict[CallKey, PolicyTable], tuple[str, ...]]:
        """The tables to set now, and why others have none. A rank that is alone sets its own."""
        mine = {key: one.table for key, one in own.tables.items()}
        if self.channel is None:
            return ({} if self.lost else mine), ((self.lost,) if self.lost else ())
        brought: dict[Coverage, PolicyTable] = {}
        for table in (*mine.values(), *before.values()):
            # Layers on two devices of this process can be covered alike: the first brings its own.
            brought.setdefault(table.evidence.coverage, table)
        failed = {c: why for c, why in own.failed.items() if c not in brought}
        agreed = agree(brought, failed, self.channel, limit_s=self.limit_s, over=self.over)
        tables = {}
        for key, table in {**before, **mine}.items():
            ours = agreed.tables.get(table.evidence.coverage)
            same_device = ours is not None and _same_device(ours, table)
            if ours is not None and same_device and ours != before.get(key):
                tables[key] = ours
        return tables, agreed.problems


def _same_device(one: PolicyTable, other: PolicyTable) -> bool:
    return one.evidence.environment == other.evidence.environment
