"""The hook of an earlier commit beside today's, in one process. It knows the layout of the package
up to November 2026 (engines/aiter_hook.py), which is what there is to compare with.
"""

import importlib
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from adaptive_moe.kernels.aiter import SEAM

CHECKOUT = Path(__file__).resolve().parent.parent


@contextmanager
def hook_of(commit: str, seam: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The seam behind the hook of a commit, with a policy from its table. Its package comes from
    git, under another name."""
    name = "adaptive_moe_before"
    packed = subprocess.run(
        ["git", "archive", commit, "adaptive_moe"], cwd=CHECKOUT, capture_output=True, check=True
    )
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
            archive.extractall(folder, filter="data")
        (Path(folder) / "adaptive_moe").rename(Path(folder) / name)
        for file in Path(folder).rglob("*.py"):
            text = file.read_text("utf-8")
            file.write_text(re.sub(r"\badaptive_moe\b(?=[. ])", name, text), "utf-8")
        sys.path.insert(0, folder)
        try:
            hooks = importlib.import_module(f"{name}.engines.aiter_hook")
            settings = importlib.import_module(f"{name}.settings")
            table_of = importlib.import_module(f"{name}.bench.lookup").table_of
        finally:
            sys.path.remove(folder)
        module = ModuleType("aiter.fused_moe")
        setattr(module, SEAM, seam)
        hook = hooks.AiterHook(settings.Settings(mode=settings.Mode.AUTO))
        hook.install(module)
        key = hooks.Key(256, 8, 7168, torch.bfloat16, 32, False, False, True)
        hook.set_tables({key: table_of(10)})
        yield getattr(module, SEAM)
