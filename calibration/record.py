"""What every script here that measures ourselves does: its options, --out, and a stamp."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from adaptive_moe import __version__

_FLAT = re.compile(r"\[[^\[\]{}]*\]|\{[^\[\]{}]*\}")


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
    text = as_text({"bench": name.removeprefix("bench_"), **run(args)})
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def as_text(result: dict[str, Any]) -> str:
    """JSON with what is flat on one line: a sweep stays readable, and its diff too."""
    return _FLAT.sub(lambda m: " ".join(m[0].split()), json.dumps(result, indent=1))


def stamp(device: Any = None) -> dict[str, Any]:
    """Machine, date, versions and the command: what every committed figure needs beside it."""
    import torch

    from adaptive_moe.policy.environment import describe_environment
    from adaptive_moe.policy.plain import to_plain

    return {
        "command": " ".join(["python", f"calibration/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "adaptive_moe": __version__,
        "environment": to_plain(describe_environment(device or torch.device("cpu"))),
    }
