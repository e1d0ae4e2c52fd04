"""One bucket: look at each candidate once, then interleaved rounds until settled.

A round visits every live candidate SWEEPS times, in an order that changes within a round and from
round to round, so that each runs in every place and after every other one equally often: what the
neutral predecessor (clocks.py) does not take away is shared by all.
"""

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from adaptive_moe.kernels import Candidate
from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.policy.decision import SWEEPS, Rule, Samples, Standing, decide
from adaptive_moe.tuning.clocks import Clock, Pending, Sampler

logger = logging.getLogger("adaptive_moe")

# A first look this many times slower than the best is looked at once more, with the best beside it,
# so that no single stall of the machine drops a good candidate.
HOPELESS = 3.0
# A second pass comes in lots of so many rounds, each prepared anew and as far apart as the other
# buckets allow; there is no verdict before LOTS of them.
LOT, LOTS = 5, 3


def measure(
    candidates: Sequence[Candidate],
    train: Sequence[SortingInputs],
    clock: Clock,
    samples: Sequence[Samples],
    rule: Rule,
    rounds: int,
    spent: Callable[[], bool],
    call_us: float = 0.0,
) -> list[Samples]:
    """Samples of one pass over one bucket: `train` holds the inputs that each sample runs through.

    Candidates without rounds are looked at first, unless it is known by now that a call of theirs
    takes about call_us. Only what is still in then is prepared for samples as long as the clock
    likes them, and raced (see `race`).
    """
    binds = {candidate.name: candidate for candidate in candidates}
    found = list(samples)
    known = [min(s.round_us) for s in found if s.round_us]
    if known:
        call_us = min(known)
    elif call_us == 0.0:
        everybody = [s.candidate for s in found if s.out is None]
        if len(everybody) < 2:
            return found
        samplers = _prepare(binds, train, clock, found, everybody, call_us=math.inf)
        found, call_us = first_look(found, samplers)
    # Who is settled already takes no part, and is not captured into a graph for it.
    live = _live({s.candidate: s for s in found}, rule)
    if len(live) < 2:
        return found
    return race(found, _prepare(binds, train, clock, found, live, call_us), rule, rounds, spent)


def measure_again(
    candidates: Sequence[Candidate],
    train: Sequence[SortingInputs],
    clock: Clock,
    samples: Sequence[Samples],
    rule: Rule,
    rounds: int,
    spent: Callable[[], bool],
    call_us: float,
) -> list[Samples]:
    """Samples of the second pass over one bucket, of the baseline and whoever is to be confirmed,
    brought to `rounds` rounds.

    In lots, each prepared anew: what one captured graph has of its own then shows as noise between
    lots. The first LOTS are of LOT rounds, and each next one doubles what there is.
    """
    found, rule = list(samples), second(rule)
    while (done := len(found[0].round_us)) < rounds:
        upto = min(done + LOT if done < LOTS * LOT else 2 * done, rounds)
        found = measure(candidates, train, clock, found, rule, upto, spent, call_us)
        if len(found[0].round_us) < upto:
            break
    return found


def second(rule: Rule) -> Rule:
    """The rule of a second pass: no verdict before LOTS lots."""
    return replace(rule, min_rounds=max(rule.min_rounds, LOTS * LOT))


def _prepare(
    binds: Mapping[str, Candidate],
    train: Sequence[SortingInputs],
    clock: Clock,
    samples: list[Samples],
    live: Sequence[str],
    call_us: float,
) -> dict[str, Sampler]:
    """A sampler for each live candidate; one that cannot be prepared is out, in place."""
    samplers: dict[str, Sampler] = {}
    for place, one in enumerate(samples):
        if one.candidate not in live:
            continue
        calls = [binds[one.candidate].bind(inputs) for inputs in train]
        try:
            samplers[one.candidate] = clock.prepare(calls, call_us)
        except Exception as error:
            samples[place] = _failed(one, error)
    return samplers


