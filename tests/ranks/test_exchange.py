"""The exchange: whoever misses one, doubles one, comes late or finds leftovers is back at the next.

Over a real key-value store in this process, a thread a rank; what ranks bring are words.
"""

import logging
import threading

import pytest
import torch.distributed as dist

from adaptive_moe.ranks import exchange as exchange_module
from adaptive_moe.ranks.channel import Channel, open_channel
from adaptive_moe.ranks.exchange import NoDecisionError, exchange, look
from tests.faults.corrupt import listening

LONG, SHORT = 60.0, 0.15


def words(messages):
    """The decision: what each rank brought, in order of ranks."""
    return b" ".join(messages[rank] or b"-" for rank in sorted(messages))


class World:
    """Ranks that share a store; `kinds` of stores may be one that each rank opens for itself."""

    def __init__(self, size, connect=None):
        self.store = dist.HashStore()
        self.channels = [Channel(n, size, connect or (lambda: self.store)) for n in range(size)]
        self.found = {}
        self.threads = []

    def start(self, rank, word, limit_s=LONG, over=None):
        def work():
            try:
                got = exchange(self.channels[rank], word.encode(), words, limit_s, over)
                self.found[rank, word] = got.decode()
            except Exception as error:
                self.found[rank, word] = error

        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()

    def wait(self):
        for thread in self.threads:
            thread.join(30.0)
        assert not any(thread.is_alive() for thread in self.threads)
        self.threads.clear()
        found, self.found = self.found, {}
        return found

    def all_bring(self, words, limit_s=LONG):
        for rank, word in enumerate(words):
            if word is not None:
                self.start(rank, word, limit_s)
        return self.wait()

    def until(self, condition):
        pause = threading.Event()
        for _ in range(3000):
            if condition():
                return
            pause.wait(0.01)
        pytest.fail("did not come to pass")

    def opened(self):
        return int(self.store.get("open")) if self.store.check(["open"]) else 0


def same(found, expected):
    assert set(found.values()) == {expected}, found


def test_everybody_reads_what_everybody_brought_again_and_again():
    world = World(3)
    for turn in "ab":
        same(world.all_bring([turn + "0", turn + "1", turn + "2"]), f"{turn}0 {turn}1 {turn}2")
    assert not world.store.check(["1/from/1"])
    assert not world.store.check(["2/from/2"])


def test_ranks_of_one_host_that_met_over_a_file(tmp_path):
    """As vLLM's do. Each rank opens the file by itself; what an earlier run left in it is old."""
    path = str(tmp_path / "store")
    for _ in range(2):
        world = World(3, lambda: dist.FileStore(path, 3))
        same(world.all_bring(["x", "y", "z"]), "x y z")


def test_a_missed_exchange_costs_that_one():
    world = World(3)
    same(world.all_bring(["a0", "a1", None], SHORT), "a0 a1 -")
    same(world.all_bring(["b0", "b1", "b2"]), "b0 b1 b2")


def test_a_rank_that_is_early_after_a_missed_one_waits_for_the_next():
    world = World(2)
    same(world.all_bring(["a0", None], SHORT), "a0 -")
    world.start(1, "b1", over=look(world.channels[1], LONG))
    world.start(0, "b0")
    same(world.wait(), "b0 b1")


def test_an_additional_exchange_of_one_rank_costs_that_rank_its_wait():
    world = World(2)
    same(world.all_bring(["a0", "a1"]), "a0 a1")
    (alone,) = world.all_bring([None, "more"], SHORT).values()
    assert isinstance(alone, NoDecisionError)
    assert str(alone) == "rank 1 waited 0.188 s for the leader to open an exchange in vain"
    same(world.all_bring(["b0", "b1"]), "b0 b1")


def test_an_additional_exchange_of_the_leader_costs_that_one():
    world = World(2)
    same(world.all_bring(["a0", "a1"]), "a0 a1")
    same(world.all_bring(["more", None], SHORT), "more -")
    same(world.all_bring(["b0", "b1"]), "b0 b1")


def leave_open(world, messages=()):
    """What a leader leaves that dies while it collects."""
    number = world.store.add("number", 1)
    world.store.set("open", str(number))
    for rank, word in messages:
        world.store.set(f"{number}/from/{rank}", word)


def test_what_a_dead_leader_left_open_is_abandoned_by_the_next():
    """Rank 1 joins it, being early; rank 2's word in it is from the earlier run."""
    world = World(3)
    leave_open(world, [(2, "old")])
    world.start(1, "b1")
    world.until(lambda: world.store.check(["1/from/1"]))
    world.start(0, "b0")
    world.start(2, "b2")
    same(world.wait(), "b0 b1 b2")
    assert not world.store.check(["1/from/2"])


