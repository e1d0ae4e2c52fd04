"""What each adaptive-moe command does; cli.py has their options."""

import json
import logging
import os
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptive_moe.disk.folder import cache_folder
from adaptive_moe.policy.decision import Rule
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.report import text as report
from adaptive_moe.settings import (
    Mode,
    Settings,
    parse_buckets,
    parse_budget,
    parse_margin,
    read_settings,
)

LATEST = "latest.json"


def calibrate(args: Namespace) -> int:
    """Measure, print, and keep the evidence in a file."""
    from adaptive_moe import cli
    from adaptive_moe.kernels import load_kernel
    from adaptive_moe.tuning.calibrator import Plan
    from adaptive_moe.tuning.calibrator import calibrate as measure

    settings = read_settings()
    shape = cli.shape_from(args)
    output = args.output or latest_path(settings)
    _check_writable(output)
    kernel = load_kernel(args.kernel)
    on_cpu = kernel.device.type == "cpu"
    max_tokens = args.max_tokens or (cli.CPU_MAX_TOKENS if on_cpu else cli.GPU_MAX_TOKENS)
    budget = (
        cli.CPU_BUDGET_S
        if on_cpu and "ADAPTIVE_MOE_BUDGET_S" not in os.environ
        else settings.budget_s
    )
    sizes = parse_buckets("--capture-sizes", args.capture_sizes or "")
    plan = Plan(
        max_tokens=max_tokens,
        capture_sizes=sizes or tuple(n for n in cli.CAPTURE_SIZES if n <= max_tokens),
        first=parse_buckets("--buckets", args.buckets) if args.buckets else settings.buckets,
        budget_s=parse_budget("--budget", args.budget) if args.budget else budget,
        rule=Rule(margin=parse_margin("--margin", args.margin) if args.margin else settings.margin),
    )
    if args.verbose:
        logging.getLogger("adaptive_moe").setLevel(logging.DEBUG)
    if not args.json:
        print(f"calibrating {shape.describe()} on {kernel.name}, up to {max_tokens} tokens")
    with _Progress(sys.stderr) as progress:
        table = measure(kernel, shape, plan, progress=progress)
    text = table.to_json()
    output.write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(text)
    else:
        _print_table(table)
        print(f"written to {output}")
    return 0


def show(args: Namespace) -> int:
    table = load_table(args.table)
    if args.json:
        print(table.to_json())
    else:
        print(table.evidence.shape.describe(), "on", table.evidence.kernel)
        _print_table(table)
    return 0


def explain(args: Namespace) -> int:
    table = load_table(args.table)
    policy = table.policy(args.tokens, captured=args.graph)
    lines = report.explain(table, args.tokens, captured=args.graph)
    if args.json:
        print(json.dumps({"num_tokens": args.tokens, "policy": policy, "why": lines}, indent=1))
    else:
        print("\n".join(lines))
    return 0


def plot(args: Namespace) -> int:
    from adaptive_moe.report.plot import draw

    table = load_table(args.table)
    _check_writable(args.output)
    draw(table, args.output)
    written = {"written": str(args.output)}
    print(json.dumps(written) if args.json else f"written to {args.output}")
    return 0


def doctor(args: Namespace) -> int:
    from adaptive_moe.cli.doctor import diagnose

    findings = diagnose(os.environ)
    if args.json:
        print(json.dumps({f.topic: f.text for f in findings}, indent=1))
    else:
        width = max(len(f.topic) for f in findings)
        for finding in findings:
            print(f"{finding.topic.ljust(width)}  {finding.text}")
    return 0


def latest_path(settings: Settings) -> Path:
    """Where `calibrate` leaves its result for show, explain and plot."""
    return cache_folder(settings) / LATEST


def load_table(path: Path | None) -> PolicyTable:
    """The calibration in that file, or the latest; ValueError saying what to do without one."""
    found = path or latest_path(replace(read_settings(), mode=Mode.OFF))
    try:
        return PolicyTable.from_json(found.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{found} does not exist: run `adaptive-moe calibrate` first") from None
    except ValueError as error:
        raise ValueError(f"{found} is not a calibration: {error}") from None


def _print_table(table: PolicyTable) -> None:
    print("\n".join(report.bucket_table(table)))
    print(report.summary(table))


def _check_writable(path: Path) -> None:
    """Before measuring, not after it: nothing measured may be lost to a wrong path."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}): give another --output"
        ) from None


class _Progress:
    """A bar on a terminal, plain lines (a few of them) elsewhere."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.is_terminal = stream.isatty()

    def __enter__(self) -> "_Progress":
        return self

    def __call__(self, done: int, total: int, what: str) -> None:
        if self.is_terminal:
            filled = 30 * done // max(total, 1)
            bar = "#" * filled + "." * (30 - filled)
            self.stream.write(f"\r\x1b[K[{bar}] {done}/{total} {what}")
        else:
            self.stream.write(f"measured {done}/{total}: {what}\n")
        self.stream.flush()

    def __exit__(self, *exc: object) -> None:
        if self.is_terminal:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
