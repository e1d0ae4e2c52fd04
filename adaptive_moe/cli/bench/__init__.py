"""adaptive-moe bench: what a person runs to judge a machine; what measures this package itself is
in calibration/.

A bench is a module here with `add_options(parser)`, `run(args) -> dict` of figures, and
`lines(figures)`, the same in words. --json prints the figures, --out keeps them, with machine, date
and versions.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import partial
from importlib import import_module
from typing import Any

from adaptive_moe import __version__
from adaptive_moe.cli import LazyParser, output
from adaptive_moe.report.plot import plot_format

_FLAT = re.compile(r"\[[^\[\]{}]*\]|\{[^\[\]{}]*\}")

# name -> what it measures.
BENCHES = {
    "regret": "time a table loses against measuring everything, on a real kernel",
    "step": "what a table brings a whole model-like step",
    "sorts": "every sort that can run here, side by side",
}


def add_options(parser: LazyParser) -> None:
    """`bench NAME`; only the module of the one asked for is imported."""
    names = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    for name, what in BENCHES.items():
        names.add_parser(name, help=what, description=what).fill = partial(_fill, name)


def run(args: argparse.Namespace) -> int:
    if plot := getattr(args, "plot", None):
        plot_format(plot)
    for path in (args.out, plot):
        if path:
            output.check_place(path)
    module = import_module(f"adaptive_moe.cli.bench.{args.bench}")
    figures = {"bench": args.bench, **module.run(args)}
    text = as_text(figures)
    print(text if args.json else "\n".join(module.lines(figures)))
    if args.out is not None:
        output.write(args.out, (text + "\n").encode("utf-8"))
    return 0


def _fill(name: str, parser: argparse.ArgumentParser) -> None:
    import_module(f"adaptive_moe.cli.bench.{name}").add_options(parser)
    parser.add_argument("--out", metavar="FILE", help="also keep the figures here, as JSON")
    output.add_json(parser)


def as_text(figures: Mapping[str, Any]) -> str:
    """JSON with what is flat on one line: a sweep stays readable, and its diff too."""
    return _FLAT.sub(lambda m: " ".join(m[0].split()), json.dumps(figures, indent=1))


def stamp(device: Any = None, program: str = "adaptive-moe") -> dict[str, Any]:
    """Machine, date, versions and the command: what every committed figure needs beside it."""
    import torch

    from adaptive_moe.policy.environment import describe_environment
    from adaptive_moe.policy.plain import to_plain

    return {
        "command": " ".join([program, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "adaptive_moe": __version__,
        "environment": to_plain(describe_environment(device or torch.device("cpu"))),
    }
