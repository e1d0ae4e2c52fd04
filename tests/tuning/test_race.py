"""race() and measure() with made-up samplers that keep a log of every call."""

import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_moe.kernels import Candidate, policy_candidates
from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.policy.decision import SWEEPS, Rule, Samples, Standing, decide
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.clocks import Pending, Sampler, Train
from adaptive_moe.tuning.race import LOT, first_look, measure, measure_again, race
from adaptive_moe.tuning.routing import Routing, route, sorting_inputs

RULE = Rule()
ROUNDS = 40


class Runs:
    """Samplers with scripted times and the log of which policy ran when."""

    def __init__(self, **times: Iterator[float] | Callable[[], float] | float) -> None:
        self.log: list[int] = []
        self.samplers = {
            f"policy {name[1:]}": self._sampler(int(name[1:]), t) for name, t in times.items()
        }

    def _sampler(self, policy: int, time: Iterator[float] | Callable[[], float] | float) -> Sampler:
        def sample() -> Pending:
            self.log.append(policy)
            if isinstance(time, float | int):
                return lambda: float(time)
            us = next(time) if isinstance(time, Iterator) else time()
            return lambda: us

        return sample

    def race(
        self, rounds: int = ROUNDS, spent: Callable[[], bool] = lambda: False
    ) -> dict[int, Samples]:
        looked, _ = first_look([Samples(name) for name in self.samplers], self.samplers)
        found = race(looked, self.samplers, RULE, rounds, spent)
        return dict(enumerate(found))

    def rounds(self, live: int) -> list[list[int]]:
        """What ran after the first look, in rounds of `live` policies."""
        size = live * SWEEPS
        log = self.log[len(self.samplers) :]
        return [log[i : i + size] for i in range(0, len(log), size)]


def unsettled(policy: int, us: float = 10.0) -> Callable[[], float]:
    """Times that jump up and down without a pattern, so that nothing is ever settled."""
    rng = random.Random(policy)
    return lambda: us * rng.choice((1.5, 1 / 1.5))


def test_every_round_visits_every_policy_equally_often_and_interleaved() -> None:
    runs = Runs(p0=10.0, p1=unsettled(1), p2=unsettled(2))
    found = runs.race(12)
    assert {len(c.round_us) for c in found.values()} == {12}
    rounds = runs.rounds(3)
    assert len(rounds) == 12
    for visits in rounds:
        sweeps = [visits[i : i + 3] for i in range(0, len(visits), 3)]
        assert all(sorted(sweep) == [0, 1, 2] for sweep in sweeps)


@pytest.mark.parametrize("policies", [2, 3])
def test_each_policy_opens_rounds_and_follows_each_other_one_equally_often(policies: int) -> None:
    runs = Runs(p0=10.0, **{f"p{p}": unsettled(p) for p in range(1, policies)})
    runs.race(4 * policies)
    rounds = runs.rounds(policies)
    opened = Counter(visits[0] for visits in rounds)
    assert opened == dict.fromkeys(range(policies), 4)
    follows = Counter(pair for visits in rounds for pair in pairwise(visits) if pair[0] != pair[1])
    assert len(follows) == policies * (policies - 1)
    assert len(set(follows.values())) == 1
    # As early in a round, too: a turn of the rotation is followed by its mirror image.
    first = Counter(pair for visits in rounds for pair in pairwise(visits[:policies]))
    assert len(first) == len(follows)
    assert len(set(first.values())) == 1


@pytest.mark.parametrize("policies", [2, 3])
def test_a_drift_within_a_round_hits_each_policy_alike(policies: int) -> None:
    runs = Runs(p0=10.0, **{f"p{p}": unsettled(p) for p in range(1, policies)})
    runs.race(4 * policies)
    for visits in runs.rounds(policies):
        mean_place = {
            sum(place for place, policy in enumerate(visits) if policy == wanted)
            for wanted in range(policies)
        }
        assert len(mean_place) == 1


