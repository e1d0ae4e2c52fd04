"""A kernel that sorts for real, on clocks that the kernel itself moves: times are what a test says.

kernel = Simulated(lambda call: {0: 100.0, 1: 80.0, 2: 120.0}[call.policy])
table = kernel.calibrate(max_tokens=64)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from adaptive_moe.kernels import SortKernel, cpu_sort, policy_candidates
from adaptive_moe.policy.coverage import Coverage, Situation
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.calibrate import Plan, calibrate
from adaptive_moe.tuning.clocks import LONG_CALL_US, SHORT_TRAIN, Clock, Pending, Sample, Sampler

SHAPE = SortingShape(8, 2, 4, block_size=4)
CPU = torch.device("cpu")
Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Call:
    """One call of the sort. skewed: is its routing the skewed one? timed: by which clock."""

    policy: int
    rows: int
    real: int
    ids: torch.Tensor
    situation: Situation | None
    mask: torch.Tensor | None = None

    @property
    def skewed(self) -> bool:
        """Does the most popular expert have a fifth more than an even share?"""
        loads = torch.bincount(self.ids.flatten().clamp(min=0), minlength=8)
        return bool(loads.max() > 1.2 * self.ids.numel() / 8)

    @property
    def timed(self) -> bool:
        return self.situation is not None


@dataclass
class Simulated:
    """us: microseconds of a call on the device; host_us: of the host, for eager calls of a GPU.
    spoil may change the outputs, fail makes it raise error.

    The outputs of a timed call are not read (memory is not poisoned then), so it sorts nothing.
    """

    us: Callable[[Call], float]
    host_us: Callable[[Call], float] | None = None
    spoil: Callable[[Call, Outputs], Outputs] = lambda call, outputs: outputs
    fail: Callable[[Call], bool] = lambda call: False
    error: BaseException = field(default_factory=lambda: RuntimeError("no kernel for this size"))
    policies: tuple[int, ...] = (0, 1, 2)
    check_us: float = 0.0
    seconds: float = 0.0
    calls: list[Call] = field(default_factory=list)
    prepared: list[tuple[Situation, int]] = field(default_factory=list)
    situation: Situation | None = None

    def sort(self, *arguments: Any) -> Outputs:
        ids, policy, local = arguments[0], arguments[8], arguments[7]
        real = len(ids) if local is None else int(local)
        checking = torch.are_deterministic_algorithms_enabled()
        situation = None if checking else self.situation
        call = Call(policy, len(ids), real, ids, situation, arguments[6])
        self.calls.append(call)
        if self.fail(call):
            raise self.error
        self.seconds += 1e-6 * (self.check_us if checking else self.us(call))
        if not checking:
            return ()
        with CPU:
            return self.spoil(call, cpu_sort.moe_sorting(*arguments))

    def clock(self, situation: Situation, device: torch.device) -> Clock:
        return _Clock(self, situation)

    def timed(self, situation: Situation | None = None) -> list[Call]:
        """The calls that were timed, of one situation or all."""
        return [c for c in self.calls if c.timed and situation in (None, c.situation)]

    def calibrate(self, shape: SortingShape = SHAPE, **options: Any) -> PolicyTable:
        """options: of Plan, of Coverage.up_to, and of calibrate()."""
        known = ("expert_mask", "progress", "earlier")
        more = {k: options.pop(k) for k in known if k in options}
        cover = {
            k: options.pop(k)
            for k in ("captured", "baseline", "busy_from", "padding_rows")
            if k in options
        }
        return calibrate(
            SortKernel("made up", CPU, policy_candidates(self.sort, policies=self.policies)),
            Coverage.up_to(shape, options.pop("max_tokens", 64), **cover),
            Plan(**{"budget_s": 60.0, **options}),
            clock_factory=self.clock,
            now=lambda: self.seconds,
            **more,
        )


class _Clock:
    """Reads the kernel's own time, and the host's where there is one."""

    def __init__(self, kernel: Simulated, situation: Situation) -> None:
        self.kernel, self.situation = kernel, situation

    def prepare(self, train: Any, call_us: float = 0.0) -> Sampler:
        kernel = self.kernel
        calls = train[:SHORT_TRAIN] if call_us >= LONG_CALL_US else train
        kernel.prepared.append((self.situation, len(train)))

        def sample() -> Pending:
            kernel.situation = self.situation
            begun, first = kernel.seconds, len(kernel.calls)
            for call in calls:
                call()
            device_us = (kernel.seconds - begun) * 1e6 / len(calls)
            host_us = None
            if self.situation is Situation.EAGER and kernel.host_us is not None:
                made = kernel.calls[first:]
                host_us = sum(map(kernel.host_us, made)) / len(made)
            return lambda: Sample(device_us, host_us)

        return sample