def test_a_leader_that_is_replaced_does_not_decide_twice():
    """The old one still collects when the new one opens: it ends without a decision."""
    world = World(2)
    world.start(0, "old")
    world.until(lambda: world.opened() == 1)
    world.channels[0] = Channel(0, 2, lambda: world.store)
    world.start(0, "new")
    world.until(lambda: world.opened() == 2)
    world.start(1, "b1")
    world.until(lambda: (0, "new") in world.found)
    world.store.set("1/from/1", b"late")
    found = world.wait()
    old = found.pop((0, "old"))
    assert str(old) == "another leader has opened an exchange meanwhile"
    same(found, "new b1")


def test_an_old_decision_is_never_taken_for_a_new_one():
    world = World(2)
    same(world.all_bring(["a0", "a1"]), "a0 a1")
    world.channels = [Channel(rank, 2, lambda: world.store) for rank in range(2)]
    world.start(1, "b1")
    assert not world.store.check(["1/from/1"])
    world.start(0, "b0")
    same(world.wait(), "b0 b1")


def test_a_leader_that_dies_before_the_outcome_costs_that_exchange():
    world = World(2)
    leave_open(world)
    world.store.set("1/decision", b"never said")
    (alone,) = world.all_bring([None, "a1"], SHORT).values()
    assert str(alone) == "rank 1 waited 0.188 s for the leader's decision in vain"
    same(world.all_bring(["b0", "b1"]), "b0 b1")


def test_a_rank_that_is_late_reads_the_outcome_and_goes():
    """With a limit that outlasts the test, so that waiting for another exchange would fail it."""
    world = World(2)
    over = look(world.channels[1], SHORT)
    same(world.all_bring(["a0", None], SHORT), "a0 -")
    world.start(1, "a1", over=over)
    same(world.wait(), "a0 -")
    assert not world.store.check(["1/from/1"])
    same(world.all_bring(["b0", "b1"]), "b0 b1")


def test_a_rank_that_is_late_stays_out_of_the_next_exchange():
    world = World(2)
    over = look(world.channels[1], SHORT)
    same(world.all_bring(["a0", None], SHORT), "a0 -")
    world.start(0, "b0")
    world.until(lambda: world.opened() == 2)
    world.start(1, "a1", over=over)
    world.until(lambda: (1, "a1") in world.found)
    assert world.found.pop((1, "a1")) == "a0 -"
    world.start(1, "b1", over=look(world.channels[1], LONG))
    same(world.wait(), "b0 b1")


def test_who_has_looked_once_and_exchanges_twice_is_not_late_for_what_it_had():
    world = World(2)
    over = look(world.channels[1], SHORT)
    for turn in "ab":
        world.start(1, f"{turn}1", limit_s=5.0, over=over)
        world.start(0, f"{turn}0", limit_s=5.0)
        same(world.wait(), f"{turn}0 {turn}1")


def test_one_exchange_of_a_process_waits_for_another_within_its_limit():
    channel = World(2).channels[1]
    with channel.turn.lock, pytest.raises(NoDecisionError) as raised:
        exchange(channel, b"", words, 0.05)
    assert str(raised.value) == "an earlier exchange of this process has not ended"
    assert not channel.turn.lock.locked()


def test_a_look_at_a_store_that_fails_is_told_to_who_wants_to_know():
    def gone():
        raise ConnectionResetError("x" * 300)

    with listening(logging.DEBUG) as lines:
        assert look(Channel(1, 2, gone), LONG) is None
    assert lines == [f"what exchange is over is not known: ConnectionResetError: {'x' * 278}"]


def test_an_exchange_that_was_abandoned_is_nobodys_outcome():
    world = World(2)
    over = look(world.channels[1], LONG)
    leave_open(world)
    world.start(0, "a0")
    world.until(lambda: world.opened() == 2)
    world.start(1, "a1", over=over)
    same(world.wait(), "a0 a1")


def test_a_number_that_a_leader_took_and_never_opened_is_passed_over():
    world = World(2)
    over = look(world.channels[1], LONG)
    world.store.add("number", 1)
    world.start(0, "a0")
    world.until(lambda: world.opened() == 2)
    world.start(1, "a1", over=over)
    same(world.wait(), "a0 a1")


