"""adaptive-moe calibrate: measure one model's sort, decide, and keep the result in the store."""

import argparse
import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from adaptive_moe.cli import kernel, options, output
from adaptive_moe.cli.progress import ProgressBar
from adaptive_moe.settings import Settings, parse_buckets, parse_budget, parse_margin, read_settings

if TYPE_CHECKING:
    from adaptive_moe.policy.table import PolicyTable
    from adaptive_moe.store.key import TableKey

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
    name, why = kernel.pick(args.kernel)
    quiet = args.json or args.output == output.STDOUT
    if name == "cpu" and args.budget is None and not os.environ.get("ADAPTIVE_MOE_BUDGET_S"):
        settings = replace(settings, budget_s=options.CPU_BUDGET_S)
    _say(quiet, f"calibrating {why}")
    key, table = _measure(args, name, settings, quiet=quiet)
    return _finish(args, settings, key, table)


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


def _measure(
    args: argparse.Namespace, name: str, settings: Settings, *, quiet: bool
) -> "tuple[TableKey, PolicyTable]":
    """The table of one shape on one kernel; what is kept of it and settled is not measured again.

    It is kept under no engine's name: an engine calls AITER with arguments that only its own start
    shows, so its start measures for itself.
    """
    from adaptive_moe.cli.thread_clock import thread_clock
    from adaptive_moe.policy.evidence import Rule
    from adaptive_moe.report.words import calls_words
    from adaptive_moe.store.folder import Folder, cache_folder
    from adaptive_moe.store.key import key_for
    from adaptive_moe.tuning.calibrate import Plan, calibrate

    coverage = options.coverage_from(args, on_cpu=name == "cpu")
    on_aiter = name == "aiter"
    sorts = kernel.load_aiter(coverage, settings) if on_aiter else kernel.load(name)
    plan = Plan(settings.buckets, settings.budget_s, Rule(margin=settings.margin))
    _say(quiet, calls_words(coverage))
    if on_aiter and (model := options.model_from(args)) and model.quantisation:
        _say(quiet, options.QUANTISED.format(model.quantisation))
    key = key_for(sorts, coverage, plan.rule, engine=ENGINE, first=plan.first)
    folder = Folder(cache_folder(settings))
    earlier = None if settings.recalibrate else folder.get(key)
    with ProgressBar(settings.budget_s, quiet=quiet) as progress:
        table = calibrate(
            *(sorts, coverage, plan),
            earlier=earlier.evidence if earlier else None,
            clock_factory=thread_clock if name == "cpu" else None,
            progress=progress,
        )
    return key, table


def _finish(
    args: argparse.Namespace, settings: Settings, key: "TableKey", table: "PolicyTable"
) -> int:
    """Print first, then keep: what was measured is not lost to a full disk."""
    from adaptive_moe.store.folder import Folder, cache_folder
    from adaptive_moe.store.text import to_text

    text = to_text(key.request, table)
    if args.json:
        print(text, end="")
    elif args.output != output.STDOUT:
        print("\n".join(_lines(table)))
    path = Folder(cache_folder(settings)).file(key)
    try:
        output.write(str(path), text.encode("utf-8"))
    finally:  # a disk that is full here may have room there
        if args.output is not None:
            output.write(args.output, text.encode("utf-8"))
    if not args.json and args.output != output.STDOUT:
        files = [str(path), *([args.output] if args.output else [])]
        print("\n".join(f"written to {file}" for file in files))
        print("next: adaptive-moe explain --tokens 24, plot --output times.svg, page start.html")
    return 0


def _lines(table: "PolicyTable") -> list[str]:
    from adaptive_moe.report.text import advice, table_lines

    return [*table_lines(table), *advice(table)]


def _say(quiet: bool, line: str) -> None:
    if not quiet:
        print(line, flush=True)
