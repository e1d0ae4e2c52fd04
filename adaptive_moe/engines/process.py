"""The one hook of this process: what `adaptive_moe.install()` and the engine plugins share."""

import logging
import multiprocessing
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import metadata
from numbers import Integral
from types import ModuleType

from adaptive_moe import VLLM_VARIABLE
from adaptive_moe.engines import plugin
from adaptive_moe.engines.wanted import Batches
from adaptive_moe.engines.warm_up import WarmUp, warm_up_hook
from adaptive_moe.hook.counters import Counters, Counts
from adaptive_moe.hook.hook import AiterHook
from adaptive_moe.kernels.aiter import MODULE, find_aiter
from adaptive_moe.settings import (
    NEUTRAL_VARIABLE,
    OFF,
    Mode,
    Settings,
    read_for_serving,
)

logger = logging.getLogger("adaptive_moe")

PLAIN = "plain"

_lock = threading.RLock()
_hook: AiterHook | None = None
_engine = PLAIN
_installed = False
_said: set[str] = set()


def install(
    settings: Settings | None = None, *, engine_policy: int = 0, engine: str = PLAIN
) -> bool:
    """Choose AITER's sort in this process from now on; False, with a line that says why, where
    nothing will be chosen.

    Wraps the seam now where `aiter.fused_moe` is imported, else as soon as it is; AITER itself is
    not imported. Installing again with the same settings changes nothing.

    Args:
        settings: by default what the environment says, and `auto` where it says nothing.
        engine_policy: what the engine passes when its user chose nothing, if that is not 0.
        engine: its name and version, a part of what a stored table is good for.
    """
    global _hook, _installed, _engine  # noqa: PLW0603
    if not isinstance(settings, Settings | None):
        raise ValueError(f"settings={settings!r} is not accepted: give adaptive_moe.Settings(...)")
    found = find_aiter()
    if found.problem is not None:
        logger.warning("nothing is changed: %s", found.problem)
        return False
    settings = settings or _settings_or_auto()
    if settings.mode is Mode.OFF:
        logger.warning("nothing is changed: the environment switches adaptive_moe off")
        return False
    with _lock:
        if _hook is not None and (_hook.settings, _hook.engine_policy) != (settings, engine_policy):
            _hook.uninstall()
            _hook = None
        _hook = _hook or AiterHook(settings, engine_policy=engine_policy)
        _engine, _installed = engine, True
    if settings.mode is Mode.FIXED:
        _say_fixed(settings)
    plugin.when_imported(MODULE, _install)
    return True


def uninstall() -> None:
    """AITER as it was, now and when it is imported later. Tables are kept for another install()."""
    global _installed  # noqa: PLW0603
    with _lock:
        _installed = False
        if _hook is not None:
            _hook.uninstall()


def warm_up(
    max_tokens: int,
    capture_sizes: Sequence[int] = (),
    *,
    busy_from: int | None = None,
    padding_rows: bool = False,
) -> WarmUp:
    """Calibrate every shape seen since install(), for batches up to max_tokens; call it after a
    first forward and before capturing the sizes named. Call it again for larger batches or other
    sizes: the tables grow. Ranks of torch.distributed share their tables, and none waits for
    another.

    Args:
        max_tokens: the largest batch to expect, in tokens.
        capture_sizes: token counts that will be captured into graphs.
        busy_from: from so many tokens on, eager calls meet a busy device (1: always). By default
            above the largest captured size, or from 2,048 on where nothing is captured.
        padding_rows: may rows of topk_ids be -1?

    Returns what was set, and a sentence for each shape that has no table. Raises ValueError for a
    token count that is none.
    """
    if not isinstance(capture_sizes, Iterable):
        raise ValueError(
            f"capture_sizes={capture_sizes!r} is not accepted: give token counts such as [1, 8]"
        )
    sizes = tuple(capture_sizes)
    counts = [("max_tokens", max_tokens), *(("capture_sizes", size) for size in sizes)]
    for name, count in [*counts, *([] if busy_from is None else [("busy_from", busy_from)])]:
        if not isinstance(count, Integral) or int(count) < 1:
            raise ValueError(f"{name}={count!r} is not accepted: give 1 or more whole tokens")
    return warm_up_for(Batches(max_tokens, sizes, busy_from=busy_from, padding_rows=padding_rows))


def warm_up_for(batches: Batches) -> WarmUp:
    """`warm_up`, for plugins: they also say what only an engine knows of its batches."""
    return warm_up_hook(current() or AiterHook(Settings()), batches, engine=_engine)


def counts() -> Counts:
    """What happened to the calls at the seam so far."""
    hook = current()
    return Counters().read() if hook is None else hook.counts()


def current() -> AiterHook | None:
    """The hook, whether or not AITER has been imported yet; None before the first install()."""
    return _hook


def asked_for() -> Settings | None:
    """What the environment asks a plugin for; None for nothing. What it cannot mean is said once,
    by an engine's first process."""
    settings = _read_settings(speaks=is_first_process())
    return None if settings.mode is Mode.OFF else settings


def named(engine: str) -> str:
    """Name and version of an installed engine."""
    try:
        return f"{engine} {metadata.version(engine)}"
    except metadata.PackageNotFoundError:  # run from its sources
        return f"{engine} (version unknown)"


def is_first_process() -> bool:
    """Not one that multiprocessing started: engines load plugins in all of theirs."""
    return multiprocessing.parent_process() is None


def _after_fork() -> None:
    """In the child: another thread of the parent may have held a lock, and is not there to give it
    back."""
    global _lock  # noqa: PLW0603
    _lock = threading.RLock()
    plugin.renew_lock()
    if _hook is not None:
        _hook.renew_locks()


os.register_at_fork(after_in_child=_after_fork)


def _say_fixed(settings: Settings) -> None:
    """The one line of a start with a fixed policy, in the engine's first process."""
    from adaptive_moe.report.text import fixed_line

    policy = settings.fixed_policy or 0
    names = (VLLM_VARIABLE, NEUTRAL_VARIABLE)
    asking = [f"{n}={value}" for n in names if (value := os.environ.get(n, "").strip())]
    line = fixed_line(policy, asking[0] if asking else "install()")
    if is_first_process() and line not in _said:
        _said.add(line)
        logger.info("%s", line)


def _install(module: ModuleType) -> None:
    with _lock:
        if _installed and _hook is not None:
            _hook.install(module)


def _settings_or_auto() -> Settings:
    settings = _read_settings(speaks=True)
    words = (os.environ.get(name, "").strip().lower() for name in (VLLM_VARIABLE, NEUTRAL_VARIABLE))
    if settings.mode is Mode.OFF and not any(word in OFF for word in words):
        return replace(settings, mode=Mode.AUTO)
    return settings


def _read_settings(*, speaks: bool) -> Settings:
    settings, problems = read_for_serving(os.environ)
    for problem in problems:
        if speaks and problem not in _said:
            _said.add(problem)
            logger.warning("%s", problem)
    return settings
