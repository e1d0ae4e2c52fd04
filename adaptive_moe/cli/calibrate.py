"""adaptive-moe calibrate: measure one model's sort, decide, and keep the result in the store."""

import argparse
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adaptive_moe.cli import kernel, options, output
from adaptive_moe.cli.progress import Progress
from adaptive_moe.settings import Settings, parse_buckets, parse_budget, parse_margin, read_settings

if TYPE_CHECKING:
    from adaptive_moe.disk.file import Stored
    from adaptive_moe.policy.table import PolicyTable

# What the store names in place of an engine.
ENGINE = "no engine"


def options_of_calibrate(parser: argparse.ArgumentParser) -> None:
    options.add_shape_options(parser)
    options.add_kernel_options(parser)
    measuring = parser.add_argument_group("how")
    options.add_budget(measuring)
    measuring.add_argument("--margin", help="what the baseline must be beaten by [0.01]")
    measuring.add_argument(
        "--buckets", metavar="N,N", help="token counts measured first [powers of two]"
    )
    measuring.add_argument(
        "--again", action="store_true", help="measure also what is kept and settled already"
    )
    output.add_output(parser, "also write the result here")
    output.add_json(parser)
    parser.add_argument("--verbose", action="store_true", help="also print every sample")


def run_calibrate(args: argparse.Namespace) -> int:
    if args.verbose:
        logging.getLogger("adaptive_moe").setLevel(logging.DEBUG)
    settings = _settings(args)
    if args.output is not None:
        output.check_place(args.output)
    name, why = kernel.choose(args.kernel)
    quiet = args.json or args.output == output.STDOUT
    if name == "cpu" and args.budget is None and not os.environ.get("ADAPTIVE_MOE_BUDGET_S"):
        settings = replace(settings, budget_s=options.CPU_BUDGET_S)
    _say(quiet, f"calibrating {why}")
    return _finish(args, settings, _measure(args, name, settings, quiet=quiet))


def _settings(args: argparse.Namespace) -> Settings:
    """The environment's settings with the options over them. SettingsError."""
    settings = read_settings()
    if args.budget is not None:
        settings = replace(settings, budget_s=parse_budget("--budget", args.budget))
    if args.margin is not None:
        settings = replace(settings, margin=parse_margin("--margin", args.margin))
    if args.buckets is not None:
        settings = replace(settings, buckets=parse_buckets("--buckets", args.buckets))
    return replace(settings, recalibrate=settings.recalibrate or args.again)


def _measure(args: argparse.Namespace, name: str, settings: Settings, *, quiet: bool) -> "Stored":
    """The table of one shape on one kernel; what is kept of it and settled is not measured again.

    It is kept under no engine's name: an engine calls AITER with arguments that only its own start
    shows, so its start measures for itself.
    """
    from adaptive_moe.disk.file import Stored, key_for
    from adaptive_moe.disk.folder import open_store
    from adaptive_moe.policy.decision import Rule
    from adaptive_moe.report.words import calls_words
    from adaptive_moe.tuning.calibrator import Plan, calibrate

    coverage = options.coverage_from(args, on_cpu=name == "cpu")
    on_aiter = name == "aiter"
    sorts = kernel.load_aiter(coverage, settings) if on_aiter else kernel.load(name)
    plan = Plan(settings.buckets, settings.budget_s, Rule(margin=settings.margin))
    _say(quiet, calls_words(coverage))
    key = key_for(sorts, coverage, plan, ENGINE)
    earlier = open_store(settings).load(key)
    with Progress(settings.budget_s, quiet=quiet) as progress:
        table = calibrate(
            *(sorts, coverage, plan),
            earlier=earlier.table.evidence if earlier else None,
            progress=progress,
        )
    return Stored(key.request, table)


def _finish(args: argparse.Namespace, settings: Settings, made: "Stored") -> int:
    """Print first, then keep: what was measured is not lost to a full disk."""
    from adaptive_moe.disk.folder import cache_folder

    text = made.table.to_json() + "\n"
    if args.json:
        print(text, end="")
    elif args.output != output.STDOUT:
        print("\n".join(_lines(made.table)))
    try:
        kept = _keep(made, cache_folder(settings))
    finally:  # a disk that is full here may have room there
        if args.output is not None:
            output.write(args.output, text.encode("utf-8"))
    if not args.json and args.output != output.STDOUT:
        files = [kept, *([args.output] if args.output else [])]
        print("\n".join(f"written to {path}" for path in files))
        print("next: adaptive-moe explain --tokens 24, plot --output times.svg, page start.html")
    return 0


def _keep(stored: "Stored", folder: Path) -> Path:
    """Write it to the store's folder. OSError naming the file; RuntimeError where a candidate
    failed: such a table is measured again."""
    from adaptive_moe.disk.folder import write_file

    path = folder / stored.key.file_name()
    if not stored.table.sound:
        raise RuntimeError(
            f"{path} was not written: a candidate failed or was wrong, as the table says; that may "
            "pass, so the next calibration tries again"
        )
    try:
        write_file(path, stored)
    except OSError as error:
        raise OSError(error.errno, f"not written, {error.strerror}", str(path)) from error
    return path


def _lines(table: "PolicyTable") -> list[str]:
    from adaptive_moe.report.text import advice, bucket_table, headline

    return [headline(table), *bucket_table(table), *advice(table)]


def _say(quiet: bool, line: str) -> None:
    if not quiet:
        print(line, flush=True)
