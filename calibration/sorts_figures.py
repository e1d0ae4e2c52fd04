"""From the oracle's and the steps' times to the figures of check_sorts, and what they mean."""

from collections.abc import Mapping, Sequence
from typing import Any

from adaptive_moe.cli.bench.oracle import OraclePoint
from adaptive_moe.policy.situation import Situation
from adaptive_moe.policy.table import PolicyTable

GOT = {"captured_got_of_promised": "captured", "busy_got_of_promised": "busy"}
MEANING = {
    "within_1pct": "fraction of the counts at which the table's choice takes at most 1% longer "
    "than the best candidate, who is named by half of the oracle's passes and timed by the others",
    "within_1pct_of_least": "the same over the least of all times, which among equals is luck",
    "worst_over_best": "the choice's time over the best's, where that is largest",
    "captured_got_of_promised": "what captured steps got shorter by, over what the oracle's times "
    "of the chosen sort alone promise, each summed over counts and models; busy_... likewise",
    "promise": "the same of one model by count, us a layer",
    "partial": "models with what there was no time for, or why they failed; the sums are "
    "without it",
    "oracle": "a row a count: us a call of each candidate; reason is the calibration's",
    "step": "as bench step has it; its table is of a calibration of its own",
}


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    close, close_to_least = (
        sum(row[over] <= 1.01 for row in rows) for over in ("over_best", "over_least")
    )
    return {
        "counts": len(rows),
        "counts_within_1pct": close,
        "within_1pct": round(close / len(rows), 4),
        "within_1pct_of_least": round(close_to_least / len(rows), 4),
        "worst_over_best": max(row["over_best"] for row in rows),
    }


def oracle_row(table: PolicyTable, situation: Situation, point: OraclePoint) -> dict[str, Any]:
    """Whom the table chooses at one count, and what it takes over the best there."""
    chosen = table.candidate(point.num_tokens, captured=situation is Situation.GRAPH)
    bucket = table.bucket(point.num_tokens, situation)
    return {
        "situation": situation.value,
        "num_tokens": point.num_tokens,
        "chosen": chosen,
        "over_best": round(point.over_best(chosen), 4),
        "over_least": round(point.us[chosen] / min(point.us.values()), 4),
        "us": {name: round(us, 3) for name, us in point.us.items()},
        "reason": bucket.reason if bucket else None,
    }


def promise(judged: Mapping[str, Any], oracle: Mapping[Situation, Any]) -> dict[str, Any]:
    """us a layer that the oracle's times promise, and what the step got, by situation and count."""
    found: dict[str, Any] = {}
    for name, situation in (("captured", Situation.GRAPH), ("busy", Situation.BUSY)):
        rows = []
        for row in judged.get(name, {}).get("sweep", ()):
            us = oracle.get(situation, {}).get(row["num_tokens"])
            if us is None:
                continue
            baseline = next(iter(us))
            promised = us[baseline] - us[row["chosen"]]
            got = -row["over_baseline_us"][row["chosen"]][0]
            rows.append([row["num_tokens"], row["chosen"], round(promised, 3), round(got, 3)])
        if rows:
            promised, got = (sum(row[i] for row in rows) for i in (2, 3))
            found[name] = {
                "promised_us": round(promised, 3),
                "got_us": round(got, 3),
                "got_of_promised": round(got / promised, 4) if promised else None,
                "columns": ["num_tokens", "chosen", "promised us", "got us"],
                "rows": rows,
            }
    return {"promise": found}


def overall(shapes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over the models there was time for, the goals, and what is not in the sums."""
    some = {name: shape for name, shape in shapes.items() if "counts" in shape}
    counts, close = (sum(s[k] for s in some.values()) for k in ("counts", "counts_within_1pct"))
    found: dict[str, Any] = {
        "models": list(some),
        "partial": {
            name: why
            for name, shape in shapes.items()
            if (why := shape.get("failed") or shape["left_out_for_time"])
        },
        "counts": counts,
        "within_1pct": round(close / counts, 4) if counts else None,
        "goals": {"within_1pct": [0.99, 1.0], **{key: [0.8, 1.2] for key in GOT}},
    }
    for key, name in GOT.items():
        parts = [s["promise"][name] for s in some.values() if name in s["promise"]]
        promised, got = (sum(part[k] for part in parts) for k in ("promised_us", "got_us"))
        found[key] = round(got / promised, 4) if promised else None
    found["met"] = {
        key: None if found[key] is None else low <= found[key] <= high
        for key, (low, high) in found["goals"].items()
    }
    return found
