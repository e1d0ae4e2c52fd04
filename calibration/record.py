"""What every bench does: its options, --out, and a stamp of machine, date and versions."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from adaptive_moe import __version__
from adaptive_moe.kernels import KernelUnavailableError

_FLAT = re.compile(r"\[[^\[\]{}]*\]|\{[^\[\]{}]*\}")


def main(
    doc: str | None,
    add_options: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], dict[str, Any]],
) -> None:
    """Run one bench: parse, measure, and print the JSON, or write it where --out says."""
    name = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(
        prog=f"python -m calibration.{name}", description=(doc or "").split("\n", 1)[0]
    )
    parser.add_argument("--out", type=Path, help="write the JSON here")
    add_options(parser)
    args = parser.parse_args()
    try:
        found = run(args)
    except (KernelUnavailableError, ValueError) as error:
        sys.exit(f"{name}: {error}")
    text = as_text({"bench": name.removeprefix("bench_"), **found})
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text + "\n", encoding="utf-8")


def progress(line: str) -> None:
    """One line for the person who waits; the figures alone go to standard output."""
    print(line, file=sys.stderr, flush=True)


def counts(text: str) -> tuple[int, ...]:
    """Token counts of an option, such as 1,64,512."""
    return tuple(sorted({int(word) for word in text.split(",") if word.strip()}))


def as_text(figures: Mapping[str, Any]) -> str:
    """JSON in which a list or object without another one inside is one line."""
    return _FLAT.sub(lambda m: " ".join(m[0].split()), json.dumps(figures, indent=1))


def stamp(device: Any = None) -> dict[str, Any]:
    """Machine, date, versions and the command: what every committed figure needs beside it."""
    import torch

    from adaptive_moe.kernels.environment import describe_environment

    return {
        "command": " ".join([f"python -m calibration.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "adaptive_moe": __version__,
        "environment": asdict(describe_environment(device or torch.device("cpu"))),
    }
