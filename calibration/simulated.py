"""Simulated devices with known truth, for decision.py: what real clocks do to an interval.

A device is one time line. A call of a candidate advances it by the candidate's true time, under the
device's noise, and returns what the CPU sort returns. The clock around the calls is the package's
own WallClock, so that the neutral predecessor of a sample is simulated as well. All seeded.
"""

import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from adaptive_moe.kernels import Candidate, SortKernel
from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.kernels.cpu_sort import moe_sorting
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.shape import SortingShape
from calibration.timing import Plan, WallClock, calibrate

SHAPE = SortingShape(8, 2, 8, "float32", 16)
# Simulated seconds: far more than any calibration here takes.
PLAN = Plan(budget_s=1000.0)
# About what a round of three candidates takes at 10 us a call.
ROUND_S = 240e-6

Times = Mapping[str, float]


class Device:
    """Quiet: every call takes its true time, give or take 1%.

    true_us: each candidate's time by token count, the baseline's first. The classes below add one
    trouble each.
    """

    def __init__(self, true_us: Callable[[int], Times], rng: random.Random) -> None:
        self.true_us, self.rng = true_us, rng
        self.seconds = 0.0
        self.last: str | None = None
        self._answers: dict[tuple[int, int], Any] = {}
        self.begin()

    def begin(self) -> None:
        """What a device starts with."""

    def calibrate(self, max_tokens: int) -> PolicyTable:
        """A whole calibration of 1..max_tokens on this device."""
        names = list(self.true_us(1))
        candidates = tuple(Candidate(name, partial(self.bind, name)) for name in names)
        kernel = SortKernel("simulated", torch.device("cpu"), candidates)
        coverage = Coverage.up_to(SHAPE, max_tokens, baseline=names[0])
        clock = WallClock(lambda: self.seconds, self.neutral)
        return calibrate(
            kernel, coverage, PLAN, clock_factory=lambda *_: clock, now=lambda: self.seconds
        )

    def bind(self, name: str, inputs: SortingInputs) -> Callable[[], Any]:
        num_tokens = inputs.topk_ids.shape[0]
        key = (inputs.topk_ids.data_ptr(), num_tokens)
        if key not in self._answers:
            self._answers[key] = moe_sorting(*inputs.arguments(1))  # type: ignore[arg-type]
        us = self.true_us(num_tokens)[name] * self.bound(name)
        return partial(self.call, name, us, self._answers[key])

    def neutral(self) -> None:
        """The predecessor of a sample."""
        self.last = None

    def call(self, name: str, us: float, answer: Any = ()) -> Any:
        self.seconds += 1e-6 * us * self.factor(name)
        self.last = name
        return answer

    def factor(self, name: str) -> float:
        return math.exp(self.rng.gauss(0.0, 0.01))

    def bound(self, name: str) -> float:
        """The factor of a call that is prepared now: 1.0 but for captured graphs."""
        return 1.0


class Steady(Device):
    """Independent noise of 5%, a factor of 5% that all share for ten rounds' time, a drift of 15%
    to and fro in a tenth of a second, and 1% of the calls times five."""

    def begin(self) -> None:
        self.shared, self.until = 1.0, 0.0

    def factor(self, name: str) -> float:
        rng = self.rng
        if self.seconds > self.until:
            self.shared = math.exp(rng.gauss(0.0, 0.05))
            self.until = self.seconds + 10 * ROUND_S
        drift = 1.0 + 0.075 * math.sin(20.0 * math.pi * self.seconds)
        outlier = 5.0 if rng.random() < 0.01 else 1.0
        return drift * self.shared * math.exp(rng.gauss(0.0, 0.05)) * outlier


class Bimodal(Steady):
    """Steady, and the whole device switches between two speeds 10% apart, every 50 calls."""

    def begin(self) -> None:
        super().begin()
        self.slow = self.rng.random() < 0.5

    def factor(self, name: str) -> float:
        self.slow ^= self.rng.random() < 1 / 50
        return super().factor(name) * (1.1 if self.slow else 1.0)


