"""Warm-up: a table for every shape seen at the seam so far, the same on all ranks. Never while
serving.

    coverages     which tables are wanted, each for which calls (wanted.py)
    make_own      this rank's, stored by an earlier start or measured now, and what failed (own.py)
    others.agree  one exchange with the other ranks, which this rank comes to whatever became of it,
                  and brings all tables it has to (others.py)
    then          what was agreed is set, all tables at once, and what is sound is stored

A dummy batch's own ids are never sorted here: they route every token to the same experts.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptive_moe.disk import folder as store
from adaptive_moe.engines.others import Connect, Others, rank_and_size
from adaptive_moe.engines.own import Measure, OwnTables, make_own, make_ready
from adaptive_moe.engines.wanted import Batches, Wanted, coverages
from adaptive_moe.hook.hook import AiterHook
from adaptive_moe.kernels.call import CallKey
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.report import text as report
from adaptive_moe.settings import LogDetail, Mode

logger = logging.getLogger("adaptive_moe")


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up did.

    tables    set now, by the key of the calls they serve
    origins   of each of them: "stored", "measured" here now, or "agreed" with other ranks
    problems  a sentence for each shape that got none
    seconds   wall-clock time it took
    """

    tables: Mapping[CallKey, PolicyTable]
    problems: tuple[str, ...]
    seconds: float
    origins: Mapping[CallKey, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        made = ", ".join(f"{key.describe()} {origin}" for key, origin in self.origins.items())
        return f"WarmUp([{made}], {len(self.problems)} problems, {self.seconds:.2f} s)"


def warm_up_hook(
    hook: AiterHook,
    batches: Batches,
    *,
    engine: str = "plain",
    measure: Measure | None = None,
    connect: Connect | None = None,
) -> WarmUp:
    """Make a table for every shape seen that has none for all of these batches, and set them.

    Args:
        batches: their `busy_from` gives way to ADAPTIVE_MOE_BUSY_FROM.
        engine: name and version, a part of what a stored table is good for.
        connect: how to reach other ranks. All that it reaches end with the same tables, and all of
            them must call this equally often; see ranks/agreement.py for how long one waits.

    A shape that cannot be calibrated keeps the baseline, with one warning, and the next start tries
    it again. With a fixed policy no shape is noted, and so none measured. Takes up to
    ADAPTIVE_MOE_BUDGET_S a shape. A later call with larger batches or other sizes extends the
    tables there are.
    """
    begun = time.monotonic()
    batches = replace(batches, busy_from=hook.settings.busy_from or batches.busy_from)
    speaks = rank_and_size()[0] == 0
    with hook.warming:
        wanted, problems = _wanted(hook, batches, speaks)
        others = Others.reached(connect, len(wanted) + len(hook.tables), hook.settings.budget_s)
        own = make_own(
            hook,
            wanted,
            measure or _calibrate,
            engine=engine,
            speaks=speaks,
            refused=_refusal(hook),
        )
        problems += own.problems
        for problem in problems:
            logger.warning(
                "not calibrated this time, the baseline serves it and the next start tries again: "
                "%s",
                problem,
            )
        tables, refusals = others.agree(own, hook.tables)
        hook.set_tables(tables)
        hook.end_warm_up(tables, batches.owner)
        for key, one in own.tables.items():
            if key in tables:
                make_ready(one, tables[key])
        origins = {key: _origin(own, key, table) for key, table in tables.items()}
        if speaks:
            _report(hook, tables, origins)
        if own.kept is not None:
            own.kept.publish(_worth_keeping(own, tables))
            if speaks:
                _name_files(own, tables)
    return WarmUp(tables, (*problems, *refusals), time.monotonic() - begun, origins)


def _refusal(hook: AiterHook) -> str:
    """Why nothing may be measured now, or nothing."""
    if hook.layer is None:
        return "adaptive_moe is not active in that process"
    if any(seen.device.type != "cpu" for seen in hook.seen.values()) and _capturing():
        return "the current stream is being captured: warm up before or after capture"
    return ""


def _capturing() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _wanted(hook: AiterHook, batches: Batches, speaks: bool) -> tuple[list[Wanted], list[str]]:
    """The tables to make, and why others cannot be. Never raises."""
    if not hook.seen and hook.settings.mode is Mode.AUTO and speaks:
        logger.warning(
            "auto has nothing to choose: nothing was sorted through AITER's fused_moe so far (a "
            "dense model, AITER's MoE switched off as by VLLM_ROCM_USE_AITER=0 or "
            "VLLM_ROCM_USE_AITER_MOE=0, or no forward yet)"
        )
    try:
        return coverages(hook, batches)
    except Exception as error:
        logger.exception("what to calibrate is not known")
        return [], [f"{type(error).__name__}: {error}"]


def _origin(own: OwnTables, key: CallKey, table: PolicyTable) -> str:
    one = own.tables.get(key)
    if one is None or table != one.table:
        return "agreed"
    return "measured" if one.measured else "stored"


def _worth_keeping(
    own: OwnTables, tables: Mapping[CallKey, PolicyTable]
) -> dict[store.Key, PolicyTable]:
    """What the ranks run, where that is news here; else what was measured, for the next start. The
    store itself refuses a table in which something failed: that is for this process only."""
    keep = {}
    for key, one in own.tables.items():
        table = tables.get(key, one.table)
        if one.measured or table != one.table:
            keep[one.place] = table
    return keep


def _name_files(own: OwnTables, tables: Mapping[CallKey, PolicyTable]) -> None:
    """A line for each table that is set and kept on disk."""
    for key, one in own.tables.items():
        path = own.kept.folder / one.place.file_name() if own.kept else None
        if key in tables and path is not None and path.exists():
            logger.info("table kept in %s: %s", path, key.describe())


def _calibrate(*args: Any, **kwargs: Any) -> PolicyTable:
    from adaptive_moe.tuning.calibrator import calibrate  # imports torch

    return calibrate(*args, **kwargs)


def _report(
    hook: AiterHook, tables: Mapping[CallKey, PolicyTable], origins: Mapping[CallKey, str]
) -> None:
    settings = hook.settings
    for key, table in tables.items():
        logger.info("%s", report.headline(table, measured_now=origins[key] != "stored"))
        if settings.log_detail is not LogDetail.SUMMARY:
            logger.info("%s", "\n".join(report.bucket_table(table)))
    if settings.report and tables:
        # Those of earlier warm-ups too: the file is written anew each time.
        text = "[" + ",\n".join(table.to_json() for table in hook.tables.values()) + "]\n"
        try:
            Path(settings.report).write_text(text, encoding="utf-8")
        except OSError as error:
            logger.warning(
                "ADAPTIVE_MOE_REPORT=%s was not written (%s): give a file in a folder that exists "
                "and is writable",
                *(settings.report, error),
            )
