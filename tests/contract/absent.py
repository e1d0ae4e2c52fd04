"""Importable emptiness for packages that engines import and that exist for CUDA builds only.

Nothing the contract tests run calls into them; an engine's own modules just name them at import.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any


class _Anything(type):
    """Classes whose attributes are more of the same: enough to be named, subclassed, decorated."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Empty(ModuleType):
    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def make_importable(*packages: str) -> None:
    """Give `import package` an empty module. transformers, which looks at what is really there, is
    made to look first."""
    from transformers.utils.import_utils import is_torchvision_available

    is_torchvision_available()
    sys.meta_path.append(_Finder(packages))


def without_image_processors() -> None:
    """Let them be registered in a transformers that has none, because it looked for torchvision."""
    import transformers

    transformers.AutoImageProcessor = SimpleNamespace(register=lambda *a, **k: None)
