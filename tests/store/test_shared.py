"""torch.distributed's store, as other ranks of the job see it; and that it never suffers or
delays."""

import logging
import threading
import time

import pytest
import torch.distributed as dist

from adaptive_moe.store import shared
from adaptive_moe.store.shared import SharedStore
from adaptive_moe.store.text import MAX_BYTES
from tests.store.making import KEY


def hash_store(tmp_path):
    return dist.HashStore()


def file_store(tmp_path):
    return dist.FileStore(str(tmp_path / "store"), 1)


def tcp_store(tmp_path):
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def prefix_store(tmp_path):
    return dist.PrefixStore("name", tcp_store(tmp_path))


@pytest.mark.parametrize("make", [hash_store, file_store, tcp_store, prefix_store])
def test_the_first_text_is_every_ranks_on_every_store(tmp_path, make):
    store = make(tmp_path)
    with SharedStore(lambda: store) as one, SharedStore(lambda: store) as other:
        assert one.get(KEY) is None
        assert one.put_if_absent(KEY, "first") == "first"
        assert other.put_if_absent(KEY, "second") == "first"
        assert other.get(KEY) == one.get(KEY) == "first"


def test_the_largest_text_is_shared_and_leaves_the_store_alive(tmp_path):
    store = tcp_store(tmp_path)
    with SharedStore(lambda: store) as stores:
        assert stores.put_if_absent(KEY, "x" * MAX_BYTES) == "x" * MAX_BYTES
    store.set("alive", "yes")
    assert store.get("alive") == b"yes"


class Recorder:
    """A store that notes what it is asked, and answers as `answer` says."""

    def __init__(self, answer=lambda: None):
        self.asked, self.answer = [], answer

    def check(self, keys):
        self.asked.append("check")
        self.answer()
        return False

    def compare_set(self, key, expected, desired):
        self.asked.append("compare_set")
        self.answer()
        return desired.encode()


def test_a_longer_text_is_not_even_offered(caplog):
    store = Recorder()
    with SharedStore(lambda: store) as stores:
        assert stores.put_if_absent(KEY, "x" * (MAX_BYTES + 1)) is None
        assert stores.put_if_absent(KEY, "short") == "short"
    assert store.asked == ["compare_set"]
    assert len(caplog.messages) == 1


def test_an_absent_key_is_not_read():
    store = Recorder()  # it has no get, which would block
    with SharedStore(lambda: store) as stores:
        assert stores.get(KEY) is None


def test_after_one_failure_it_is_not_asked_again_in_this_process(caplog):
    def fails():
        raise dist.DistNetworkError("the connection was closed")

    store = Recorder(fails)
    for _ in range(2):
        with SharedStore(lambda: store) as stores:
            assert stores.get(KEY) is None
            assert stores.put_if_absent(KEY, "text") is None
    assert store.asked == ["check"]
    (line,) = caplog.messages
    assert "DistNetworkError: the connection was closed" in line


def test_a_store_that_does_not_answer_costs_the_limit_once(monkeypatch, caplog):
    monkeypatch.setattr(shared, "LIMIT_S", 0.3)
    never = threading.Event()
    store = Recorder(never.wait)
    begun = time.monotonic()
    with SharedStore(lambda: store) as stores:
        assert stores.get(KEY) is None
        assert stores.put_if_absent(KEY, "text") is None
    assert time.monotonic() - begun < 5.0
    assert store.asked == ["check"]
    assert "no answer within 0.3 s" in caplog.messages[0]
    never.set()


def test_a_slow_store_costs_the_limit_in_total(monkeypatch):
    monkeypatch.setattr(shared, "LIMIT_S", 0.5)
    store = Recorder(lambda: time.sleep(0.2))
    with SharedStore(lambda: store) as stores:
        for _ in range(20):
            stores.get(KEY)
    assert len(store.asked) <= 4


def test_its_thread_is_a_daemon_and_ends_with_the_warm_up():
    before = set(threading.enumerate())
    with SharedStore(Recorder) as stores:
        stores.get(KEY)
        stores.get(KEY)
        (thread,) = set(threading.enumerate()) - before
        assert thread.daemon
    thread.join(5.0)
    assert not thread.is_alive()


def test_a_value_that_is_no_text_is_a_miss_and_no_failure(caplog):
    store = dist.HashStore()
    store.set(KEY.name, b"\xff\xfe")
    with SharedStore(lambda: store) as stores:
        assert stores.get(KEY) is None
        store.set(KEY.name, "text")
        assert stores.get(KEY) == "text"
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


def test_a_process_that_is_alone_has_no_store():
    with SharedStore() as stores:
        assert stores.get(KEY) is None
        assert stores.put_if_absent(KEY, "text") is None
