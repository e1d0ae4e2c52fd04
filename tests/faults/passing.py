"""Warm-ups in which something fails once, at a random moment, and passes: out of memory, an error,
a wrong output. What came of it serves at most that process; the next start measures.
"""

import itertools
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adaptive_moe.disk.folder import read_file, stored_files
from adaptive_moe.engines.hook import AiterHook
from adaptive_moe.engines.warm_up import WarmUp, warm_up
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
    """A kernel whose call number `at` goes wrong, whichever candidate it is; None for none."""

    at: int | None = None
    kind: Callable[[Outputs], Outputs] = error
    calls: int = 0
    measured: int = 0
    hit: list[str] = field(default_factory=list)

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
            outputs, number = call(), self.calls
            self.calls += 1
            if number == self.at:
                self.hit.append(candidate.name)
                return self.kind(outputs)
            return outputs

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
        return warm_up(hook, MAX_TOKENS, measure=flaky.measure)
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
        first, second = Flaky(chance.randrange(clean.calls), kind), Flaky()
        with tempfile.TemporaryDirectory() as name, listening():
            cache = Path(name)
            found = start(cache, first)
            what = kind.__name__
            noticed = bool(found.problems) or not all(t.sound for t in found.tables.values())
            if not first.hit:
                failures[f"{what}: was not injected"] += 1
            if noticed and stored_files(cache):
                failures[f"{what}: stored"] += 1
            again = start(cache, second)
            if noticed != bool(second.measured):
                failures[f"{what}: the next start measured {second.measured} times"] += 1
            whole = len(again.tables) == 1 and all(t.sound for t in again.tables.values())
            if not whole or again.problems:
                failures[f"{what}: the next start: {again.problems}"[:300]] += 1
            if not _all_sound(stored_files(cache)):
                failures[f"{what}: what the next start stored"] += 1
            end = "noticed" if noticed else "not seen, in a call whose output nobody reads"
            outcomes[f"{what}: {end}, {'a table' if found.tables else 'the baseline'} served"] += 1
    return {
        "warm_ups": warm_ups,
        "calls_each": clean.calls,
        "outcomes": dict(outcomes),
        "failures": dict(failures),
    }


def _all_sound(paths: Sequence[Path]) -> bool:
    return len(paths) == 1 and all(read_file(path).table.sound for path in paths)
