"""Warm-ups in which something fails once, at a random moment, and passes: out of memory, an error,
a wrong output. What came of it serves at most that process; the next start measures.
"""

import itertools
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adaptive_moe.disk.folder import read_file, stored_files
from adaptive_moe.engines.wanted import Batches
from adaptive_moe.engines.warm_up import WarmUp, warm_up_hook
from adaptive_moe.hook.hook import AiterHook
from adaptive_moe.kernels import Candidate, SortKernel
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.settings import Mode, Settings
from adaptive_moe.tuning.calibrator import calibrate
from tests.aiter_standin.load import VERSIONS, forget_aiter, load_aiter

from .corrupt import listening

MAX_TOKENS = 8
Outputs = tuple[torch.Tensor, ...]


def out_of_memory(outputs: Outputs) -> Outputs:
    raise torch.OutOfMemoryError("no memory left (injected)")


def error(outputs: Outputs) -> Outputs:
    raise RuntimeError("device-side assert (injected)")


def wrong_output(outputs: Outputs) -> Outputs:
    """Another expert's block first, in everything integral that has several entries."""
    return tuple(
        o.roll(1) + 1 if not o.is_floating_point() and o.numel() > 2 else o for o in outputs
    )


KINDS: tuple[Callable[[Outputs], Outputs], ...] = (out_of_memory, error, wrong_output)


@dataclass
class Flaky:
    """A kernel of which one call goes wrong: number `at`, whichever candidate it is, or of those
    whose output is looked at, where it is the output that is wrong; None for none."""

    at: int | None = None
    kind: Callable[[Outputs], Outputs] = error
    calls: int = 0
    checked: int = 0
    measured: int = 0
    hit: bool = False

    def measure(self, kernel: SortKernel, *args: Any, **kwargs: Any) -> PolicyTable:
        """As warm_up's `measure`. Each look at the clock takes a second of the budget, so that the
        same calls are made however busy the machine is."""
        self.measured += 1
        looks = itertools.count()
        flaky = tuple(Candidate(c.name, partial(self._bind, c)) for c in kernel.candidates)
        return calibrate(
            replace(kernel, candidates=flaky), *args, **kwargs, now=lambda: float(next(looks))
        )

    def _bind(self, candidate: Candidate, inputs: Any) -> Callable[[], Outputs]:
        call = candidate.bind(inputs)

        def sort() -> Outputs:
            outputs, is_checked = call(), _is_checked()
            number = self.checked if self.kind is wrong_output else self.calls
            self.calls += 1
            self.checked += is_checked
            if number != self.at or (self.kind is wrong_output and not is_checked):
                return outputs
            self.hit = True
            return self.kind(outputs)

        return sort


def start(cache: Path, flaky: Flaky) -> WarmUp:
    """One start of an engine: its first forward, then the warm-up."""
    forget_aiter()
    aiter = load_aiter(VERSIONS[-1])
    settings = Settings(
        mode=Mode.AUTO, cache_dir=str(cache), budget_s=60.0, buckets=(1, MAX_TOKENS)
    )
    hook = AiterHook(settings)
    hook.install(aiter)
    ids = torch.arange(2, dtype=torch.int32).repeat(MAX_TOKENS, 1)
    aiter.moe_sorting(ids, torch.ones((MAX_TOKENS, 2)), 4, 16, torch.bfloat16)
    try:
        return warm_up_hook(hook, Batches(MAX_TOKENS), measure=flaky.measure)
    finally:
        hook.uninstall()
        forget_aiter()


def run(warm_ups: int, seed: int = 0) -> dict[str, Any]:
    """So many first starts with one failure each, and the start after each of them."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        clean = Flaky()
        start(Path(name), clean)
        assert clean.measured == len(stored_files(Path(name))) == 1
    outcomes: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    for number in range(warm_ups):
        kind = KINDS[number % len(KINDS)]
        calls = clean.checked if kind is wrong_output else clean.calls
        what, flaky = kind.__name__, Flaky()
        # How many calls there are depends on the noise of the day: some moments never come.
        while not flaky.hit:
            flaky = Flaky(chance.randrange(calls), kind)
            with tempfile.TemporaryDirectory() as name, listening():
                cache = Path(name)
                found = start(cache, flaky)
                if flaky.hit:
                    failures.update(f"{what}: {why}" for why in _wrong(found, cache))
        served = "a table" if found.tables else "the baseline"
        outcomes[f"{what}: {served} served"] += 1
    return {
        "warm_ups": warm_ups,
        "calls_each": clean.calls,
        "of_these_checked": clean.checked,
        "outcomes": dict(outcomes),
        "failures": dict(failures),
    }


def _wrong(found: WarmUp, cache: Path) -> Iterator[str]:
    """What is not as it should be after a start in which something failed, and after the next."""
    if not found.problems and all(table.sound for table in found.tables.values()):
        yield "not noticed"
    if stored_files(cache):
        yield "stored"
    second = Flaky()
    again = start(cache, second)
    if not second.measured:
        yield "the next start did not measure"
    if again.problems or len(again.tables) != 1 or not all(t.sound for t in again.tables.values()):
        yield f"the next start: {again.problems}"[:300]
    paths = stored_files(cache)
    if len(paths) != 1 or not read_file(paths[0]).table.sound:
        yield "the next start stored no sound table"


def _is_checked() -> bool:
    """Is this call made to look at its output (tuning/rightness.py)?"""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__", "").endswith(".rightness"):
            return True
    return False