def test_two_exchanges_of_the_same_ranks_at_once_take_turns():
    """Both of rank 1 have looked before either began."""
    world = World(2)
    over = look(world.channels[1], LONG)
    for word in ("x", "y"):
        world.start(0, word)
        world.start(1, word, over=over)
    found = world.wait()
    assert all(found[0, word] in ("x x", "x y", "y x", "y y") for word in "xy"), found
    assert sorted(found[0, word] for word in "xy") == sorted(found[1, word] for word in "xy")


def test_a_store_that_was_replaced_starts_afresh():
    world = World(2)
    for turn in "abc":
        same(world.all_bring([turn, turn]), f"{turn} {turn}")
    world.store = dist.HashStore()
    same(world.all_bring(["d", "d"]), "d d")


def test_who_has_little_to_measure_waits_for_who_said_it_has_much():
    """Rank 1 may wait for a tenth of a second by itself, and the leader for twice that."""
    world = World(3)
    look(world.channels[2], LONG)
    world.start(1, "a1", limit_s=0.1)
    threading.Event().wait(0.4)
    world.start(0, "a0", limit_s=0.2)
    threading.Event().wait(0.6)
    world.start(2, "a2", limit_s=LONG)
    same(world.wait(), "a0 a1 a2")


def test_who_waits_hears_of_a_longer_limit_in_time():
    """Rank 1 begins its warm-up while the leader waits for it already."""
    world = World(2)
    world.start(0, "a0", limit_s=0.3)
    world.until(lambda: world.opened() == 1)
    over = look(world.channels[1], LONG)
    threading.Event().wait(0.5)
    world.start(1, "a1", over=over)
    same(world.wait(), "a0 a1")


@pytest.mark.parametrize("nonsense", ["", "nan", "inf", "-1", "soon"])
def test_a_limit_that_is_none_is_not_waited_for(nonsense):
    world = World(2)
    world.store.set("limit", nonsense)
    same(world.all_bring(["a0", None], SHORT), "a0 -")


def test_the_longest_limit_said_is_the_one_that_stays():
    world = World(2)
    for limit_s in (2.0, 5.5, 3.0):
        look(world.channels[1], limit_s)
    assert world.store.get("limit") == b"5.5"


def test_who_gives_up_just_after_the_decision_takes_it():
    """The outcome is set once: giving up does not undo what the leader decided."""
    world = World(2)

    class Blind:
        """Never sees the outcome while it waits."""

        def __getattr__(self, name):
            return getattr(world.store, name)

        def check(self, keys):
            return not keys[0].endswith("outcome") and world.store.check(keys)

    world.channels[1] = Channel(1, 2, Blind)
    world.start(0, "a0")
    world.start(1, "a1", limit_s=1.0)
    same(world.wait(), "a0 a1")


def test_a_store_that_never_answers_does_not_hold_the_caller():
    never = threading.Event()
    channel = Channel(1, 2, never.wait)
    assert look(channel, LONG, timeout_s=0.05) is None
    with pytest.raises(TimeoutError, match="did not answer"):
        exchange(channel, b"", words, 0.05)
    with pytest.raises((TimeoutError, NoDecisionError)):
        exchange(channel, b"", words, 0.05)
    never.set()


@pytest.mark.parametrize("rank", [0, 1])
def test_who_was_left_behind_takes_part_no_more(rank, monkeypatch):
    """The store answers again after the caller has left."""
    world, again = World(2), threading.Event()
    done = threading.Event()

    def connect():
        again.wait()
        return world.store

    class Gone(exchange_module.Patience):
        def check(self):
            try:
                super().check()
            finally:
                done.set()

    leave_open(world)
    world.channels[rank] = Channel(rank, 2, connect)
    monkeypatch.setattr(exchange_module, "Patience", Gone)
    with pytest.raises(TimeoutError):
        exchange(world.channels[rank], b"", words, 0.05)
    again.set()
    assert done.wait(30.0)
    assert world.channels[rank].turn.lock.acquire(timeout=30.0)
    assert world.opened() == 1
    assert not world.store.check(["1/from/1"])


def test_a_leader_that_cannot_decide_says_so_at_once():
    world = World(2)

    def fail(messages):
        return 1 / 0

    world.start(1, "a1")
    why = "the leader could not decide: ZeroDivisionError: division by zero"
    with pytest.raises(NoDecisionError, match=f"^{why}$"):
        exchange(world.channels[0], b"", fail, LONG)
    (found,) = world.wait().values()
    assert str(found) == why


def test_without_other_ranks_there_is_no_channel():
    assert open_channel() is None
