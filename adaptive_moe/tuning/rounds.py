"""One bucket: check each candidate, look at it once, then interleaved rounds until it is judged.

A round visits every live candidate twice, in an order that changes within a round and from round to
round, so that each runs in every place and after every other one equally often. A candidate whose
two visits disagree is visited twice more: a stalled visit then does not decide the round.
"""

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from adaptive_moe.kernels import Candidate
from adaptive_moe.kernels.aiter import run_without_exit
from adaptive_moe.kernels.contract import (
    Comparison,
    SortingInputs,
    compare,
    differences,
    expected,
    poisoned_memory,
)
from adaptive_moe.policy.evidence import Exclusion, Fill, Ratios, Result, Rule
from adaptive_moe.policy.interval import median, summarize
from adaptive_moe.policy.verdict import LOT, LOTS, Standing, Verdict, judge_fill, rounds_to_confirm
from adaptive_moe.tuning.clocks import Clock, Pending, Sample, Sampler

logger = logging.getLogger("adaptive_moe")

# A first look this many times slower than the best is taken once more, with the best beside it,
# so that no single stall of the machine drops a good candidate.
FAR_SLOWER = 3.0
# Two visits that differ by more than this ratio are followed by two more.
DISAGREE = 1.1
# Shorter readings are raised to this: a coarse clock may read 0.0.
LEAST_US = 1e-3


class CalibrationFailedError(RuntimeError):
    """The baseline itself could not be measured (out of memory, a device error): the text says why.
    There is no table; the next start tries again."""


@dataclass
class Exclusions:
    """Candidates that may not serve, everywhere: what one bucket shows holds for all.

    by_name: why, for each of them. where: what the log calls the calls that are measured.
    """

    baseline: str
    where: str
    by_name: dict[str, Exclusion] = field(default_factory=dict)

    def add(self, exclusion: Exclusion, num_tokens: int) -> None:
        """Raises CalibrationFailedError where it is the baseline."""
        name, at = exclusion.candidate, f"at {num_tokens} tokens"
        if name == self.baseline:
            raise CalibrationFailedError(f"{at} {name} {exclusion.reason}")
        if name not in self.by_name:
            self.by_name[name] = exclusion
            logger.warning(
                "%s is not used for %s: %s it %s", name, self.where, at, exclusion.reason
            )


@dataclass
class Times:
    """The rounds of one candidate in one pass, and its ratios to the baseline's in the same
    rounds."""

    device_us: list[float] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)  # log ratios
    host: list[float] = field(default_factory=list)

    def add(self, sample: Sample, baseline: Sample) -> None:
        self.device_us.append(sample.device_us)
        self.device.append(math.log(sample.device_us / baseline.device_us))
        if sample.host_us is not None and baseline.host_us is not None:
            self.host_us.append(sample.host_us)
            self.host.append(math.log(sample.host_us / baseline.host_us))


@dataclass
class FillRounds:
    """What was measured of one bucket at one fill: both passes, by candidate, the baseline
    first."""

    fraction: float
    inputs: Sequence[SortingInputs]
    first: dict[str, Times]
    second: dict[str, Times] = field(default_factory=dict)
    dropped: dict[str, float] = field(default_factory=dict)
    first_look_done: bool = False
    call_us: float = 0.0

    @property
    def rounds(self) -> int:
        """Rounds of the first pass."""
        return len(next(iter(self.first.values())).device)

    def results(self) -> Fill:
        """The evidence so far."""
        return Fill(self.fraction, tuple(self._result(name) for name in self.first))

    def _result(self, name: str) -> Result:
        first, second = self.first[name], self.second.get(name, Times())
        return Result(
            name,
            median(first.device_us or second.device_us),
            _ratios(first.device),
            _ratios(second.device),
            _ratios([*first.host, *second.host]),
            median([*first.host_us, *second.host_us]),
            self.dropped.get(name),
        )


@dataclass(frozen=True)
class Bench:
    """What every bucket of one situation is measured with."""

    candidates: Mapping[str, Candidate]  # by name, the baseline first
    clock: Clock
    rule: Rule
    exclusions: Exclusions

    def verdict(self, fill: FillRounds, *, presume_confirmed: bool) -> Verdict:
        """What the rounds so far come to."""
        return judge_fill(
            fill.results(),
            self.rule,
            self.exclusions.by_name,
            presume_confirmed=presume_confirmed,
        )


