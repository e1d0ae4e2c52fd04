"""What the engines' plugins are made of.

They are loaded in every process of their engine, asked for or not, long before it imports AITER or
torch: so neither this module nor theirs imports more than the standard library.

    start          what an entry point does: nothing where no variable of ours is set; never raises
    safely         a warm-up in the midst of that start, which goes on whatever comes of it
    when_imported  wait for one of the engine's modules, without importing it ourselves
    wrap           put something of ours around one of the engine's functions
"""

import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from adaptive_moe import PREFIX, VLLM_VARIABLE

logger = logging.getLogger("adaptive_moe")

Action = Callable[[ModuleType], None]
Function = Callable[..., Any]


def start(register: Callable[[], None], engine: str) -> None:
    """Run it where any variable of ours is set; where one only looks like ours, say so. Never
    raises: without us the engine starts as it would have."""
    names = [name for name in os.environ if os.environ[name]]
    is_set = any(name == VLLM_VARIABLE or name.startswith(PREFIX) for name in names)
    if not (is_set or any("DISPATCH_POL" in n or n.startswith("ADAPTIVE") for n in names)):
        return
    try:
        if is_set:
            register()
        else:
            _say_misspelt()
    except Exception:
        logger.exception("adaptive_moe could not start; %s goes on without it", engine)


def _say_misspelt() -> None:
    """In the engine's first process alone: plugins are loaded in all of them."""
    import multiprocessing

    from adaptive_moe.settings import misspelt

    if multiprocessing.parent_process() is None:
        for sentence in misspelt():
            logger.warning("%s", sentence)


def safely(warm_up: Callable[..., None], *arguments: Any) -> None:
    """Run it. What it raises is logged and never reaches the engine."""
    failed = "warm-up failed; the baseline stays for what has no table"
    try:
        warm_up(*arguments)
    except Exception:
        logger.exception(failed)
    except SystemExit as error:
        from adaptive_moe.kernels.aiter import is_failure

        if not is_failure(error):
            raise
        logger.exception(failed)


def wrap(owner: Any, name: str, around: Callable[[Function], Function]) -> bool:
    """Put around(it) in place of the function `owner.name`; once, as plugins may be loaded twice.
    False where there is none."""
    original = getattr(owner, name, None)
    if original is None:
        return False
    if not hasattr(original, "wrapped_by_adaptive_moe"):
        wrapper = functools.wraps(original)(around(original))
        wrapper.wrapped_by_adaptive_moe = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapper)
    return True


def when_imported(name: str, action: Action) -> None:
    """Call `action(module)` each time `name` has been loaded: now, if it already was, and again
    whenever importlib.reload puts new functions into it.

    An exception of the action is logged and never reaches the importer of the module.
    """
    with _finder.lock:
        actions = _finder.waiting.setdefault(name, [])
        if action not in actions:
            actions.append(action)
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
    module = sys.modules.get(name)
    if module is not None and not _is_initializing(module):
        _run([action], module)


def renew_lock() -> None:
    """In a child that was forked: a lock that no thread holds."""
    _finder.lock = threading.Lock()


class _Finder:
    """First on sys.meta_path; finds nothing itself, and asks the others for the modules waited for.

    The loader those return is a fresh object for each module, so shadowing its exec_module touches
    no other import, and `module.__loader__` stays what tools expect to see.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, list[Action]] = {}
        self.lock = threading.Lock()

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                self._run_after_exec(name, spec)
                return spec
        return None

    def _run_after_exec(self, name: str, spec: ModuleSpec) -> None:
        loader = spec.loader
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if sys.modules.get(name) is module:
                _run(list(self.waiting.get(name, ())), module)

        try:
            loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]
        except AttributeError:
            logger.warning("module %s cannot be watched: its loader is %r", name, loader)


_finder = _Finder()


def _is_initializing(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _run(actions: list[Action], module: ModuleType) -> None:
    for action in actions:
        try:
            action(module)
        except Exception:
            logger.exception("adaptive_moe could not prepare %s and leaves it alone", module)
