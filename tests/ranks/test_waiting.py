"""Waiting: for a key, for a limit that others have said, and for a store that may not answer."""

import threading

import pytest

from adaptive_moe.ranks.waiting import Patience, announce, bounded


def test_who_always_loses_against_others_that_raise_the_limit_gives_up():
    class Contested:
        """Another rank is always quicker, with a limit a little longer than before."""

        tried = 0

        def check(self, keys):
            return self.tried > 0

        def get(self, key):
            return str(float(self.tried)).encode()

        def compare_set(self, key, expected, desired):
            assert (key, expected) == ("limit", f"{float(self.tried)}" if self.tried else "")
            assert desired == "60.0"
            self.tried += 1
            return b"another"

    store = Contested()
    announce(store, 60.0)
    assert store.tried == 8


class Said:
    """A store in which a rank has announced a limit, and nobody else ever does."""

    def __init__(self, text):
        self.text, self.raised = text, []

    def check(self, keys):
        return keys == ["limit"]

    def get(self, key):
        return self.text.encode()

    def compare_set(self, key, expected, desired):
        self.raised.append((key, expected, desired))
        self.text = desired


@pytest.mark.parametrize(
    ("own", "said", "limit_s", "longer"),
    [
        (5.0, "60.0", 60.0, True),
        (5.0, "5.0", 5.0, False),
        (5.0, "4.0", 5.0, False),
        (0.1, "0.5", 0.5, True),
        (0.1, "soon", 0.1, False),
        (0.1, "nan", 0.1, False),
        (0.1, "inf", 0.1, False),
        (5.0, "1e9", 3600.0, True),
    ],
)
def test_a_longer_limit_of_others_is_taken_over_up_to_an_hour(own, said, limit_s, longer):
    patience = Patience(own)
    assert patience.learn(Said(said)) is longer
    assert patience.limit_s == limit_s


@pytest.mark.parametrize(
    ("said", "raised"),
    [("5.0", []), ("6.0", []), ("4.0", [("limit", "4.0", "5.0")]), ("x", [("limit", "x", "5.0")])],
)
def test_a_limit_is_announced_where_it_is_longer_than_what_was_said(said, raised):
    store = Said(said)
    announce(store, 5.0)
    assert store.raised == raised


def test_the_thread_that_talks_to_the_store_has_a_name_and_holds_no_process():
    def who():
        thread = threading.current_thread()
        return thread.name, thread.daemon

    assert bounded(who, lambda: 60.0) == ("adaptive-moe-exchange", True)


def test_what_is_raised_on_that_thread_is_raised_to_the_caller():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bounded(interrupted, lambda: 60.0)


def test_a_wait_that_was_found_too_short_meanwhile_goes_on():
    """As where a rank announces that it needs longer."""
    longer = threading.Event()
    limits = iter([0.01])

    def seconds():
        if (limit := next(limits, None)) is not None:
            return limit
        longer.set()
        return 60.0

    assert bounded(lambda: longer.wait(60.0), seconds) is True


def test_a_store_that_does_not_answer_is_told_with_the_time_it_was_given():
    never = threading.Event()
    with pytest.raises(TimeoutError) as raised:
        bounded(never.wait, lambda: 0.0125)
    assert str(raised.value) == "the ranks' store did not answer within 0.0125 s"
    never.set()
