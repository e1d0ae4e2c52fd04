"""Simulated devices with known truth, for bench_decision.py: what real clocks do to an interval.

A device has one time line. A call of a candidate advances it by the candidate's true time, under
the device's noise; the clock around it is the package's own WallClock, so that what a sample does
before it starts (the neutral predecessor) is in the simulation as well. All seeded.
"""

import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from adaptive_moe.kernels import Candidate
from adaptive_moe.tuning.clocks import Pending, Sampler, Train, WallClock

SIGMA = 0.05
OUTLIER_RATE, OUTLIER_FACTOR = 0.01, 5.0
# The drift happens within one bucket of this many samples: harsher than over a whole calibration.
DRIFT, DRIFT_SAMPLES = 0.15, 300
QUIET = 0.01


class Device:
    """Quiet: every call takes its true time, give or take QUIET.

    true_us: each candidate's time. The classes below add one trouble each.
    """

    def __init__(self, true_us: Mapping[str, float], rng: random.Random) -> None:
        self.true_us, self.rng = true_us, rng
        self.seconds = 0.0
        self.samples = 0
        self.last: str | None = None
        self.elsewhere()

    def candidates(self) -> list[Candidate]:
        """The first is the baseline; all run on this device."""
        return [
            Candidate(name, lambda _inputs, name=name: partial(self.call, name))
            for name in self.true_us
        ]

    def neutral(self) -> None:
        self.last = None

    def call(self, name: str) -> tuple[()]:
        self.seconds += 1e-6 * self.true_us[name] * self.factor(name)
        self.samples += 1
        self.last = name
        return ()

    def factor(self, name: str) -> float:
        return math.exp(self.rng.gauss(0.0, QUIET))

    def prepared(self) -> float:
        """The factor of all calls that are prepared together: 1.0 but for captured graphs."""
        return 1.0

    def next_round(self) -> bool:
        """Asked before each round whether the time is up: it never is."""
        return False

    def elsewhere(self) -> None:
        """Other buckets are measured meanwhile, for as long as that takes."""


class SimulatedClock(WallClock):
    def __init__(self, device: Device, neutral: bool = True) -> None:
        before: Callable[[], object] = device.neutral if neutral else lambda: None
        super().__init__(lambda: device.seconds, before)
        self.device = device

    def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
        enqueue, bias = super().prepare(train, call_us), self.device.prepared()

        def sample() -> Pending:
            wait = enqueue()
            return lambda: wait() * bias

        return sample


class Steady(Device):
    """Independent noise of 5%, a factor of 5% a round, 15% of drift, 1% of samples times five."""

    def elsewhere(self) -> None:
        self.round_factor, self.begun = 1.0, self.samples

    def next_round(self) -> bool:
        self.round_factor = math.exp(self.rng.gauss(0.0, SIGMA))
        return False

    def factor(self, name: str) -> float:
        drift = 1.0 + DRIFT * min((self.samples - self.begun) / DRIFT_SAMPLES, 1.0)
        outlier = OUTLIER_FACTOR if self.rng.random() < OUTLIER_RATE else 1.0
        return drift * self.round_factor * math.exp(self.rng.gauss(0.0, SIGMA)) * outlier


class Bimodal(Steady):
    """Steady, and the whole device switches between two speeds 10% apart, every 50 samples."""

    def elsewhere(self) -> None:
        super().elsewhere()
        self.slow = self.rng.random() < 0.5

    def factor(self, name: str) -> float:
        self.slow ^= self.rng.random() < 1 / 50
        return super().factor(name) * (1.1 if self.slow else 1.0)


class Ticks(Device):
    """Noise of 2%, read off a clock that ticks every half microsecond."""

    def call(self, name: str) -> tuple[()]:
        us = self.true_us[name] * math.exp(self.rng.gauss(0.0, 0.02))
        self.seconds = round(self.seconds * 2e6 + 2 * us) / 2e6
        self.samples += 1
        return ()


class HeavyTails(Device):
    """Student's t with two degrees of freedom, scaled to 2%: now and then any slowness at all."""

    def factor(self, name: str) -> float:
        rng = self.rng
        chi = math.sqrt(rng.gammavariate(1.0, 2.0) / 2.0)
        return math.exp(min(max(0.02 * rng.gauss(0.0, 1.0) / chi, -3.0), 3.0))


class Correlated(Device):
    """AR(1) noise of sd 2% in each candidate's own rounds, with that rho from round to round."""

    rho = 0.7

    def elsewhere(self) -> None:
        self.state = {name: self.rng.gauss(0.0, 0.02) for name in self.true_us}

    def next_round(self) -> bool:
        fresh = 0.02 * math.sqrt(1.0 - self.rho**2)
        for name, was in self.state.items():
            self.state[name] = self.rho * was + self.rng.gauss(0.0, fresh)
        return False

    def factor(self, name: str) -> float:
        return super().factor(name) * math.exp(self.state[name])


class VeryCorrelated(Correlated):
    """The same with rho 0.9."""

    rho = 0.9


class TwoSpeeds(Device):
    """Each candidate changes between two speeds 10% apart, after 10 samples of its own on
    average."""

    dwell = 10

    def elsewhere(self) -> None:
        self.slow = {name: self.rng.random() < 0.5 for name in self.true_us}

    def factor(self, name: str) -> float:
        self.slow[name] ^= self.rng.random() < 1 / self.dwell
        return super().factor(name) * (1.1 if self.slow[name] else 1.0)


class TwoSlowSpeeds(TwoSpeeds):
    """The same, after 50 samples."""

    dwell = 50


class CaptureBias(Device):
    """Each captured graph is faster or slower than it should be, with an sd of 1%."""

    def prepared(self) -> float:
        return math.exp(self.rng.gauss(0.0, 0.01))


class PaysAfter(Device):
    """Whoever runs right after policy 2 takes 10% longer."""

    def factor(self, name: str) -> float:
        return super().factor(name) * (1.1 if self.last == "policy 2" else 1.0)


class WinsAfter(Device):
    """Policy 1 takes 10% less right after policy 0."""

    def factor(self, name: str) -> float:
        wins = (name, self.last) == ("policy 1", "policy 0")
        return super().factor(name) * (0.9 if wins else 1.0)


DEVICES: dict[str, Any] = {
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
    "wins_after_policy_0": WinsAfter,
}
