"""The one hook of this process: what `adaptive_moe.install()` and the engine plugins share."""

import functools
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING

from adaptive_moe.engines.counters import Counters, Counts
from adaptive_moe.engines.hook import AiterHook
from adaptive_moe.engines.on_import import when_imported
from adaptive_moe.engines.warm_up import WarmUp
from adaptive_moe.engines.warm_up import warm_up as warm_up_hook
from adaptive_moe.kernels.aiter import MODULE, find_aiter
from adaptive_moe.ranks.agreement import open_channel
from adaptive_moe.settings import Mode, Settings, SettingsError, read_settings

if TYPE_CHECKING:
    import torch.distributed as dist

logger = logging.getLogger("adaptive_moe")

_lock = threading.RLock()
_hook: AiterHook | None = None
_wanted = False


def install(settings: Settings | None = None, *, engine_policy: int = 0) -> bool:
    """Choose AITER's sorting policy in this process from now on; False where there is no AITER.

    Wraps the seam now where `aiter.fused_moe` is imported, else as soon as it is; AITER itself is
    not imported. Without `settings` the environment decides, and no variable set means `auto`.
    engine_policy is what the engine passes when its user chose nothing, if that is not 0.
    Installing again with the same settings changes nothing. Raises SettingsError.
    """
    global _hook, _wanted  # noqa: PLW0603
    found = find_aiter()
    if found.problem is not None:
        logger.warning("nothing is changed: %s", found.problem)
        return False
    settings = settings or _settings_or_auto()
    with _lock:
        if _hook is not None and (_hook.settings, _hook.engine_policy) != (settings, engine_policy):
            _hook.uninstall()
            _hook = None
        _hook = _hook or AiterHook(settings, engine_policy=engine_policy)
        _wanted = True
    when_imported(MODULE, _install)
    return True


def uninstall() -> None:
    """AITER as it was, now and when it is imported later. Tables are kept for another install()."""
    global _wanted  # noqa: PLW0603
    with _lock:
        _wanted = False
        if _hook is not None:
            _hook.uninstall()


def warm_up(
    max_tokens: int,
    capture_sizes: Sequence[int] = (),
    *,
    agree: "bool | dist.ProcessGroup" = False,
) -> WarmUp:
    """Calibrate every shape seen since install(), for batches up to max_tokens; call it after a
    first forward and before capturing the sizes named. See engines/warm_up.py.

    agree: end with the same tables as all ranks of torch.distributed, or as those of one group.
    Every one of them must then call this equally often; the others wait for one that does not, up
    to three minutes, and then run without tables. A rank that has nothing to calibrate calls it
    too, even without AITER.
    """
    connect = None
    if agree is not False:
        connect = functools.partial(open_channel, None if agree is True else agree)
    # Without install() there is nothing to measure, but other ranks may wait.
    hook = current() or AiterHook(Settings())
    return warm_up_hook(hook, max_tokens, capture_sizes, connect=connect)


def counts() -> Counts:
    """What happened to the calls at the seam so far."""
    hook = current()
    return Counters().read() if hook is None else hook.counts()


def current() -> AiterHook | None:
    """The hook, whether or not AITER has been imported yet; None before the first install()."""
    return _hook


def _install(module: ModuleType) -> None:
    with _lock:
        if _wanted and _hook is not None:
            _hook.install(module)


def asked_for() -> Settings | None:
    """What the environment asks a plugin for; None for nothing, and for nonsense, which is said."""
    try:
        settings = read_settings(os.environ)
    except SettingsError as error:
        logger.error("%s", error)
        return None
    return None if settings.mode is Mode.OFF else settings


def _settings_or_auto() -> Settings:
    settings = read_settings(os.environ)
    return replace(settings, mode=Mode.AUTO) if settings.mode is Mode.OFF else settings
