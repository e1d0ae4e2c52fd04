"""adaptive-moe bench: measurements of ourselves, as JSON with machine, date and versions."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

from adaptive_moe import __version__

FLAT_LIST = re.compile(r"\[[^\[\]{}]*\]")

# name -> what it measures; each is a module here with `add_options(parser)` and `run(args)`.
BENCHES = {
    "regret": "time lost against an exhaustive oracle, on a real kernel",
    "hook": "what the hook adds to a call of AITER's seam",
}


def add_bench_parser(sub: Any) -> None:
    """`bench NAME`, with --out for the JSON file."""
    bench = sub.add_parser("bench", help="measure ourselves; JSON on standard output")
    names = bench.add_subparsers(dest="bench", required=True)
    for name, what in BENCHES.items():
        parser = names.add_parser(name, help=what)
        parser.add_argument("--out", type=Path, help="also write the JSON here")
        module = import_module(f"adaptive_moe.cli.bench.{name}")
        module.add_options(parser)
        parser.set_defaults(run=_runner(name, module.run))


def stamp(device: Any = None) -> dict[str, Any]:
    """Machine, date, versions and the command: what every committed figure needs beside it."""
    import torch

    from adaptive_moe.policy.environment import describe_environment
    from adaptive_moe.policy.plain import to_plain

    return {
        "command": " ".join(["adaptive-moe", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "adaptive_moe": __version__,
        "environment": to_plain(describe_environment(device or torch.device("cpu"))),
    }


def _runner(name: str, run: Callable[[argparse.Namespace], dict[str, Any]]) -> Any:
    def command(args: argparse.Namespace) -> int:
        result = {"bench": name, **run(args)}
        # Flat lists on one line: a sweep stays readable, and its diff too.
        text = FLAT_LIST.sub(lambda m: " ".join(m[0].split()), json.dumps(result, indent=1))
        if args.out is not None:
            args.out.write_text(text + "\n", encoding="utf-8")
        print(text)
        return 0

    return command
