"""Starts of an engine with ADAPTIVE_MOE_SORTS, each in a child of this process.

The engine's own code loads the plugin, warms up and runs the layers: how, its tests say. All sorts
are the stand-in's, slowed so that one kind of candidate is the fastest by far.
"""

import contextlib
import functools
import io
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import in_child

EXPERTS, TOPK, DIM = 16, 4, 64
COUNTS = (1, 8, 33, 100)
POLICIES = ("policy 0", "policy 1", "policy 2")
TRITON = ("triton one-shot", "triton multi-phase")
# ADAPTIVE_MOE_SORTS -> which of the stand-in's sorts are slow, who may compete with the baseline,
# and who is the fastest.
SETTINGS = {
    "policies": ("0,2", POLICIES, ("policy 1",)),
    "aiter": ("opus,ck", (*POLICIES, "ck", "flydsl"), ("flydsl",)),
    "all": ("opus,ck,flydsl", (*POLICIES, "ck", "flydsl", *TRITON), TRITON),
    "FlyDSL,triton one-shot": ("opus,triton", ("flydsl", "triton one-shot"), ("flydsl",)),
}
# The same where rows of -1 can occur beside baseline 0: which sorts are slow, and the fastest.
UNSAFE = frozenset({"policy 1", "ck", "flydsl"})
PADDED = {
    "policies": ("0", ("policy 2",)),
    "aiter": ("0", ("policy 2",)),
    "all": ("opus", TRITON),
    "FlyDSL,triton one-shot": ("opus", ("triton one-shot",)),
}
# A list of sorts with a name in it that there is not.
NO_SORT = "flydsl,oppus"
WORDS = {
    "policy 0": "policy 0 (AITER's rule)",
    "policy 1": "policy 1 (one-shot)",
    "policy 2": "policy 2 (multi-phase)",
}


@dataclass(frozen=True)
class Engine:
    """baseline: what it passes. padding_rows: can rows of -1 occur? load: its plugins, as in a new
    process. warm_up: its first forward and what comes then; what it returns is kept alive.
    layer(num_tokens): one MoE layer of EXPERTS, TOPK and DIM; its result, and the weights of its
    routing."""

    baseline: str
    padding_rows: bool
    load: Callable[[], None]
    warm_up: Callable[[], Any]
    layer: Callable[[int], tuple[Any, Any]]


def assert_start(engine: Engine, sorts: str, folder: Path) -> None:
    """An engine's start with these `sorts`: who competes, serves and is named."""
    found = start(engine, sorts, folder)
    _, competing, fastest = _setting(engine, sorts)
    unsafe = UNSAFE if engine.padding_rows else frozenset()
    for offered in found["offered"]:
        assert offered[0] == engine.baseline, found
        assert set(offered[1:]) == {*competing} - {engine.baseline} - unsafe, found
    for name in unsafe & {*competing}:
        assert f"{name} is not offered" in found["log"], found
    assert found["served"] == found["decided"], found
    # On a busy machine some counts stay unsettled, and the baseline serves those.
    (name,) = found["served"][found["count"]]
    assert name in fastest, found
    for first, last, sort in found["runs"]:
        words = WORDS.get(sort, sort)
        span = f"{first} to {last}" if first < last else f"{first}"
        places = (f"{words} at every count", f"else {words}", span)
        for told in ("log", "report"):
            lines = [line for line in found[told].splitlines() if line.startswith("  eager:")]
            assert any(words in n and any(p in n for p in places) for n in lines), found
    if name in POLICIES:
        return
    # It raises at the first call, which the baseline answers as well, and is asked no more.
    assert found["raises"] == [[name, engine.baseline], [engine.baseline]], found
    assert found["well again"] == [[engine.baseline], [engine.baseline]], found
    (line,) = found["said"]
    assert line.startswith(f"{name} is off in this process and the baseline serves in its place")
    assert found["fell back"] == 1


