"""Everything worth knowing of an MI300X or MI355X, as one JSON file to send back.

    make bench-amd                        # or, where torch and AITER live in another Python:
    make bench-amd GPU_PYTHON=/opt/venv/bin/python

What is here, calibrations of a few models on the live AITER, and the benches: each in a process of
its own, so that a kernel that faults costs its own part alone. The file is named after the GPU and
the day, and calibration/results/ can hold it as it is. docs/bench-amd.md says what is in it, and
how long it takes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adaptive_moe.kernels.aiter import find_aiter
from calibration.record import as_text, stamp

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
MODELS = "deepseek-v3-fused,kimi-k2-fused,qwen3-235b,gpt-oss-120b,mixtral-8x7b"
# Of a part that hangs: the others still count.
LIMIT_S = 1800
# The end of what a part said, kept where it failed.
SAID = 4000


def main() -> int:
    """0 where every part gave its figures, 1 where one did not; the file is written either way. 2
    where there is no AITER to measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", default=MODELS, help=f"known models [{MODELS}]")
    parser.add_argument("--kernel", default="aiter", help="another is a rehearsal [aiter]")
    parser.add_argument("--quick", action="store_true", help="seconds, with figures of no worth")
    parser.add_argument("--out", type=Path, help="a file, instead of one in calibration/results/")
    args = parser.parse_args()
    problem = find_aiter().problem
    if args.kernel == "aiter" and problem is not None:
        print(
            f"bench_amd: {problem}: run it with the Python that has AITER, as in "
            "make bench-amd GPU_PYTHON=/opt/venv/bin/python",
            file=sys.stderr,
        )
        return 2
    found: dict[str, Any] = {"bench": "amd", **stamp(_device()), "quick": args.quick, "parts": {}}
    path = (
        args.out
        or RESULTS / f"amd_{slug(found['environment']['device'])}_{found['date'][:10]}.json"
    )
    with tempfile.TemporaryDirectory(prefix="adaptive-moe-") as store:
        for name, words in parts(args.kernel, args.models, quick=args.quick):
            print(f"{name} ...", file=sys.stderr, flush=True)
            found["parts"][name] = part = run(words, {"ADAPTIVE_MOE_CACHE_DIR": store})
            ended = "done" if "result" in part else f"FAILED: {part['said'][-200:]}"
            print(f"{name}: {ended}, {part['seconds']} s", file=sys.stderr, flush=True)
            path.write_text(as_text(found) + "\n", encoding="utf-8")
    print(f"written to {path}: please send it back, and thank you")
    return 0 if all("result" in part for part in found["parts"].values()) else 1


def parts(kernel: str, models: str, *, quick: bool) -> Iterator[tuple[str, list[str]]]:
    """name -> the words after `python -m` that print its figures as JSON."""
    yield "doctor", ["adaptive_moe", "doctor", "--json"]
    small = ["--max-tokens", "64", "--budget", "0.3"] if quick else []
    for model in models.split(","):
        words = ["--kernel", kernel, "--json", "--model", model, "--again", *small]
        yield f"calibrate {model}", ["adaptive_moe", "calibrate", *words]
    small = ["--eager", "1,16", "--captured", "1,16", "--layers", "1", "--budget", "0.3"]
    yield "step", bench("step", kernel, "--models", models, quick=quick, small=small)
    small = ["--counts", "1,16"]
    yield "sorts", bench("sorts", kernel, "--models", models, quick=quick, small=small)
    first = models.split(",", 1)[0]
    small = ["--buckets", "5", "--repeats", "2", "--max-tokens", "16", "--budget", "0.3"]
    yield "noise", bench("noise", kernel, "--models", first, quick=quick, small=small)
    small = ["--counts", "4", "--layers", "1", "--calls", "50"]
    yield "hook", bench("hook", kernel, "--model", first, quick=quick, small=small)


def bench(name: str, kernel: str, *words: str, quick: bool, small: list[str]) -> list[str]:
    some = [*small, "--seconds", "0.02"] if quick else []
    return [f"calibration.{name}", "--kernel", kernel, *words, *some]


def run(words: list[str], variables: dict[str, str]) -> dict[str, Any]:
    """One command in a process of its own: its JSON as `result`, or what it `said`."""
    begun = time.monotonic()
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    part: dict[str, Any] = {"command": " ".join(["python -m", *words])}
    try:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            env={**os.environ, "PYTHONPATH": path, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )
        part["exit"], text, said = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        part["exit"], text, said = None, "", f"{_text(late.stderr)}\nstill running: {late}"
    part["seconds"] = round(time.monotonic() - begun, 1)
    try:
        part["result"] = json.loads(text)
    except ValueError:
        part["said"] = (said + text).strip()[-SAID:]
    return part


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def slug(device: str) -> str:
    """AMD Instinct MI300X -> mi300x; other devices whole, in letters, digits and underscores."""
    short = re.sub(r"(?i)\b(amd|nvidia|intel|instinct|\(r\))\b", " ", device)
    return re.sub(r"[^a-z0-9]+", "_", short.lower()).strip("_") or "unknown"


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    sys.exit(main())
