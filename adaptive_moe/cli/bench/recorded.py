"""Times of sorts that somebody published or recorded, from a CSV.

A row is of one model and token count: `model` is a name of models.toml, or `experts` and `topk` say
which sort it is. Its times are in columns NAME_us; or in `time_us`, of the sort in the column
`implementation`. `mode` is graph or eager; without that column all are replayed graphs. Rows of
other modes, or without a time, are skipped.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptive_moe.models import Model
from adaptive_moe.policy.situation import Situation

_SITUATIONS = {
    "": Situation.GRAPH,
    "graph": Situation.GRAPH,
    # One after the other, with events around all: the device is busy.
    "eager": Situation.BUSY,
    "events": Situation.BUSY,
}


@dataclass(frozen=True)
class Recorded:
    """One time, in microseconds a call; sort_of is experts and topk where the model is no known
    name."""

    model: str
    sort_of: tuple[str, str]
    num_tokens: int
    situation: Situation
    name: str
    us: float

    def is_of(self, model: Model) -> bool:
        if self.sort_of != ("", ""):
            return self.sort_of == (str(model.num_experts), str(model.topk))
        return self.model == model.name


def read_times(path: Path) -> list[Recorded]:
    """Every time in the file; ValueError naming what the file lacks."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    columns = set(rows[0]) if rows else set()
    timed = {"implementation", "time_us"} <= columns or any(_sort(c) for c in columns)
    if not {"model", "tokens"} <= columns or not timed:
        raise ValueError(
            f"{path} has the columns {', '.join(sorted(columns)) or '(none)'}: give a CSV with "
            "model, tokens and NAME_us, or with model, tokens, implementation and time_us"
        )
    return [one for number, row in enumerate(rows, 2) for one in _of_row(row, f"{path}:{number}")]


def times_of(
    recorded: Sequence[Recorded], model: Model, situation: Situation, num_tokens: int
) -> dict[str, float]:
    """What was recorded of that model there, by name."""
    return {
        f"recorded {one.name}": one.us
        for one in recorded
        if (one.situation, one.num_tokens) == (situation, num_tokens) and one.is_of(model)
    }


def _of_row(row: Mapping[str, str], place: str) -> Iterator[Recorded]:
    situation = _SITUATIONS.get(row.get("mode") or "")
    times = {name: text for column, text in row.items() if (name := _sort(column)) and text}
    if row.get("time_us"):
        times[" ".join(w for w in (row["implementation"], row.get("policy")) if w)] = row["time_us"]
    if situation is None or not row["tokens"]:
        return
    for name, text in times.items():
        try:
            tokens, us = int(row["tokens"]), float(text)
        except ValueError:
            raise ValueError(
                f"{place}: {row['tokens']!r} tokens in {text!r} us is not accepted: give numbers"
            ) from None
        sort_of = (row.get("experts") or "", row.get("topk") or "")
        yield Recorded(row["model"], sort_of, tokens, situation, name, us)


def _sort(column: str) -> str:
    """The sort that a column has the times of, if it is such a column."""
    is_one = column.endswith("_us") and column != "time_us"
    return column.removesuffix("_us").replace("_", " ") if is_one else ""
