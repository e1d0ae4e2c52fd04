"""From the times of whole steps to what a table loses and saves, as fractions of a step."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibration.interleaved import Interval, longer
from calibration.seams import ALL, POLICIES

TABLE, POLICY_TABLE = "table", "table of policies"


@dataclass(frozen=True)
class Point:
    """One count in one situation: each candidate's us a layer by rounds, the baseline's first, what
    each table chooses there, and what the host takes to enqueue a layer."""

    num_tokens: int
    us: Mapping[str, Sequence[float]]
    chosen: Mapping[str, str]
    host_us: float = 0.0

    def over_baseline(self, name: str) -> float:
        """The fraction that it takes longer than the baseline."""
        return longer(self.us[name], next(iter(self.us.values()))).mean

    def loss(self, name: str, rivals: Sequence[str]) -> Interval:
        """The fraction that it takes longer than the best of the rivals."""
        best = min(rivals, key=self.over_baseline)
        return longer(self.us[name], self.us[best])


def figures(points: Sequence[Point], busy_from: int = 0) -> dict[str, Any]:
    """By set of candidates and then by variant; split where some counts lie below busy_from and
    others do not."""
    sets = {}
    for sorts in (POLICIES, ALL):
        if sorts not in points[0].chosen:
            continue
        variants = {TABLE: sorts}
        if sorts == ALL and POLICIES in points[0].chosen:
            variants[POLICY_TABLE] = POLICIES
        variants |= {n: n for p in points for n in p.us if sorts == ALL or n.startswith("policy ")}
        sets[sorts] = {
            variant: _losses(points, sorts, name, busy_from) for variant, name in variants.items()
        }
    return {"sets": sets, "sweep": [_row(p) for p in points]}


def _losses(points: Sequence[Point], sorts: str, variant: str, busy_from: int) -> dict[str, Any]:
    """Of a table (the name of its set) or a candidate, at the counts where that was timed."""
    lost: dict[int, Interval] = {}
    over: dict[int, float] = {}
    for p in points:
        name = p.chosen.get(variant, variant)
        if name in p.us:
            rivals = [n for n in p.us if sorts == ALL or n.startswith("policy ")]
            lost[p.num_tokens], over[p.num_tokens] = p.loss(name, rivals), p.over_baseline(name)
    found: dict[str, Any] = _summary(lost, over)
    parts = {
        f"below {busy_from}": [n for n in lost if n < busy_from],
        f"from {busy_from}": [n for n in lost if n >= busy_from],
    }
    if all(parts.values()):
        for part, some in parts.items():
            found[part] = _summary({n: lost[n] for n in some}, {n: over[n] for n in some})
    return found


def _summary(lost: Mapping[int, Interval], over: Mapping[int, float]) -> dict[str, Any]:
    surely = [max(loss.low, 0.0) for loss in lost.values()]
    worst = max(lost, key=lambda n: lost[n].mean)
    return {
        "counts": len(lost),
        "mean_loss": _rounded(statistics.fmean(loss.mean for loss in lost.values())),
        "worst_loss": _rounded(lost[worst].mean),
        "worst_at": worst,
        "mean_surely": _rounded(statistics.fmean(surely)),
        "worst_surely": _rounded(max(surely)),
        "mean_saved": _rounded(-statistics.fmean(over.values())),
        "most_saved": _rounded(-min(over.values())),
        "worst_over_baseline": _rounded(max(over.values())),
    }


def overall(shapes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over all shapes, by situation, set and variant: the mean of means, the worst of worst."""
    found: dict[str, Any] = {}
    for situation in dict.fromkeys(s for shape in shapes for s in shape):
        for sorts in dict.fromkeys(s for shape in shapes for s in shape[situation]["sets"]):
            some = [shape[situation]["sets"][sorts] for shape in shapes]
            for variant in dict.fromkeys(v for one in some for v in one):
                parts = [one[variant] for one in some if variant in one]
                found.setdefault(situation, {}).setdefault(sorts, {})[variant] = _merged(parts)
    return found


def _merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"shapes": len(parts)}
    for key, value in parts[0].items():
        values = [part[key] for part in parts if key in part]
        if isinstance(value, Mapping):
            found[key] = _merged(values)
        elif key.startswith("mean"):
            found[key] = _rounded(statistics.fmean(values))
        elif key.startswith(("worst_", "most")) and key != "worst_at":
            found[key] = max(values)
    return found


def _row(p: Point) -> dict[str, Any]:
    base = statistics.median(next(iter(p.us.values())))
    return {
        "num_tokens": p.num_tokens,
        "chosen": dict(p.chosen),
        "host_us_per_layer": round(p.host_us, 1),
        "us_per_layer": {n: round(base * (1.0 + p.over_baseline(n)), 3) for n in p.us},
        "loss": {
            n: [_rounded(x) for x in (i.mean, max(i.low, -9.0), min(i.high, 9.0))]
            for n in p.us
            for i in [p.loss(n, list(p.us))]
        },
    }


def _rounded(fraction: float) -> float:
    return round(fraction, 6) + 0.0  # no negative zeros
