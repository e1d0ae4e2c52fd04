"""Each test begins with a shared store that has not failed."""

import threading

import pytest

from adaptive_moe.store import shared


@pytest.fixture(autouse=True)
def has_not_failed(monkeypatch):
    monkeypatch.setattr(shared, "_failed", threading.Event())