def race(
    samples: Sequence[Samples],
    samplers: Mapping[str, Sampler],
    rule: Rule,
    rounds: int,
    spent: Callable[[], bool],
) -> list[Samples]:
    """Sample the candidates that are still in, until the verdict is settled, the baseline has
    `rounds` rounds or the time is up. Those that have rounds already go on from there.

    `spent` is asked once before each round. Only whole rounds count.
    """
    table = {one.candidate: one for one in samples}
    live, looked = _live(table, rule), len(samples[0].round_us)
    for number in range(looked, rounds):
        # Judging costs as much as a sample: many rounds are looked at after each eighth more.
        if number - looked >= max(1, looked // 8) or any(table[n].out for n in live):
            live, looked = _live(table, rule), number
        if len(live) < 2 or spent():
            break
        _one_round(table, samplers, _sweeps(number, live))
    return list(table.values())


def first_look(
    samples: Sequence[Samples], samplers: Mapping[str, Sampler]
) -> tuple[list[Samples], float]:
    """The samples, with those HOPELESS that are, and the fastest look in us."""
    table = {one.candidate: one for one in samples}
    looks = {name: _sample(table, samplers, name) for name in samplers}
    logger.debug("first look us: %s", looks)
    seen = {name: time for name, time in looks.items() if time is not None}
    baseline = samples[0].candidate
    for name, time in seen.items():
        best = min(seen, key=lambda n: seen[n])
        ratio = time / seen[best]
        if name == baseline or ratio <= HOPELESS:
            continue
        again, beside = _sample(table, samplers, name), _sample(table, samplers, best)
        ratio = min(ratio, again / beside) if again and beside else ratio
        if ratio > HOPELESS and table[name].out is None:
            reason = f"{ratio:.1f} times the fastest at the first look"
            table[name] = replace(table[name], out=Standing.HOPELESS, reason=reason)
    return list(table.values()), min(seen.values(), default=0.0)


def _one_round(
    table: dict[str, Samples], samplers: Mapping[str, Sampler], sweeps: Sequence[Sequence[str]]
) -> None:
    """All visits are enqueued before the first is waited for: a device waits for nobody then."""
    pending = [(name, _enqueue(table, samplers, name)) for sweep in sweeps for name in sweep]
    visits: dict[str, list[float]] = {name: [] for name in sweeps[0]}
    for name, wait in pending:
        if wait is not None and (time := _wait(table, name, wait)) is not None:
            visits[name].append(time)
    logger.debug("samples us: %s", visits)
    for name, times in visits.items():
        if table[name].out is None:
            middle = statistics.median(times)
            table[name] = replace(table[name], round_us=(*table[name].round_us, middle))


def _sample(table: dict[str, Samples], samplers: Mapping[str, Sampler], name: str) -> float | None:
    """One sample in us, or None where the candidate raised and is out from here on."""
    wait = _enqueue(table, samplers, name)
    return None if wait is None else _wait(table, name, wait)


def _enqueue(
    table: dict[str, Samples], samplers: Mapping[str, Sampler], name: str
) -> Pending | None:
    if table[name].out is not None:
        return None
    try:
        return samplers[name]()
    except Exception as error:
        table[name] = _failed(table[name], error)
        return None


def _wait(table: dict[str, Samples], name: str, wait: Pending) -> float | None:
    try:
        return wait()
    except Exception as error:
        table[name] = _failed(table[name], error)
        return None


def _live(table: Mapping[str, Samples], rule: Rule) -> list[str]:
    """Candidates still worth a round: the baseline and the unsettled, or none once all is
    settled."""
    verdict = decide(list(table.values()), rule)
    if verdict.settled:
        return []
    baseline, *others = verdict.results
    return [baseline.candidate, *(r.candidate for r in others if r.standing in _OPEN)]


# A FASTER candidate is timed on while a rival is open, so that both see the same rounds.
_OPEN = (Standing.UNSETTLED, Standing.FASTER)


def _sweeps(number: int, live: Sequence[str]) -> list[list[str]]:
    """The order of visits in one round: SWEEPS sweeps, there and back.

    Each candidate opens a round equally often (the call after our own bookkeeping runs colder), and
    each full turn of the rotation is followed by its mirror image.
    """
    turn, start = divmod(number, len(live))
    ring = live[::-1] if turn % 2 else live
    order = [*ring[start:], *ring[:start]]
    return [order[::-1] if sweep % 2 else order for sweep in range(SWEEPS)]


def _failed(samples: Samples, error: Exception) -> Samples:
    return replace(samples, out=Standing.FAILED, reason=f"raised {short(error)}")


def short(error: BaseException) -> str:
    """The error in one line of a log."""
    return f"{type(error).__name__}: {error}"[:200]
