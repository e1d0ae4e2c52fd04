"""From the samples of a sweep to what a table loses and saves, in fractions of a step."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptive_moe.cli.bench.paired import Difference, difference
from adaptive_moe.cli.bench.variants import TABLE

CAPTURED, BUSY, AS_IT_COMES = "captured", "busy", "as_it_comes"
ABOVE = "above_captured"

_MEANS = ("mean_loss", "mean_loss_surely", "mean_saved")
_WORST = ("worst_loss", "worst_loss_surely", "worst_over_baseline", "most_saved")


@dataclass(frozen=True)
class Point:
    """One count of one situation.

    chosen    the table's candidate
    us        each variant's time a layer, the baseline first
    over_baseline, loss  us a layer over the baseline's, and over the best candidate's
    host_us   what the host takes to enqueue a layer, where that was measured
    """

    num_tokens: int
    chosen: str
    us: dict[str, float]
    over_baseline: dict[str, Difference]
    loss: dict[str, Difference]
    host_us: float | None = None

    @property
    def best_us(self) -> float:
        return min(us for name, us in self.us.items() if name != TABLE)

    def lost(self, variant: str) -> float:
        """The fraction of the best candidate's step that it takes longer."""
        return self.us[variant] / self.best_us - 1.0

    @property
    def surely_lost(self) -> float:
        """The same of the table, as far as its interval excludes less."""
        return max(self.loss[self.chosen].low, 0.0) / self.best_us

    @property
    def over(self) -> float:
        """The fraction of the baseline's step that the table's choice takes longer."""
        return self.us[self.chosen] / next(iter(self.us.values())) - 1.0


def point(
    num_tokens: int, us: Mapping[str, Sequence[float]], chosen: str, host_us: float | None = None
) -> Point:
    """From the us a layer of each variant in each round, the baseline's first.

    Times are the baseline's median plus the median difference to it within rounds: what slows a
    whole round cancels.
    """
    baseline = next(iter(us))
    base = statistics.median(us[baseline])
    over = {name: difference(times, us[baseline]) for name, times in us.items()}
    middle = {n: base + over[n].median for n in us if len(us[n]) == len(us[baseline])}
    for name in us.keys() - middle:
        # Left out after a look, in which the baseline may have stalled: behind whom it was then.
        fastest = min(middle, key=lambda n: min(us[n][: len(us[name])]))
        middle[name] = middle[fastest] + difference(us[name], us[fastest]).median
    middle = {name: middle[name] for name in us}
    best = min((name for name in us if name != TABLE), key=lambda name: middle[name])
    loss = {name: difference(times, us[best]) for name, times in us.items()}
    return Point(num_tokens, chosen, middle, over, loss, host_us)


def figures(points: Sequence[Point], captured: Sequence[int] = ()) -> dict[str, Any]:
    """The losses and savings of one situation, and the sweep behind them. captured: counts that
    are captured; those above the largest have figures of their own, too."""
    worst = max(points, key=lambda p: p.lost(p.chosen))
    large = [p for p in points if captured and p.num_tokens > max(captured)]
    names = dict.fromkeys(name for p in points for name in p.us if name != TABLE)
    return {
        **_losses(points),
        "worst_at": worst.num_tokens,
        **({ABOVE: _losses(large)} if large else {}),
        "alone": {name: _alone([p for p in points if name in p.us], name) for name in names},
        "sweep": [_row(p) for p in points],
    }


def _alone(points: Sequence[Point], name: str) -> dict[str, float]:
    lost = [p.lost(name) for p in points]
    return {"mean_loss": _rounded(statistics.fmean(lost)), "worst_loss": _rounded(max(lost))}


def overall(shapes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over the situations of all shapes: the mean of their means, the worst of their worst."""
    found: dict[str, Any] = {}
    for situation in (CAPTURED, BUSY, AS_IT_COMES):
        some = [shape[situation] for shape in shapes if situation in shape]
        if some:
            found[situation] = _merged(some)
            above_captured = [s[ABOVE] for s in some if s.get(ABOVE)]
            if above_captured:
                found[situation][ABOVE] = _merged(above_captured)
    return found


def _merged(some: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        key: _rounded((statistics.fmean if key in _MEANS else max)([s[key] for s in some]))
        for key in (*_MEANS, *_WORST)
    }


def _losses(points: Sequence[Point]) -> dict[str, float]:
    lost = [p.lost(p.chosen) for p in points]
    surely = [p.surely_lost for p in points]
    over = [p.over for p in points]
    return {
        "mean_loss": _rounded(statistics.fmean(lost)),
        "worst_loss": _rounded(max(lost)),
        "mean_loss_surely": _rounded(statistics.fmean(surely)),
        "worst_loss_surely": _rounded(max(surely)),
        "worst_over_baseline": _rounded(max(over)),
        "mean_saved": _rounded(-statistics.fmean(over)),
        "most_saved": _rounded(-min(over)),
    }


def _row(p: Point) -> dict[str, Any]:
    def spans(found: Mapping[str, Difference]) -> dict[str, list[float]]:
        return {n: [round(x, 3) for x in (d.median, d.low, d.high)] for n, d in found.items()}

    row = {
        "num_tokens": p.num_tokens,
        "chosen": p.chosen,
        "us_per_layer": {name: round(us, 3) for name, us in p.us.items()},
        "lost": {name: _rounded(p.lost(name)) for name in p.us},
        "loss_us": spans(p.loss),
        "over_baseline_us": spans(p.over_baseline),
    }
    if p.host_us is not None:
        device = next(iter(p.us.values()))
        row["host_us_per_layer"] = round(p.host_us, 1)
        row["device_over_host"] = round(device / p.host_us, 3)
    return row


def _rounded(fraction: float) -> float:
    return round(fraction, 6) + 0.0  # no negative zeros