class Ticks(Device):
    """Noise of 2%, read off a clock that ticks every half microsecond."""

    def call(self, name: str, us: float, answer: Any = ()) -> Any:
        us *= math.exp(self.rng.gauss(0.0, 0.02))
        self.seconds = round(self.seconds * 2e6 + 2 * us) / 2e6
        return answer


class HeavyTails(Device):
    """Student's t with two degrees of freedom, scaled to 2%: now and then any slowness at all."""

    def factor(self, name: str) -> float:
        chi = math.sqrt(self.rng.gammavariate(1.0, 2.0) / 2.0)
        return math.exp(min(max(0.02 * self.rng.gauss(0.0, 1.0) / chi, -3.0), 3.0))


class Correlated(Device):
    """AR(1) noise of sd 2% of each candidate for itself, with that rho from round to round."""

    rho = 0.7

    def begin(self) -> None:
        self.state: dict[str, tuple[float, float]] = {}

    def factor(self, name: str) -> float:
        was, at = self.state.get(name, (0.0, -math.inf))
        stays = self.rho ** ((self.seconds - at) / ROUND_S)
        now = stays * was + self.rng.gauss(0.0, 0.02 * math.sqrt(1.0 - stays * stays))
        self.state[name] = (now, self.seconds)
        return super().factor(name) * math.exp(now)


class VeryCorrelated(Correlated):
    """The same with rho 0.9."""

    rho = 0.9


class TwoSpeeds(Device):
    """Each candidate changes between two speeds 10% apart, after 10 rounds' time on average."""

    dwell = 10

    def begin(self) -> None:
        self.slow: dict[str, bool] = {}
        self.change: dict[str, float] = {}

    def factor(self, name: str) -> float:
        if name not in self.slow:
            self.slow[name], self.change[name] = self.rng.random() < 0.5, self._next()
        while self.seconds > self.change[name]:
            self.slow[name] = not self.slow[name]
            self.change[name] += self._next()
        return super().factor(name) * (1.1 if self.slow[name] else 1.0)

    def _next(self) -> float:
        return self.rng.expovariate(1.0) * self.dwell * ROUND_S


class TwoSlowSpeeds(TwoSpeeds):
    """The same, after 50 rounds' time."""

    dwell = 50


class CaptureBias(Device):
    """Whatever is prepared together is faster or slower than it should be, with an sd of 1%."""

    def begin(self) -> None:
        self.bias: dict[str, float] = {}
        self.used: set[str] = set()

    def bound(self, name: str) -> float:
        if name in self.used or name not in self.bias:
            self.bias[name] = math.exp(self.rng.gauss(0.0, 0.01))
            self.used.discard(name)
        return self.bias[name]

    def call(self, name: str, us: float, answer: Any = ()) -> Any:
        self.used.add(name)
        return super().call(name, us, answer)


class PaysAfter(Device):
    """A call of another candidate right after policy 2 takes twice as long."""

    def factor(self, name: str) -> float:
        pays = self.last == "policy 2" != name
        return super().factor(name) * (2.0 if pays else 1.0)


class Stalls(Device):
    """Steady noise of 2%, and that share of the samples takes five times as long."""

    share = 0.04

    def begin(self) -> None:
        self.stalled = False

    def neutral(self) -> None:
        super().neutral()
        self.stalled = self.rng.random() < self.share

    def factor(self, name: str) -> float:
        return math.exp(self.rng.gauss(0.0, 0.02)) * (5.0 if self.stalled else 1.0)


class ManyStalls(Stalls):
    """The same with twice that share."""

    share = 0.08


DEVICES: dict[str, type[Device]] = {
    "steady": Steady,
    "bimodal": Bimodal,
    "ticks": Ticks,
    "heavy_tails": HeavyTails,
    "ar1_07": Correlated,
    "ar1_09": VeryCorrelated,
    "two_speeds_dwell_10": TwoSpeeds,
    "two_speeds_dwell_50": TwoSlowSpeeds,
    "capture_bias": CaptureBias,
    "pays_after_policy_2": PaysAfter,
    "stalls_4pct": Stalls,
    "stalls_8pct": ManyStalls,
}