def test_of_two_equal_policies_the_noisier_one_has_no_advantage() -> None:
    rng = random.Random(3)

    def noisy(sigma: float) -> Callable[[], float]:
        return lambda: 10.0 * math.exp(rng.gauss(0, sigma))

    switched = 0
    for _ in range(60):
        found = Runs(p0=noisy(0.01), p1=noisy(0.08)).race(RULE.max_rounds)
        switched += decide(list(found.values()), RULE).candidate != "policy 0"
    assert switched <= 1


def test_a_settled_race_ends_and_is_settled_by_the_same_rule_as_the_verdict() -> None:
    runs = Runs(p0=10.0, p1=8.0, p2=10.0)
    found = runs.race()
    verdict = decide(list(found.values()), RULE)
    assert (verdict.candidate, verdict.settled) == ("policy 1", True)
    assert len(found[0].round_us) < 10


def test_the_first_look_drops_the_hopeless_and_never_runs_them_again() -> None:
    runs = Runs(p0=10.0, p1=80.0, p2=unsettled(1))
    found = runs.race()
    assert found[1].out is Standing.HOPELESS
    assert "times the fastest at the first look" in found[1].reason
    assert found[1].round_us == ()
    # Looked at once, and once more beside the best; then never again.
    assert runs.log.count(1) <= 2
    assert 1 not in runs.log[6:]
    assert len(found[2].round_us) == ROUNDS


@pytest.mark.parametrize(
    ("looks", "reason"),
    [
        # It is never dropped by one look, nor for being three times as slow and no slower.
        ([(10.0,), (30.0,)], ""),
        ([(10.0, 10.0), (45.0, 30.0)], ""),
        ([(10.0, 15.0), (50.0, 45.0)], ""),
        ([(10.0, 10.0), (50.0, 31.0)], "3.1 times the fastest at the first look"),
        # The better of both looks counts.
        ([(10.0, 10.0), (40.0, 90.0)], "4.0 times the fastest at the first look"),
        # The fastest raises when it is looked at again.
        ([(10.0,), (50.0, 50.0), (5.0,)], "10.0 times the fastest at the first look"),
        # It does itself.
        ([(10.0, 10.0), (50.0,)], "raised IndexError: pop from empty list"),
        # Nobody else is in.
        ([(10.0,), ()], "raised IndexError: pop from empty list"),
    ],
)
def test_who_is_dropped_at_the_first_look_and_why(
    looks: list[tuple[float, ...]], reason: str
) -> None:
    left = [list(times) for times in looks]
    samplers: dict[str, Sampler] = {
        f"policy {p}": lambda times=times: partial(float, times.pop(0))  # type: ignore[misc]
        for p, times in enumerate(left)
    }
    found, fastest = first_look([Samples(name) for name in samplers], samplers)
    assert found[0] == Samples("policy 0")
    assert found[1].reason == reason
    raised = reason.startswith("raised")
    assert found[1].out is (
        None if not reason else Standing.FAILED if raised else Standing.HOPELESS
    )
    assert fastest == min(times[0] for times in looks if times)


def test_who_is_in_is_looked_at_and_the_log_has_the_times(caplog: pytest.LogCaptureFixture) -> None:
    runs = Runs(p0=10.0, p1=9.0, p2=8.0)
    out = Samples("policy 1", out=Standing.WRONG, reason="wrong")
    samples = [Samples("policy 0"), out, Samples("policy 2")]
    with caplog.at_level(logging.DEBUG, "adaptive_moe"):
        found, fastest = first_look(samples, runs.samplers)
        race(found, runs.samplers, RULE, 1, lambda: False)
    assert (found, fastest) == (samples, 8.0)
    assert runs.log == [0, 2, 0, 2, 2, 0]
    assert [record.getMessage() for record in caplog.records] == [
        "first look us: {'policy 0': 10.0, 'policy 1': None, 'policy 2': 8.0}",
        "samples us: {'policy 0': [10.0, 10.0], 'policy 2': [8.0, 8.0]}",
    ]


