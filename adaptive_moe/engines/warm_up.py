"""Warm-up: a table for every shape seen at the seam so far. Never while serving.

    coverages  which tables are wanted, each for which calls (wanted.py)
    table_for  each of them: from another rank, from the folder, or measured now (store/tables.py)
    checked    what a store had is compared with the baseline before it serves (checked.py)
    then       all tables are set at once, and the log says what they are and where they are kept

No rank waits for another. A dummy batch's own ids are never sorted here: they route every token to
the same experts.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from adaptive_moe.engines.checked import checked
from adaptive_moe.engines.wanted import Batches, Wanted, coverages
from adaptive_moe.hook.hook import AiterHook
from adaptive_moe.kernels import SortKernel
from adaptive_moe.kernels.call import CallKey
from adaptive_moe.policy.evidence import Evidence, Rule
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.report import text as report
from adaptive_moe.settings import LogDetail, Mode, Settings
from adaptive_moe.store.folder import Folder, cache_folder
from adaptive_moe.store.key import Request, TableKey, key_for
from adaptive_moe.store.shared import SharedStore
from adaptive_moe.store.tables import Served, Stores, continues_later, table_for
from adaptive_moe.store.text import report_text, to_text
from adaptive_moe.store.write import replace_file

if TYPE_CHECKING:
    from adaptive_moe.tuning.calibrate import Plan

logger = logging.getLogger("adaptive_moe")

# `adaptive_moe.tuning.calibrate.calibrate`, or a stand-in for it.
Calibrate = Callable[..., PolicyTable]

_T = TypeVar("_T")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up did.

    tables    set now, by the key of the calls they serve
    origins   of each of them: "stored", "measured" here now, or "shared" by another rank
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


@dataclass(frozen=True)
class _Task:
    """One table to make, the candidates for it, and its key in the stores."""

    wanted: Wanted
    kernel: SortKernel
    key: TableKey


def warm_up_hook(
    hook: AiterHook,
    batches: Batches,
    *,
    engine: str = "plain",
    measure: Calibrate | None = None,
) -> WarmUp:
    """Make a table for every shape seen that has none for all of these batches, and set them.

    Args:
        batches: their `busy_from` gives way to ADAPTIVE_MOE_BUSY_FROM.
        engine: name and version, a part of what a stored table is valid for.
        measure: in place of tuning.calibrate.

    A shape that cannot be calibrated keeps the baseline, with one warning, and the next start tries
    it again. With a fixed policy no shape is noted, and so none measured. Takes up to
    ADAPTIVE_MOE_BUDGET_S a shape, and at most 5 s more where the job's store does not answer. A
    later call with larger batches or other sizes extends the tables there are.
    """
    begun = time.monotonic()
    batches = replace(batches, busy_from=hook.settings.busy_from or batches.busy_from)
    speaks = _rank() == 0
    with hook.warming:
        wanted, problems = _wanted(hook, batches, speaks)
        # All keys before anything is measured: measuring may load modules, which keys name.
        tasks, unmade = _each(
            {one.key: one for one in wanted}, lambda one: _task(hook, one, engine)
        )
        folder = Folder(cache_folder(hook.settings), logging.INFO if speaks else logging.DEBUG)
        with SharedStore() as shared:
            stores = Stores(folder, shared, hook.settings.recalibrate)
            plan = _plan(hook.settings)
            served, unserved = _each(
                tasks, lambda task: _served(task, stores, plan, measure or _calibrate)
            )
        problems += [*unmade, *unserved]
        for problem in problems:
            logger.warning(
                "not calibrated this time, the baseline serves it and the next start tries again: "
                "%s",
                problem,
            )
        tables = {key: one.table for key, one in served.items()}
        hook.set_tables(tables)
        hook.end_warm_up(tables, batches.owner)
        if speaks:
            try:
                _report(hook, served, engine)
                for key, one in served.items():
                    _name_file(folder, tasks[key], one)
            # The tables are set: what cannot be said about them must not stop the caller.
            except Exception:
                logger.exception("the tables are set, but not everything about them could be said")
    origins = {key: one.origin for key, one in served.items()}
    return WarmUp(tables, tuple(problems), time.monotonic() - begun, origins)


def _each(
    things: Mapping[CallKey, _T], make: Callable[[_T], _Made]
) -> tuple[dict[CallKey, _Made], list[str]]:
    """What is made of each thing, and a sentence for each that raised: a shape that fails (out of
    memory, no shape we know) costs only itself."""
    made: dict[CallKey, _Made] = {}
    problems: list[str] = []
    for key, thing in things.items():
        try:
            made[key] = make(thing)
        except Exception as error:
            problems.append(f"{key.describe()}: {type(error).__name__}: {error}")
    return made, problems


def _task(hook: AiterHook, wanted: Wanted, engine: str) -> _Task:
    kernel = hook.kernel(wanted.seen, wanted.key, wanted.coverage)
    rule, first = _plan(hook.settings).rule, hook.settings.buckets
    key = key_for(kernel, wanted.coverage, rule, engine=engine, first=first)
    return _Task(wanted, kernel, key)


def _served(task: _Task, stores: Stores, plan: "Plan", measure: Calibrate) -> Served:
    """Measured, and checked, as the seen call was made: in its context, on its device and
    stream."""
    wanted, mask = task.wanted, task.wanted.seen.expert_mask

    def measured(earlier: Evidence | None) -> PolicyTable:
        return wanted.seen.as_called(
            measure, task.kernel, wanted.coverage, plan, expert_mask=mask, earlier=earlier
        )

    earlier = None if wanted.earlier is None else wanted.earlier.evidence
    served = table_for(task.key, stores, measured, plan.budget_s, earlier)
    if served.origin == "measured" and served.table.evidence.starts == 1:
        return served  # each of its candidates was compared just now
    table = wanted.seen.as_called(checked, served.table, task.kernel, mask)
    return replace(served, table=table)


def _plan(settings: Settings) -> "Plan":
    from adaptive_moe.tuning.calibrate import Plan  # imports torch

    return Plan(
        first=settings.buckets, budget_s=settings.budget_s, rule=Rule(margin=settings.margin)
    )


def _calibrate(*args: Any, **kwargs: Any) -> PolicyTable:
    from adaptive_moe.tuning.calibrate import calibrate  # imports torch

    return calibrate(*args, **kwargs)


def _rank() -> int:
    """This rank in torch.distributed. Rank 0 speaks for all."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _wanted(hook: AiterHook, batches: Batches, speaks: bool) -> tuple[list[Wanted], list[str]]:
    """The tables to make, and why others cannot be. Never raises."""
    if not hook.seen and hook.settings.mode is Mode.AUTO and speaks:
        logger.warning(
            "auto has nothing to choose: nothing was sorted through AITER's fused_moe so far (a "
            "dense model, AITER's MoE switched off as by VLLM_ROCM_USE_AITER=0 or "
            "VLLM_ROCM_USE_AITER_MOE=0, or no forward yet)"
        )
    try:
        wanted, problems = coverages(hook, batches)
        refused = _refusal(hook)
    except Exception as error:
        logger.exception("what to calibrate is not known")
        return [], [f"{type(error).__name__}: {error}"]
    if wanted and refused:
        return [], [*problems, refused]
    return wanted, problems


