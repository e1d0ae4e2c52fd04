"""The command line as a person runs it: a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHOOSERS = ("VLLM_ROCM_AITER_MOE_DISPATCH_POLICY", "ADAPTIVE_MOE_DISPATCH_POLICY")
SHAPE = ("--experts", "8", "--topk", "2", "--hidden", "64", "--kernel", "cpu")
SMALL = (*SHAPE, "--max-tokens", "32", "--budget", "1.5")


def environment(cache: Path, **variables: str) -> dict[str, str]:
    environ = {k: v for k, v in os.environ.items() if k not in CHOOSERS}
    environ |= {"ADAPTIVE_MOE_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), **variables}
    return environ


def run(*arguments: str, cache: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "adaptive_moe", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment(cache, **variables),
    )
