"""What a running process says of itself: a line after capture, and its status file."""

import atexit
import logging
from dataclasses import asdict, dataclass, field, replace

from adaptive_moe.disk import status
from adaptive_moe.disk.folder import cache_folder
from adaptive_moe.engines.hook import AiterHook
from adaptive_moe.engines.key import Key
from adaptive_moe.engines.others import rank_and_size
from adaptive_moe.engines.warm_up import WarmUp
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.report import text as report

logger = logging.getLogger("adaptive_moe")


@dataclass
class _Told:
    """What this process's file says, apart from what is counted when it is written."""

    hook: AiterHook
    engine: str
    origins: dict[Key, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


_told: _Told | None = None


def after_warm_up(hook: AiterHook, engine: str, made: WarmUp, *, captures_next: bool) -> None:
    """Write the status file, now and once more at exit. captures_next: count captured calls from
    here to after_capture()."""
    global _told  # noqa: PLW0603
    if _told is None:
        atexit.register(_write, "exit")
        status.read_all(cache_folder(hook.settings))  # removes what others left behind
    if _told is None or _told.hook is not hook:
        _told = _Told(hook, engine)
    _told.origins.update(made.origins)
    _told.problems = made.problems
    if captures_next:
        hook.watch_captures(True)
    _write("warm-up")


def after_capture() -> None:
    """One line on rank 0: how many captured calls took which candidate."""
    if _told is None:
        return
    _told.hook.watch_captures(False)
    found = _told.hook.captured()
    if found and rank_and_size()[0] == 0:
        words = ", ".join(f"{count:,} calls of {name}" for name, count in found.items())
        logger.info("the graphs hold %s", words)
    _write("capture")


def _write(moment: str) -> None:
    """A status that cannot be told costs one line at DEBUG."""
    if _told is None:
        return
    try:
        status.write(cache_folder(_told.hook.settings), _status(_told), moment)
    except Exception as error:
        logger.debug("the status file was not written: %r", error)


def _status(told: _Told) -> status.ProcessStatus:
    hook = told.hook
    return replace(
        status.here(told.engine, *rank_and_size(), hook.settings.mode.value),
        tables=tuple(_table(t, told.origins.get(key, "")) for key, t in hook.tables.items()),
        problems=told.problems,
        calls=tuple(asdict(hook.counts()).items()),
        captured=tuple(hook.captured().items()),
    )


def _table(table: PolicyTable, origin: str) -> status.TableStatus:
    found = table.evidence
    return status.TableStatus(
        calls=found.coverage.describe(),
        kernel=found.kernel,
        device=found.environment.device,
        origin=origin,
        measured=found.created,
        decided=report.summary(table),
        settled=table.settled,
    )
