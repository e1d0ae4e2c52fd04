"""A function of AITER's put behind a wrapper, and taken out again."""

import functools
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from adaptive_moe.hook.entries import Entries
from adaptive_moe.kernels.aiter import CHOOSER, SEAM

# How AITER's chooser was called: args and kwargs.
ConfigArguments = tuple[tuple[Any, ...], dict[str, Any]]


class WrappedModule:
    """One wrapper around the seam of one module, and one around its chooser of block sizes, which
    leaves behind in `latest_config` how it was called. Inactive, both only pass calls on.

    entries: what becomes of calls, by key; empty while inactive
    passed: counts a call with nothing to choose; does nothing while inactive
    names: the parameters that the wrapper binds
    device: the only one that this process sees, as get_device() calls it; None where there are
        several, and each call is asked
    is_capturing: says whether the current stream is being captured into a graph; torch's by default
    """

    def __init__(
        self,
        module: ModuleType,
        passed: Callable[[], int],
        is_capturing: Callable[[], bool] | None = None,
    ) -> None:
        self.module = module
        self.seam: Callable[..., Any] = getattr(module, SEAM)
        self.chooser: Callable[..., Any] | None = getattr(module, CHOOSER, None)
        self.device = _only_device()
        self.is_capturing = is_capturing or capture_query()
        self.names: tuple[str, ...] = ()
        self.wrapper = self.seam
        self._passed = passed
        self._thread = threading.local()
        self._watcher = None if self.chooser is None else _watch(self.chooser, self._thread)
        self.set_active(True)

    def set_active(self, active: bool) -> None:
        """Switch choosing on or off; what is chosen comes with `entries`."""
        self.active = active
        self.entries = Entries({})
        self.passed: Callable[[], object] = self._passed if active else bool

    @property
    def latest_config(self) -> ConfigArguments | None:
        """How this thread called AITER's chooser last; None where it did not."""
        return getattr(self._thread, "config", None)

    def put(self, wrapper: Callable[..., Any]) -> None:
        self.wrapper = wrapper
        setattr(self.module, SEAM, wrapper)
        if self._watcher is not None:
            setattr(self.module, CHOOSER, self._watcher)

    def take_out(self) -> bool:
        """Put back what was there; False where another tool wrapped us since, and keeps its wrapper
        and us, passive, below it."""
        self.set_active(False)
        if self._watcher is not None and getattr(self.module, CHOOSER, None) is self._watcher:
            setattr(self.module, CHOOSER, self.chooser)
        if getattr(self.module, SEAM, None) is not self.wrapper:
            return False
        setattr(self.module, SEAM, self.seam)
        return True

    def is_reached_from(self, module: ModuleType) -> bool:
        """Is this wrapper certainly below `module.moe_sorting`, whatever wrapped it since?

        Wrappers that hide what they wrap cannot be seen through. A wrapper below such a one is left
        passive, and a new one goes on top.
        """
        function = getattr(module, SEAM, None)
        while function is not None:
            if function is self.wrapper:
                return module is self.module
            function = getattr(function, "__wrapped__", None)
        return False


def _only_device() -> int | None:
    import torch

    return {0: -1, 1: 0}.get(torch.cuda.device_count())


def capture_query() -> Callable[[], bool]:
    """torch's own answer. A torch built for the CPU has none, and never captures."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return lambda: False
    return torch.cuda.is_current_stream_capturing


def _watch(chooser: Callable[..., Any], thread: threading.local) -> Callable[..., Any]:
    @functools.wraps(chooser)
    def get_2stage_cfgs(*args: Any, **kwargs: Any) -> Any:
        thread.config = (args, kwargs)
        return chooser(*args, **kwargs)

    for name in ("cache_clear", "cache_info"):  # it is an lru_cache, and AITER's tuner clears it
        if hasattr(chooser, name):
            setattr(get_2stage_cfgs, name, getattr(chooser, name))
    return get_2stage_cfgs