def check(
    candidates: Sequence[Candidate],
    inputs: Sequence[SortingInputs],
    num_tokens: int,
    exclusions: Exclusions,
) -> None:
    """Compare each candidate with the baseline, the first, on each of these inputs.

    The baseline defines right. All run on poisoned memory, so that an output left unwritten shows.
    This is also each candidate's first call, in which kernels may compile: never timed. Waits for
    the device once. Raises CalibrationFailedError where the baseline raises.
    """
    baseline = candidates[0]
    compared: list[tuple[str, Comparison]] = []
    for one in inputs:
        others = [c for c in candidates[1:] if c.name not in exclusions.by_name]
        if not others:
            break
        try:
            with poisoned_memory():
                right = expected(run_without_exit(baseline.bind(one)))
        # Whatever the baseline raises: without it nothing can be said.
        except Exception as error:
            _exclude(exclusions, baseline.name, error, num_tokens)
            return
        for candidate in others:
            try:
                with poisoned_memory():
                    outputs = run_without_exit(candidate.bind(one))
                compared.append((candidate.name, compare(right, outputs, one)))
                del outputs  # moe_buf is as large as the batch's activations
            # A candidate may fail in any way its kernel likes; that only costs it the candidacy.
            except Exception as error:
                _exclude(exclusions, candidate.name, error, num_tokens)
    try:
        found = differences([comparison for _, comparison in compared])
    # A kernel's error may surface only at this wait, without the candidate's name.
    except Exception as error:
        _exclude(exclusions, baseline.name, error, num_tokens)
        return
    for (name, _), problems in zip(compared, found, strict=True):
        if problems:
            exclusions.add(Exclusion(name, wrong=True, reason="; ".join(problems)), num_tokens)