def test_where_nobody_can_be_looked_at_there_is_no_fastest() -> None:
    assert first_look([Samples("policy 0")], {}) == ([Samples("policy 0")], 0.0)


def test_policy_0_is_never_dropped_however_slow() -> None:
    found = Runs(p0=900.0, p1=10.0, p2=11.0).race()
    assert found[0].out is None
    assert decide(list(found.values()), RULE).candidate == "policy 1"


@pytest.mark.parametrize("factor", [5.0, 30.0, 1000.0])
@pytest.mark.parametrize("at", [0, 1])
def test_one_stall_at_the_first_look_drops_no_good_policy(factor: float, at: int) -> None:
    """Whether it hits the policy's own look or, making everything else look slow, none at all."""
    good = iter([8.0 * factor if i == at else 8.0 for i in range(1000)])
    found = Runs(p0=10.0, p1=good, p2=10.0).race()
    assert found[1].out is None
    assert decide(list(found.values()), RULE).candidate == "policy 1"


def test_a_stalled_visit_now_and_then_does_not_hide_a_gain() -> None:
    slow = iter([80.0 if i % 31 == 3 else 8.0 for i in range(10_000)])
    found = Runs(p0=10.0, p1=slow).race()
    assert decide(list(found.values()), RULE).candidate == "policy 1"


def raises_after(runs: Runs, policy: int, after: int) -> Sampler:
    def sample() -> Pending:
        runs.log.append(policy)
        if runs.log.count(policy) > after:
            raise RuntimeError("out of memory")
        return lambda: 9.0

    return sample


@pytest.mark.parametrize("after", [0, 1, 3, 10])
def test_a_policy_that_raises_is_out_with_its_reason_and_the_others_go_on(after: int) -> None:
    runs = Runs(p0=10.0, p1=9.0, p2=unsettled(2))
    runs.samplers["policy 1"] = raises_after(runs, 1, after)
    found = runs.race()
    assert found[1].out is Standing.FAILED
    assert found[1].reason == "raised RuntimeError: out of memory"
    assert runs.log.count(1) == after + 1
    assert len(found[2].round_us) == ROUNDS
    assert decide(list(found.values()), RULE).candidate != "policy 1"


@pytest.mark.parametrize("at", [1, 2, 5])
def test_who_fails_only_when_waited_for_is_out_as_well(at: int) -> None:
    runs = Runs(p0=10.0, p1=9.0, p2=unsettled(2))
    waited = count(1)

    def enqueued() -> Pending:
        runs.log.append(1)

        def wait() -> float:
            if next(waited) == at:
                raise RuntimeError("illegal access")
            return 9.0

        return wait

    runs.samplers["policy 1"] = enqueued
    found = runs.race()
    assert (found[1].out, found[1].reason) == (
        Standing.FAILED,
        "raised RuntimeError: illegal access",
    )
    assert len(found[2].round_us) == ROUNDS