def assert_refused(load: Callable[[], None], caplog: Any) -> None:
    """ADAPTIVE_MOE_SORTS with a name that no sort has: one line over two loads of the plugins."""
    from adaptive_moe.engines import process

    for _ in range(2):
        load()
    (line,) = [r.message for r in caplog.records if "ADAPTIVE_MOE_SORTS" in r.message]
    assert line.startswith(f"ADAPTIVE_MOE_SORTS='{NO_SORT}' is not accepted: give policies, aiter")
    assert line.endswith("or leave it unset; it counts as policies")
    assert process.current().settings.sorts == ("policies",)


def _setting(engine: Engine, sorts: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    slow, competing, fastest = SETTINGS[sorts]
    if engine.padding_rows:
        slow, fastest = PADDED[sorts]
    return slow, competing, fastest


def start(engine: Engine, sorts: str, folder: Path) -> dict[str, Any]:
    environ = {
        "ADAPTIVE_MOE_SORTS": sorts,
        "ADAPTIVE_MOE_CACHE_DIR": str(folder),
        "ADAPTIVE_MOE_REPORT": f"{folder}.json",
        # For a busy machine: a gain is either large, or surely not worth it.
        "ADAPTIVE_MOE_BUDGET_S": "30",
        "ADAPTIVE_MOE_MARGIN": "0.3",
        "ADAPTIVE_MOE_BUCKETS": "8,64",
        "AITER_STANDIN_SLOW": _setting(engine, sorts)[0],
    }
    return in_child(functools.partial(_start, engine, environ, _setting(engine, sorts)[2]), sorts)()


def _start(engine: Engine, environ: dict[str, str], fastest: tuple[str, ...]) -> dict[str, Any]:
    import ours_on_cpu
    import torch

    from adaptive_moe.engines import process

    os.environ.update(environ)
    torch.set_num_threads(1)
    ours_on_cpu.register()
    engine.load()
    log = _heard()
    started = engine.warm_up()
    tables = {t.evidence.coverage.shape.block_size: t for t in process.current().tables.values()}
    runs = [run for table in tables.values() for run in table.runs()]
    # The last count of a run is one that the table is for.
    count = next((last for _, last, name in runs if name in fastest), 1)
    served = {n: _who(engine, n) for n in (*COUNTS, count)}
    found = {
        "count": count,
        "offered": [table.evidence.candidates for table in tables.values()],
        "runs": runs,
        "decided": {n: [tables[block].candidate(n)] for n, (_, block) in served.items()},
        "served": {n: names for n, (names, _) in served.items()},
        "log": "\n".join(log),
        "report": _printed("show", "--table", environ["ADAPTIVE_MOE_REPORT"]),
    }
    ((name,), _) = served[count]
    log.clear()
    if not name.startswith("policy"):
        os.environ["AITER_STANDIN_FAIL"] = f"backend={name.split()[0]},kind=raise"
        found["raises"] = [_who(engine, count)[0] for _ in range(2)]
        os.environ["AITER_STANDIN_FAIL"] = ""
        found["well again"] = [_who(engine, count)[0] for _ in range(2)]
    fell_back = process.counts().fell_back
    del started  # until here: an engine's tables go when it does
    return {**found, "said": log, "fell back": fell_back}


def _who(engine: Engine, num_tokens: int) -> tuple[list[str], int]:
    """The candidates that one layer's sort came to, one after another, and its block size."""
    import aiter.sort
    import torch

    before = len(aiter.sort.calls)
    result, weights = engine.layer(num_tokens)
    expected = weights.sum(1, keepdim=True).expand(num_tokens, DIM)
    torch.testing.assert_close(result.float(), expected, rtol=0.02, atol=0.02)
    calls = list(aiter.sort.calls)[before:]
    return [_candidate(call) for call in calls], calls[-1].block_size


def _candidate(call: Any) -> str:
    if call.backend == "triton":
        return TRITON[call.policy - 1]
    return f"policy {int(call.policy)}" if call.backend == "opus" else str(call.backend)


def _heard() -> list[str]:
    """What adaptive_moe says from now on."""
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("adaptive_moe")
    logger.setLevel(logging.INFO)  # as SGLang's servers set it for all
    logger.addHandler(handler)
    return lines


def _printed(*command: str) -> str:
    from adaptive_moe.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(command) == 0
    return out.getvalue()