def measure(
    bench: Bench, fill: FillRounds, rounds: int, num_tokens: int, spent: Callable[[], bool]
) -> None:
    """The first pass at one fill, brought to `rounds` rounds: fewer where it is settled before, or
    the time is spent.

    `spent` is asked before each round. Only whole rounds count.
    """
    names = [name for name in bench.candidates if name not in bench.exclusions.by_name]
    if not fill.first_look_done:
        if len(names) < 2:
            return
        samplers = _prepare(bench, fill, names, math.inf, num_tokens)
        _first_look(bench, fill, samplers, num_tokens)
        fill.first_look_done = True
    # A settled candidate takes no part, and is not captured into a graph for it.
    live = _live(bench, fill)
    if len(live) < 2:
        return
    samplers = _prepare(bench, fill, live, fill.call_us, num_tokens)
    live, judged = _live(bench, fill), fill.rounds
    for number in range(fill.rounds, rounds):
        # Judging costs as much as a sample: many rounds are judged after each eighth more.
        excluded = any(name in bench.exclusions.by_name for name in live)
        if number - judged >= max(1, judged // 8) or excluded:
            live, judged = _live(bench, fill), number
        if len(live) < 2 or spent():
            break
        _one_round(bench, fill.first, samplers, live, number, num_tokens)


def confirm(
    bench: Bench, fill: FillRounds, rounds: int, num_tokens: int, spent: Callable[[], bool]
) -> None:
    """The second pass at one fill, of the baseline and every FASTER candidate, brought to `rounds`
    rounds.

    In lots, each prepared anew: what one captured graph has of its own then shows as noise between
    lots. The first LOTS are of LOT rounds, and each next one doubles what there is.
    """
    verdict = bench.verdict(fill, presume_confirmed=True)
    names = [verdict.baseline.candidate, *verdict.faster]
    if len(names) < 2:
        return
    needed = max(rounds_to_confirm(verdict.judgement(n).gain_low or 0.0) for n in verdict.faster)
    fill.second = {name: fill.second.get(name, Times()) for name in names}
    times = fill.second[names[0]].device
    while (done := len(times)) < rounds:
        if done >= needed and bench.verdict(fill, presume_confirmed=False).settled:
            return
        live = [name for name in names if name not in bench.exclusions.by_name]
        upto = min(done + LOT if done < LOTS * LOT else 2 * done, rounds)
        samplers = _prepare(bench, fill, live, fill.call_us, num_tokens)
        for number in range(done, upto):
            live = [name for name in live if name not in bench.exclusions.by_name]
            if len(live) < 2 or spent():
                return
            _one_round(bench, fill.second, samplers, live, number, num_tokens)


def short(error: BaseException) -> str:
    """The error in one line of a log."""
    return f"{type(error).__name__}: {error}".split("\n", 1)[0][:200]


def _ratios(values: Sequence[float]) -> Ratios | None:
    return summarize(values) if values else None


def _live(bench: Bench, fill: FillRounds) -> list[str]:
    """Candidates still worth a round: the baseline and the unsettled, or none once all is settled.

    A FASTER candidate is timed on while a rival is open, so that both see the same rounds.
    """
    verdict = bench.verdict(fill, presume_confirmed=True)
    if verdict.settled:
        return []
    worth = (Standing.BASELINE, Standing.UNSETTLED, Standing.FASTER)
    return [j.candidate for j in verdict.judgements if j.standing in worth]


def _prepare(
    bench: Bench, fill: FillRounds, names: Sequence[str], call_us: float, num_tokens: int
) -> dict[str, Sampler]:
    """A sampler for each of these candidates; one that cannot be prepared is excluded."""
    samplers: dict[str, Sampler] = {}
    for name in names:
        calls = [bench.candidates[name].bind(inputs) for inputs in fill.inputs]
        try:
            samplers[name] = bench.clock.prepare(calls, call_us)
        except Exception as error:
            _exclude(bench.exclusions, name, error, num_tokens)
    return samplers


def _first_look(
    bench: Bench, fill: FillRounds, samplers: Mapping[str, Sampler], num_tokens: int
) -> None:
    """One sample of each: about what a call takes, and which candidates are far slower."""
    looks = {name: _sample(bench, samplers, name, num_tokens) for name in samplers}
    seen = {name: sample.device_us for name, sample in looks.items() if sample is not None}
    fill.call_us = min(seen.values(), default=0.0)
    for name, us in list(seen.items())[1:]:
        best = min(seen, key=lambda n: seen[n])
        ratio = us / seen[best]
        if ratio <= FAR_SLOWER:
            continue
        again = _sample(bench, samplers, name, num_tokens)
        beside = _sample(bench, samplers, best, num_tokens)
        if again is not None and beside is not None:
            ratio = min(ratio, again.device_us / beside.device_us)
        if ratio > FAR_SLOWER and name not in bench.exclusions.by_name:
            fill.dropped[name] = ratio


def _one_round(
    bench: Bench,
    times: Mapping[str, Times],
    samplers: Mapping[str, Sampler],
    live: Sequence[str],
    number: int,
    num_tokens: int,
) -> None:
    order = _order(number, live)
    visits = _visit(bench, samplers, [*order, *reversed(order)], num_tokens)
    # Only candidates whose visits disagree are sampled twice more.
    unstable = [name for name in order if _disagree(visits[name])]
    for name, more in _visit(bench, samplers, [*unstable, *reversed(unstable)], num_tokens).items():
        visits[name] += more
    logger.debug("samples us: %s", visits)
    baseline = _middle(visits[live[0]])
    for name in live:
        if name not in bench.exclusions.by_name:
            times[name].add(_middle(visits[name]), baseline)


def _visit(
    bench: Bench, samplers: Mapping[str, Sampler], order: Sequence[str], num_tokens: int
) -> dict[str, list[Sample]]:
    """All samples are enqueued before the first is waited for: the device never waits."""
    visits: dict[str, list[Sample]] = {name: [] for name in order}
    pending = [(name, _enqueue(bench, samplers, name, num_tokens)) for name in order]
    for name, wait in pending:
        if (sample := _wait(bench, name, wait, num_tokens)) is not None:
            visits[name].append(sample)
    return visits


def _order(number: int, live: Sequence[str]) -> list[str]:
    """The order of a round's first sweep; the second one goes back.

    Each candidate opens a round equally often (the call after our own bookkeeping runs colder), and
    each full turn of the rotation is followed by its mirror image.
    """
    turn, start = divmod(number, len(live))
    ring = live[::-1] if turn % 2 else live
    return [*ring[start:], *ring[:start]]


def _disagree(visits: Sequence[Sample]) -> bool:
    times = [sample.device_us for sample in visits]
    return len(times) > 1 and max(times) > DISAGREE * min(times)


def _middle(visits: Sequence[Sample]) -> Sample:
    host = [sample.host_us for sample in visits if sample.host_us is not None]
    return Sample(
        statistics.median(sample.device_us for sample in visits),
        statistics.median(host) if host else None,
    )


def _sample(
    bench: Bench, samplers: Mapping[str, Sampler], name: str, num_tokens: int
) -> Sample | None:
    """One sample, or None where the candidate raised and is excluded from here on."""
    return _wait(bench, name, _enqueue(bench, samplers, name, num_tokens), num_tokens)


def _enqueue(
    bench: Bench, samplers: Mapping[str, Sampler], name: str, num_tokens: int
) -> Pending | None:
    if name in bench.exclusions.by_name:
        return None
    try:
        return samplers[name]()
    except Exception as error:
        _exclude(bench.exclusions, name, error, num_tokens)
        return None


def _wait(bench: Bench, name: str, wait: Pending | None, num_tokens: int) -> Sample | None:
    if wait is None:
        return None
    try:
        sample = wait()
    except Exception as error:
        _exclude(bench.exclusions, name, error, num_tokens)
        return None
    host_us = None if sample.host_us is None else max(sample.host_us, LEAST_US)
    return Sample(max(sample.device_us, LEAST_US), host_us)


def _exclude(exclusions: Exclusions, name: str, error: Exception, num_tokens: int) -> None:
    reason = f"raised {short(error)}"
    exclusions.add(Exclusion(name, wrong=False, reason=reason), num_tokens)
