"""From the samples of a sweep to what a table loses and saves, in fractions of a step."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adaptive_moe.cli.bench.paired import Difference, difference

CAPTURED, BUSY, AS_IT_COMES = "captured", "busy", "as_it_comes"
# The variant that sorts by the table, through the hook; the others are candidates.
TABLE = "table"

_MEANS = ("mean_loss", "mean_saved", "mean_resolved_loss")
_WORST = ("worst_loss", "worst_over_baseline", "most_saved", "worst_resolved_loss")


@dataclass(frozen=True)
class Point:
    """One count. us: each variant's time a layer; chosen: the table's candidate; host_us: what the
    host takes to enqueue a layer, where that was measured."""

    num_tokens: int
    chosen: str
    us: dict[str, float]
    over_baseline: dict[str, Difference]
    over_best: Difference
    host_us: float | None


def point(num_tokens: int, us: dict[str, list[float]], chosen: str, host: float | None) -> Point:
    """From the us a layer of each variant, the baseline first, paired by round."""
    baseline = next(iter(us))
    base = statistics.median(us[baseline])
    over = {name: difference(times, us[baseline]) for name, times in us.items()}
    middle = {name: base + over[name].median for name in us}
    sorts = [name for name in us if name != TABLE]
    best = min(sorts, key=lambda name: middle[name])
    # A choice too slow to be timed with the others loses all that it was slower at first.
    ours = us[chosen] if chosen in us else us[TABLE]
    return Point(num_tokens, chosen, middle, over, difference(ours, us[best]), host)


def figures(points: Sequence[Point]) -> dict[str, Any]:
    """The losses and savings of one situation, and the sweep behind them."""
    losses, over, saved, resolved = [], [], [], []
    for p in points:
        baseline = next(iter(p.us))
        base = p.us[baseline]
        ours = p.us.get(p.chosen, p.us[TABLE])
        best = min(us for name, us in p.us.items() if name != TABLE)
        losses.append(ours / best - 1.0)
        resolved.append(max(p.over_best.low, 0.0) / best)
        over.append(ours / base - 1.0)
        saved.append(1.0 - ours / base)
    worst = max(range(len(points)), key=lambda i: losses[i])
    return {
        "mean_loss": round(statistics.fmean(losses), 6),
        "worst_loss": round(losses[worst], 6),
        "worst_at": points[worst].num_tokens,
        "worst_over_baseline": round(max(over), 6),
        "mean_saved": round(statistics.fmean(saved), 6),
        "most_saved": round(max(saved), 6),
        "mean_resolved_loss": round(statistics.fmean(resolved), 6),
        "worst_resolved_loss": round(max(resolved), 6),
        "sweep": [
            {
                "num_tokens": p.num_tokens,
                "chosen": p.chosen,
                "us_per_layer": {name: round(us, 3) for name, us in p.us.items()},
                "over_baseline_us": {
                    name: [round(d.median, 3), round(d.low, 3), round(d.high, 3)]
                    for name, d in list(p.over_baseline.items())[1:]
                },
                **({} if p.host_us is None else _device_over_host(p)),
            }
            for p in points
        ],
    }


def _device_over_host(point: Point) -> dict[str, float]:
    host = point.host_us or 0.0
    device = next(iter(point.us.values()))
    return {"host_us_per_layer": round(host, 1), "device_over_host": round(device / host, 3)}


def overall(shapes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over all shapes: the mean of their means, the worst of their worst."""
    found = {}
    for situation in (CAPTURED, BUSY, AS_IT_COMES):
        some = [shape[situation] for shape in shapes if situation in shape]
        if some:
            found[situation] = {
                **{k: round(statistics.fmean(s[k] for s in some), 6) for k in _MEANS},
                **{k: max(s[k] for s in some) for k in _WORST},
            }
    return found
