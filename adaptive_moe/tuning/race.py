"""One bucket: check each policy's output, look once, then interleaved rounds until settled.

A round visits every live policy SWEEPS times, in an order that changes within a round and from
round to round, so that every policy runs in every place and after every other one equally often:
what ran before matters to the next call.
"""

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from adaptive_moe.kernels import SortKernel
from adaptive_moe.kernels.contract import SortingInputs, check_contract, poisoned_memory
from adaptive_moe.policy.decision import SWEEPS, Candidate, Rule, Standing, decide
from adaptive_moe.tuning.clocks import Clock, Sampler

logger = logging.getLogger("adaptive_moe")

# A first look this many times slower than the best is looked at once more, with the best beside it,
# so that no single stall of the machine drops a good policy.
HOPELESS = 3.0


@dataclass(frozen=True)
class Exclusion:
    """Why a policy is no candidate for this shape at all."""

    standing: Standing  # WRONG or FAILED
    reason: str


def check_policies(
    kernel: SortKernel, inputs: SortingInputs, accumulate: bool
) -> dict[int, Exclusion]:
    """Run each policy once on poisoned memory and check the contract; what fails is excluded.

    This is also each policy's first call, in which kernels may compile: never timed.
    """
    found: dict[int, Exclusion] = {}
    right: Sequence[Tensor] | None = None
    for policy in kernel.policies:
        try:
            problems, outputs = _check_policy(kernel, inputs, policy, accumulate, right)
        # A policy may fail in any way its kernel likes; that must only cost it the candidacy.
        except Exception as error:
            found[policy] = Exclusion(Standing.FAILED, f"raised {_short(error)}")
            continue
        if problems:
            found[policy] = Exclusion(Standing.WRONG, "; ".join(problems))
        elif right is None:
            right = outputs
    return found


def _check_policy(
    kernel: SortKernel,
    inputs: SortingInputs,
    policy: int,
    accumulate: bool,
    right: Sequence[Tensor] | None,
) -> tuple[list[str], Sequence[Tensor]]:
    """Its problems, and its outputs but for moe_buf, which is as large as the batch's activations:
    it is freed before the next policy runs."""
    with poisoned_memory():
        outputs = kernel.moe_sorting(*inputs.arguments(policy))
    problems = check_contract(inputs, outputs, accumulate=accumulate, right=right)
    return problems, outputs[:4]


def apply_exclusions(
    candidates: Sequence[Candidate], excluded: Mapping[int, Exclusion]
) -> list[Candidate]:
    """The candidates with those excluded marked so, whatever they measured."""
    return [
        replace(c, out=excluded[c.policy].standing, reason=excluded[c.policy].reason)
        if c.policy in excluded
        else c
        for c in candidates
    ]


def measure(
    kernel: SortKernel,
    train: Sequence[SortingInputs],
    clock: Clock,
    candidates: Sequence[Candidate],
    rule: Rule,
    rounds: int,
    spent: Callable[[], bool],
) -> list[Candidate]:
    """Samples of one bucket: `train` holds the inputs that each sample runs through.

    Candidates without rounds are looked at first. Only what is still in then is prepared for
    samples as long as the clock likes them, and raced (see `race`).
    """
    found = list(candidates)
    if found and not found[0].round_us:
        everybody = [candidate.policy for candidate in found if candidate.out is None]
        samplers = _prepare(kernel, train, clock, found, everybody, call_us=math.inf)
        found, call_us = first_look(found, samplers)
    else:
        call_us = min((min(c.round_us) for c in found if c.round_us), default=0.0)
    # Who is settled already takes no part, and is not captured into a graph for it.
    live = _live({candidate.policy: candidate for candidate in found}, rule)
    if len(live) < 2:
        return found
    return race(found, _prepare(kernel, train, clock, found, live, call_us), rule, rounds, spent)


def _prepare(
    kernel: SortKernel,
    train: Sequence[SortingInputs],
    clock: Clock,
    candidates: list[Candidate],
    live: Sequence[int],
    call_us: float,
) -> dict[int, Sampler]:
    """A sampler for each live policy; one that cannot be prepared is out, in place."""
    samplers: dict[int, Sampler] = {}
    for place, candidate in enumerate(candidates):
        if candidate.policy not in live:
            continue
        calls = [partial(kernel.moe_sorting, *i.arguments(candidate.policy)) for i in train]
        try:
            samplers[candidate.policy] = clock.prepare(calls, call_us)
        except Exception as error:
            candidates[place] = _failed(candidate, error)
    return samplers


