"""Import the stand-in as `aiter`, as the version asked for, fresh in this process."""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent
VERSIONS = ("v0.1.5", "v0.1.9", "main", "september")


def load_aiter(version: str = "september") -> ModuleType:
    """`aiter.fused_moe` of the stand-in. Modules of an earlier version are forgotten first."""
    forget_aiter()
    os.environ["AITER_STANDIN"] = version
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    importlib.invalidate_caches()
    return importlib.import_module("aiter.fused_moe")


def forget_aiter() -> None:
    for name in [n for n in sys.modules if n == "aiter" or n.startswith("aiter.")]:
        del sys.modules[name]