def test_a_round_is_enqueued_whole_before_its_first_sample_is_waited_for() -> None:
    log: list[str] = []

    def sampler(name: str, us: Callable[[], float]) -> Sampler:
        def sample() -> Pending:
            log.append(name)

            def wait() -> float:
                log.append(f"wait {name}")
                return us()

            return wait

        return sample

    samplers = {f"policy {p}": sampler(f"policy {p}", unsettled(p)) for p in (0, 1)}
    race([Samples(name) for name in samplers], samplers, RULE, 1, lambda: False)
    assert len(log) == 2 * len(samplers) * SWEEPS
    assert log[len(log) // 2 :] == [f"wait {name}" for name in log[: len(log) // 2]]


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.01, 0.4))
def test_a_race_ends_at_most_an_eighth_after_it_is_settled(seed: int, noise: float) -> None:
    """Judging costs as much as a sample, so it is not done after each of many rounds."""
    rng = random.Random(seed)
    found = Runs(p0=10.0, p1=lambda: 9.0 * math.exp(rng.gauss(0.0, noise))).race(rounds=500)

    def settled(rounds: int) -> bool:
        first = [replace(s, round_us=s.round_us[:rounds]) for s in found.values()]
        return decide(first, RULE).settled

    ran = len(found[0].round_us)
    assert settled(ran) or ran == 500
    # Where one settles at first, and in passing only, the next look may find it open again.
    late = max(1, ran * 8 // 9)
    assert not all(settled(rounds) for rounds in range(late - 1, ran))
    if ran <= 8:
        assert not settled(ran - 1)


@pytest.mark.parametrize(
    ("had", "ends"),
    [(15, 16), (16, 18), (71, 79), (72, 81), (95, 106)],
)
def test_after_each_eighth_more_a_race_is_judged(had: int, ends: int) -> None:
    """A verdict is possible after one round more."""
    before = [Samples("policy 0", (10.0,) * had), Samples("policy 1", (8.0,) * had)]
    samplers = Runs(p0=10.0, p1=8.0).samplers
    found = race(before, samplers, Rule(min_rounds=had + 1), 500, lambda: False)
    assert [len(one.round_us) for one in found] == [ends] * 2


def test_a_race_whose_last_rival_fails_ends_at_once() -> None:
    """Though it is not time for another judgement."""
    before = [Samples(f"policy {p}", (10.0, 15.0) * 40) for p in (0, 1)]
    runs = Runs(p0=unsettled(0), p1=unsettled(1))
    runs.samplers["policy 1"] = raises_after(runs, 1, 2 * SWEEPS)
    found = race(before, runs.samplers, Rule(min_rounds=1000), 500, lambda: False)
    assert [len(one.round_us) for one in found] == [83, 82]
    assert found[1].out is Standing.FAILED


@pytest.mark.parametrize("after", [0, 1, 3, 10])
def test_without_policy_0_nothing_is_measured_any_more(after: int) -> None:
    runs = Runs(p0=10.0, p1=unsettled(1), p2=unsettled(2))
    runs.samplers["policy 0"] = raises_after(runs, 0, after)
    found = runs.race()
    assert found[0].out is Standing.FAILED
    verdict = decide(list(found.values()), RULE)
    assert (verdict.candidate, verdict.settled) == ("policy 0", True)
    assert "raised RuntimeError" in verdict.reason
    assert len(runs.log) <= 2 * 3 + 2 + SWEEPS * 3 * (1 + after // SWEEPS)


def test_the_budget_is_asked_before_each_round_and_ends_the_race_between_rounds() -> None:
    runs = Runs(p0=10.0, p1=unsettled(1))
    asked: list[int] = []

    def spent() -> bool:
        asked.append(len(runs.log))
        return len(asked) > 5

    found = runs.race(spent=spent)
    assert {len(c.round_us) for c in found.values()} == {5}
    assert asked == [2 + 2 * SWEEPS * i for i in range(6)]
    assert len(runs.log) == asked[-1]


def test_a_budget_already_spent_gives_no_round_and_no_verdict() -> None:
    found = Runs(p0=10.0, p1=5.0).race(spent=lambda: True)
    assert [c.round_us for c in found.values()] == [(), ()]
    verdict = decide(list(found.values()), RULE)
    assert (verdict.candidate, verdict.settled) == ("policy 0", False)


def test_settled_policies_leave_the_rounds() -> None:
    runs = Runs(p0=10.0, p1=10.0, p2=unsettled(2))
    found = runs.race()
    tied = len(found[1].round_us)
    assert tied < 10
    assert len(found[0].round_us) == len(found[2].round_us) == ROUNDS
    assert 1 not in runs.log[3 + tied * 3 * SWEEPS :]
    assert decide(list(found.values()), RULE).results[1].standing is Standing.TIED


def test_a_faster_policy_stays_in_while_a_rival_is_open() -> None:
    runs = Runs(p0=10.0, p1=8.0, p2=unsettled(2, 8.0))
    found = runs.race(20)
    assert {len(c.round_us) for c in found.values()} == {20}


def test_with_nobody_to_race_policy_0_is_not_run_in_vain() -> None:
    runs = Runs(p0=10.0)
    assert runs.race()[0].round_us == ()
    assert len(runs.log) <= 1


def test_a_race_goes_on_where_it_was() -> None:
    runs = Runs(p0=10.0, p1=unsettled(1), p2=99.0)
    looked_at, _ = first_look([Samples(f"policy {p}") for p in (0, 1, 2)], runs.samplers)
    first = race(looked_at, runs.samplers, RULE, 6, lambda: False)
    looked = len(runs.log)
    again = race(first, runs.samplers, RULE, 10, lambda: False)
    assert [len(c.round_us) for c in again] == [10, 10, 0]
    for before, after in zip(first, again, strict=True):
        assert after.round_us[: len(before.round_us)] == before.round_us
    # The order of visits goes on, too.
    assert len(runs.log) - looked == 4 * 2 * SWEEPS
    whole = Runs(p0=10.0, p1=unsettled(1), p2=99.0)
    whole.race(10)
    assert whole.log == runs.log


# measure(): prepared and run


SHAPE = SortingShape(8, 2, 16)
CPU = torch.device("cpu")


def inputs(num_tokens: int = 5) -> SortingInputs:
    return sorting_inputs(
        SHAPE, route(SHAPE, num_tokens, Routing.UNIFORM, 0, CPU), num_tokens, None
    )


class CountingClock:
    """Every call is run, and takes what the table says; prepare fails for `refuses`.

    prepared: the policies, each with what the clock was told its calls take.
    """

    def __init__(self, us: dict[int, float], refuses: int | None = None) -> None:
        self.us, self.refuses = us, refuses
        self.prepared: list[tuple[int, float]] = []

    def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
        policy = train[0].args[8]  # type: ignore[attr-defined]
        self.prepared.append((policy, call_us))
        if policy == self.refuses:
            raise RuntimeError("cannot be captured")

        def sample() -> Pending:
            for call in train:
                call()
            return lambda: self.us[policy]

        return sample


def kernel(sort: Callable[..., tuple[torch.Tensor, ...]]) -> tuple[Candidate, ...]:
    return policy_candidates(sort)


def test_each_sample_runs_the_whole_train_with_the_policy_as_ninth_argument() -> None:
    seen: list[tuple[int, int]] = []

    def sort(*arguments: object) -> tuple[torch.Tensor, ...]:
        seen.append((arguments[8], len(arguments[0])))
        return ()

    train = [inputs(3), inputs(4)]
    clock = CountingClock({0: 10.0, 1: 8.0, 2: 10.0})
    fresh = [Samples(f"policy {p}") for p in (0, 1, 2)]
    found = measure(kernel(sort), train, clock, fresh, RULE, ROUNDS, lambda: False)
    assert decide(found, RULE).candidate == "policy 1"
    assert seen[:6] == [(0, 3), (0, 4), (1, 3), (1, 4), (2, 3), (2, 4)]


def test_a_policy_that_cannot_be_prepared_is_out_and_the_others_are_measured() -> None:
    clock = CountingClock({0: 10.0, 2: 8.0}, refuses=1)
    fresh = [Samples(f"policy {p}") for p in (0, 1, 2)]
    found = measure(kernel(lambda *a: ()), [inputs()], clock, fresh, RULE, ROUNDS, lambda: False)
    assert found[1].out is Standing.FAILED
    assert "cannot be captured" in found[1].reason
    assert decide(found, RULE).candidate == "policy 2"


def test_a_policy_that_is_out_is_neither_prepared_nor_run() -> None:
    ran: list[object] = []
    clock = CountingClock({0: 10.0, 2: 9.0})
    candidates = [
        Samples("policy 0"),
        Samples("policy 1", (), Standing.WRONG, "wrong"),
        Samples("policy 2"),
    ]
    sort = lambda *a: ran.append(a[8])  # noqa: E731
    measure(kernel(sort), [inputs()], clock, candidates, RULE, ROUNDS, lambda: False)  # type: ignore[arg-type]
    assert {policy for policy, _ in clock.prepared} == {0, 2}
    assert set(ran) == {0, 2}


def test_what_is_hopeless_is_only_prepared_for_a_look_and_the_rest_for_calls_that_long() -> None:
    clock = CountingClock({0: 10.0, 1: 80.0, 2: 8.0})
    fresh = [Samples(f"policy {p}") for p in (0, 1, 2)]
    sort = kernel(lambda *a: ())  # type: ignore[arg-type, return-value]
    found = measure(sort, [inputs()], clock, fresh, RULE, 2, lambda: False)
    look = [(policy, math.inf) for policy in (0, 1, 2)]
    assert clock.prepared == [*look, (0, 8.0), (2, 8.0)]
    assert found[1].out is Standing.HOPELESS
    # More rounds later: what is known by then is not looked at again.
    measure(sort, [inputs()], clock, found, RULE, 3, lambda: False)
    assert clock.prepared == [*look, *[(0, 8.0), (2, 8.0)] * 2]


def test_a_policy_that_is_settled_is_not_prepared_for_more_rounds() -> None:
    clock = CountingClock({0: 10.0, 1: 9.0, 2: 10.0})
    settled, open_still = (9.0, 9.1, 8.9, 9.0) * 4, (14.0, 7.0) * 8
    before = [
        Samples("policy 0", (10.0,) * 16),
        Samples("policy 1", open_still),
        Samples("policy 2", (12.0,) * 16),
    ]
    assert decide(before, RULE).results[2].standing is Standing.SLOWER
    sort = kernel(lambda *a: ())  # type: ignore[arg-type, return-value]
    measure(sort, [inputs()], clock, before, RULE, 17, lambda: False)
    assert [policy for policy, _ in clock.prepared] == [0, 1]
    done = [
        Samples("policy 0", (10.0,) * 16),
        Samples("policy 1", settled),
        Samples("policy 2", (12.0,) * 16),
    ]
    measure(sort, [inputs()], clock, done, RULE, 17, lambda: False)
    assert len(clock.prepared) == 2


def test_a_second_pass_knows_how_long_a_call_takes_and_looks_at_nobody() -> None:
    clock = CountingClock({0: 10.0, 1: 80.0, 2: 8.0})
    fresh = [Samples("policy 0"), Samples("policy 1")]
    sort = kernel(lambda *a: ())
    found = measure(sort, [inputs()], clock, fresh, RULE, 9, lambda: False, call_us=10.0)
    assert clock.prepared == [(0, 10.0), (1, 10.0)]
    # Eight times slower is no reason to drop it unheard: it was faster once.
    assert decide(found, RULE).results[1].standing is Standing.SLOWER


def test_the_lots_of_a_second_pass_are_three_alike_and_then_double() -> None:
    ran: list[object] = []
    begun: list[int] = []

    class Lots(CountingClock):
        def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
            begun.append(len(ran) // (2 * SWEEPS))
            return super().prepare(train, call_us)

    sort = kernel(lambda *a: ran.append(a[8]))  # type: ignore[arg-type, func-returns-value]
    fresh = [Samples("policy 0"), Samples("policy 1")]
    never = Rule(min_rounds=1000)
    clock = Lots({0: 10.0, 1: 8.0})
    found = measure_again(sort, [inputs()], clock, fresh, never, 70, lambda: False, 10.0)
    assert begun[::2] == [0, LOT, 2 * LOT, 3 * LOT, 6 * LOT, 12 * LOT]
    assert [len(one.round_us) for one in found] == [70, 70]
