"""The clock of `calibrate --kernel cpu`: the processor's time of the one thread that sorts."""

import time
from collections.abc import Callable

import torch

from adaptive_moe.policy.coverage import Situation
from adaptive_moe.tuning.clocks import Clock, Neutral, Pending, Sample, Sampler, Train

# Times that a sample goes through its train.
PASSES = 3


class ThreadClock:
    """Other work on the machine lengthens a wall clock's time a hundredfold, this hardly. What it
    costs in caches, and on a shared core, still shows; so a sample is the shortest of its calls,
    which all do the same. `timer` returns seconds."""

    def __init__(
        self, neutral: Callable[[], object], timer: Callable[[], float] = time.thread_time
    ) -> None:
        self.neutral, self.timer = neutral, timer

    def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
        def sample() -> Pending:
            self.neutral()
            took = []
            for call in (*train,) * PASSES:
                begun = self.timer()
                call()
                took.append(self.timer() - begun)
            taken = Sample(min(took) * 1e6)
            return lambda: taken

        return sample


def thread_clock(situation: Situation, device: torch.device) -> Clock:
    """The clock of any situation: on a CPU there is one."""
    return ThreadClock(Neutral(device))
