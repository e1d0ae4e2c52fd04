"""Ranks of one engine over gloo, each with an AITER, a hook and a cache folder of its own: they end
with one table, and none waits for another. More of what can go wrong: tests/faults/ranks.py."""

import hashlib
import time

import pytest

from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.store.key import Request
from adaptive_moe.store.shared import LIMIT_S
from adaptive_moe.store.text import to_text
from tests.engines.test_warm_up import Start
from tests.faults.ranks import hosted_store, results_of, world

RANKS = 8
# For a busy machine.
SLACK_S = 5.0


def warm_up(cache, rank):
    """One rank's warm-up: what it measures takes a while, and is no other rank's table."""
    start, measured_s = Start(cache / str(rank)), 0.0

    def measure(*args, **options):
        nonlocal measured_s
        begun = time.monotonic()
        time.sleep(0.1 + 0.05 * rank)
        evidence = start.measure(*args, **options).evidence
        table = PolicyTable(type(evidence)(**{**vars(evidence), "seconds": 1.0 + rank}))
        measured_s = time.monotonic() - begun
        return table

    made = start.warm_up(measure=measure)
    texts = [to_text(Request(""), table) for table in start.hook.tables.values()]
    return {
        "tables": [hashlib.sha256(text.encode()).hexdigest() for text in texts],
        "policy": start.sort(8),
        "origins": list(made.origins.values()),
        "problems": made.problems,
        "beyond_measuring_s": made.seconds - measured_s,
    }


@pytest.mark.processes
@pytest.mark.parametrize("missing", [(), (0,)], ids=["all come", "rank 0 has no MoE layer"])
def test_eight_ranks_end_with_one_table_and_the_next_start_measures_nothing(tmp_path, missing):
    def work(rank):
        return None if rank in missing else warm_up(tmp_path, rank)

    def start(name):
        with hosted_store() as (port, _):
            return [a for a in results_of(world(RANKS, work, port=port, name=name)) if a]

    first, second = start("first"), start("second")
    assert len(first) == RANKS - len(missing)
    assert len({str(answer["tables"]) for answer in first + second}) == 1
    assert all(answer["policy"] == 1 and answer["problems"] == [] for answer in first + second)
    assert max(answer["beyond_measuring_s"] for answer in first + second) < LIMIT_S + SLACK_S
    assert [answer["origins"] for answer in second] == [["stored"]] * len(second)