def _refusal(hook: AiterHook) -> str:
    """Why nothing may be measured now, or nothing."""
    if hook.wrapped is None:
        return "adaptive_moe is not active in that process"
    if any(seen.device.type != "cpu" for seen in hook.seen.values()) and _capturing():
        return "the current stream is being captured: warm up before or after capture"
    return ""


def _capturing() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _report(hook: AiterHook, served: Mapping[CallKey, Served], engine: str) -> None:
    """The line of the start, and beneath it each table and its file."""
    settings = hook.settings
    if settings.mode is Mode.FIXED or (hook.tables and not served):
        return  # that was said when it was installed; an earlier warm-up has said it
    continues = any(one.is_kept and continues_later(one.table) for one in served.values())
    tables = [one.table for one in served.values()]
    logger.info("%s", report.start_line(tables, continues=continues))
    for one in served.values():
        lines = report.table_lines(
            one.table,
            measured_now=one.origin == "measured",
            with_counts=settings.log_detail is not LogDetail.SUMMARY,
        )
        logger.info("%s", "\n".join(lines))
    if settings.report and served:
        # Those of earlier warm-ups too: the file is written anew each time.
        request = Request(engine, settings.buckets)
        text = report_text(to_text(request, table) for table in hook.tables.values())
        try:
            replace_file(Path(settings.report), text.encode())
        except OSError as error:
            logger.warning(
                "ADAPTIVE_MOE_REPORT=%s was not written (%s): give a file in a folder that exists "
                "and is writable",
                *(settings.report, error),
            )


def _name_file(folder: Folder, task: _Task, one: Served) -> None:
    """One line: where the table is kept."""
    what = task.wanted.coverage.describe()
    if one.is_kept:
        logger.info("table kept in %s: %s", folder.file(task.key), what)
    else:
        logger.info("table not kept in %s, it serves this process only: %s", folder.path, what)
