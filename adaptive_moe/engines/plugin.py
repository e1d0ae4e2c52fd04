"""Run a function once a module has been imported, without importing it ourselves.

Plugins are loaded long before an engine imports AITER, and must not pull it (or torch) in.
"""

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

logger = logging.getLogger(__name__)

Action = Callable[[ModuleType], None]


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
            # Taken off the list only now: an import that raised is tried again later.
            with self.lock:
                actions = self.waiting.pop(name, [])
            _run(actions, module)

        try:
            loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]
        except AttributeError:
            logger.warning("module %s cannot be watched: its loader is %r", name, loader)


_finder = _Finder()


def when_imported(name: str, action: Action) -> None:
    """Call `action(module)` once `name` has been imported; now, if it already was.

    An exception of the action is logged and never reaches whoever imports the module.
    """
    module = sys.modules.get(name)
    if module is not None and not _is_initializing(module):
        _run([action], module)
        return
    with _finder.lock:
        _finder.waiting.setdefault(name, []).append(action)
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)


def _is_initializing(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _run(actions: list[Action], module: ModuleType) -> None:
    for action in actions:
        try:
            action(module)
        except Exception:
            logger.exception("adaptive_moe could not prepare %s and leaves it alone", module)
