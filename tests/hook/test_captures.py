"""Who is asked whether a stream is being captured."""

import pytest
import torch

from adaptive_moe.hook.wrapped_module import capture_query


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
