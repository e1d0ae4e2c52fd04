"""What every script here that measures ourselves does: its options, --out, and a stamp."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adaptive_moe.cli import bench
from adaptive_moe.cli.bench import as_text
from adaptive_moe.kernels import KernelUnavailableError


def main(
    doc: str | None,
    add_options: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], dict[str, Any]],
) -> None:
    """Run one script: parse, measure, print the JSON, and write it where --out says."""
    name = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    add_options(parser)
    args = parser.parse_args()
    try:
        found = run(args)
    except KernelUnavailableError as error:
        sys.exit(f"{name}: {error}")
    text = as_text({"bench": name.removeprefix("bench_"), **found})
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def stamp(device: Any = None) -> dict[str, Any]:
    """Machine, date, versions and the command: what every committed figure needs beside it."""
    return bench.stamp(device, f"python calibration/{Path(sys.argv[0]).name}")
