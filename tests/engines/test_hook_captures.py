"""Which candidates captured calls took: counted while an engine starts."""

import pytest
import torch

from adaptive_moe.engines.seam import capture_query
from tests.engines.hooking import KEY, batch, installed, policy_that_arrived
from tests.tables import make_table


@pytest.mark.parametrize(
    ("cuda", "hip", "asks_torch"),
    [("12.8", None, True), (None, "7.0", True), (None, None, False)],
)
def test_a_torch_for_the_cpu_is_not_asked_and_never_captures(monkeypatch, cuda, hip, asks_torch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    query = capture_query()
    assert (query is torch.cuda.is_current_stream_capturing) is asks_torch
    if not asks_torch:
        assert query() is False


@pytest.fixture
def captures():
    """Whether the stream is being captured now: captures[0]."""
    return [False]


@pytest.fixture
def hook(aiter, captures):
    """With a table that differs between captured and eager calls."""
    table = make_table({1: 0, 64: 1}, {1: 0, 8: 2, 64: 1})
    return installed(aiter, tables={KEY: table}, is_capturing=lambda: captures[0])


def test_captured_calls_are_counted_by_candidate_and_answered_as_before(aiter, captures, hook):
    def answers():
        found = []
        for captures[0] in (True, False):
            for num_tokens in (1, 8, 8, 64, 65):
                aiter.fused_moe(*batch(num_tokens))
                found.append(policy_that_arrived())
        return found

    before = answers()
    hook.watch_captures(True)
    assert answers() == before == [0, 2, 2, 1, 1, 0, 1, 1, 1, 1]
    assert hook.captured() == {"policy 2": 2, "policy 1": 2, "policy 0": 1}
    hook.watch_captures(False)
    assert answers() == before
    assert sum(hook.captured().values()) == 5


def test_tables_that_come_while_it_is_watched_are_watched_too(aiter, captures, hook):
    hook.watch_captures(True)
    hook.set_tables({KEY: make_table({64: 2})})
    captures[0] = True
    aiter.fused_moe(*batch(8))
    assert hook.captured() == {"policy 2": 1}
