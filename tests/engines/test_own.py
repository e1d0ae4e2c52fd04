"""Other sorts are called before they serve, wherever a stored or agreed table chooses them."""

import logging
from types import SimpleNamespace

import torch

from adaptive_moe.engines.own import OwnTable, make_ready
from adaptive_moe.engines.wanted import Wanted
from adaptive_moe.kernels import Candidate, SortKernel
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.shape import SortingShape
from tests.engines.seen import seen_call
from tests.tables import make_table

NAMES = ("policy 0", "policy 1", "flydsl")
COVERAGE = Coverage.up_to(SortingShape(16, 4, 64), 64, (1, 8, 32), busy_from=1)


def called(table, fails=False):
    """Who was called for how many tokens, and in which inference mode."""
    calls = []

    def candidate(name):
        def bind(inputs):
            def call():
                calls.append((name, len(inputs.topk_ids), torch.is_inference_mode_enabled()))
                if fails:
                    raise RuntimeError("it does not compile")
                return ()

            return call

        return Candidate(name, bind)

    seen = seen_call(8, inference=True)
    kernel = SortKernel("k", torch.device("cpu"), tuple(candidate(name) for name in NAMES))
    own = OwnTable(
        Wanted(seen.key, seen, COVERAGE), table, kernel, SimpleNamespace(), measured=False
    )
    make_ready(own, table)
    return calls


def test_another_sort_is_called_wherever_it_is_chosen_as_the_seen_call_was_made():
    table = make_table({8: 0, 64: 2}, {1: 2, 8: 1, 32: 2}, candidates=NAMES, coverage=COVERAGE)
    assert called(table) == [("flydsl", 1, True), ("flydsl", 32, True), ("flydsl", 64, True)]


def test_policies_need_nothing():
    table = make_table({64: 1}, {1: 1, 8: 1, 32: 1}, candidates=NAMES, coverage=COVERAGE)
    assert called(table) == []


def test_a_sort_that_raises_is_left_to_the_hook(caplog):
    caplog.set_level(logging.DEBUG, "adaptive_moe")
    table = make_table({64: 2}, {1: 1, 8: 1, 32: 1}, candidates=NAMES, coverage=COVERAGE)
    assert called(table, fails=True) == [("flydsl", 64, True)]
    assert [(r.levelname, r.message) for r in caplog.records] == [
        (
            "DEBUG",
            "not every sort was called before it serves: RuntimeError('it does not compile')",
        )
    ]