def race(
    candidates: Sequence[Candidate],
    samplers: Mapping[int, Sampler],
    rule: Rule,
    rounds: int,
    spent: Callable[[], bool],
) -> list[Candidate]:
    """Sample the policies that are still in, until the verdict is settled, policy 0 has `rounds`
    rounds or the time is up. Candidates that have rounds already go on from there.

    `spent` is asked once before each round. Only whole rounds count.
    """
    table = {candidate.policy: candidate for candidate in candidates}
    for number in range(len(candidates[0].round_us), rounds):
        live = _live(table, rule)
        if len(live) < 2 or spent():
            break
        _one_round(table, samplers, _sweeps(number, live))
    return list(table.values())


def first_look(
    candidates: Sequence[Candidate], samplers: Mapping[int, Sampler]
) -> tuple[list[Candidate], float]:
    """The candidates, with those HOPELESS that are, and the fastest look in us."""
    table = {candidate.policy: candidate for candidate in candidates}
    looks = {policy: _sample(table, samplers, policy) for policy in samplers}
    logger.debug("first look us: %s", looks)
    seen = {policy: time for policy, time in looks.items() if time is not None}
    for policy, time in seen.items():
        best = min(seen, key=lambda p: seen[p])
        ratio = time / seen[best]
        if policy == 0 or ratio <= HOPELESS:
            continue
        again, beside = _sample(table, samplers, policy), _sample(table, samplers, best)
        ratio = min(ratio, again / beside) if again and beside else ratio
        if ratio > HOPELESS and table[policy].out is None:
            reason = f"{ratio:.1f} times the fastest at the first look"
            table[policy] = replace(table[policy], out=Standing.HOPELESS, reason=reason)
    return list(table.values()), min(seen.values(), default=0.0)


def _one_round(
    table: dict[int, Candidate], samplers: Mapping[int, Sampler], sweeps: Sequence[Sequence[int]]
) -> None:
    visits: dict[int, list[float]] = {policy: [] for policy in sweeps[0]}
    for sweep in sweeps:
        for policy in sweep:
            time = _sample(table, samplers, policy) if table[policy].out is None else None
            if time is not None:
                visits[policy].append(time)
    logger.debug("samples us: %s", visits)
    for policy, times in visits.items():
        if table[policy].out is None:
            middle = statistics.median(times)
            table[policy] = replace(table[policy], round_us=(*table[policy].round_us, middle))


def _sample(
    table: dict[int, Candidate], samplers: Mapping[int, Sampler], policy: int
) -> float | None:
    """One sample in us, or None where the policy raised and is out from here on."""
    try:
        return samplers[policy]()
    except Exception as error:
        table[policy] = _failed(table[policy], error)
        return None


def _live(table: Mapping[int, Candidate], rule: Rule) -> list[int]:
    """Policies still worth a round: policy 0 and the unsettled, or none once all is settled."""
    verdict = decide(list(table.values()), rule)
    if verdict.settled:
        return []
    return [0, *(r.policy for r in verdict.results if r.standing in _OPEN)]


# A FASTER policy is timed on while a rival is open, so that both see the same rounds.
_OPEN = (Standing.UNSETTLED, Standing.FASTER)


def _sweeps(number: int, live: Sequence[int]) -> list[list[int]]:
    """The order of visits in one round: SWEEPS sweeps, rotated, every other one backwards.

    Each policy opens a round equally often (the call after our own bookkeeping runs colder), and
    each full turn of the rotation is followed by its mirror image.
    """
    count = len(live)
    mirrored = (number // count) % 2
    sweeps = []
    for sweep in range(SWEEPS):
        start = (number + sweep // 2) % count
        order = [*live[start:], *live[:start]]
        sweeps.append(order[::-1] if sweep % 2 else order)
    if mirrored:
        flipped = dict(zip(live, reversed(live), strict=True))
        sweeps = [[flipped[policy] for policy in order] for order in sweeps]
    return sweeps


def _failed(candidate: Candidate, error: Exception) -> Candidate:
    return replace(candidate, out=Standing.FAILED, reason=f"raised {_short(error)}")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
