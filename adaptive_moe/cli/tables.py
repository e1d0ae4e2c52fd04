"""adaptive-moe list, show, explain, plot and page: tables that are kept or were written to a file.

`--table` names them: a folder such as the cache folder, a file of it, an ADAPTIVE_MOE_REPORT, what
`calibrate --output` wrote, part of the name of a stored file, or a model.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adaptive_moe.cli import output
from adaptive_moe.cli.options import UsageError, cache_folder_here
from adaptive_moe.cli.selection import TableFile, all_in, select, start_of
from adaptive_moe.policy.coverage import Situation
from adaptive_moe.policy.savings import savings
from adaptive_moe.report.explain import explain, is_for
from adaptive_moe.report.page import page
from adaptive_moe.report.plot import draw, inline_svg, plot_format
from adaptive_moe.report.text import advice, result_line, settled_words, table_lines
from adaptive_moe.report.words import plural, title_words
from adaptive_moe.store.text import to_text

# list


def options_of_list(parser: argparse.ArgumentParser) -> None:
    _add_table_and_json(parser, "all")


def run_list(args: argparse.Namespace) -> int:
    folder = cache_folder_here()
    selection = all_in(folder) if args.table is None else select(args.table)
    lines = []
    for file in selection.tables:
        settled = f"{settled_words(file.table)}; measured {file.table.evidence.created}"
        lines += [result_line(file.table), f"  {file.describe()}", f"  {settled}"]
        lines.append(f"  {file.path.name}")
    lines += [f"{path.name}: not usable, {why}" for path, why in selection.unusable]
    entries = [_entry(file) for file in selection.tables]
    entries += [
        {"file": str(path), "usable": False, "problem": why} for path, why in selection.unusable
    ]
    plain = {"folder": str(folder), "entries": entries}
    output.report(args, lines or [f"nothing is kept in {folder}"], plain)
    return 0


def _entry(file: TableFile) -> dict[str, Any]:
    table, evidence = file.table, file.table.evidence
    return {
        "file": str(file.path),
        "usable": True,
        "engine": file.engine,
        "title": title_words(evidence.coverage),
        "coverage": asdict(evidence.coverage),
        "kernel": evidence.kernel,
        "environment": asdict(evidence.environment),
        "candidates": evidence.candidates,
        "measured": evidence.created,
        "savings": {situation.value: asdict(savings(table, situation)) for situation in Situation},
        "result": result_line(table),
    }


# show


def options_of_show(parser: argparse.ArgumentParser) -> None:
    _add_table_and_json(parser)


def run_show(args: argparse.Namespace) -> int:
    selection = select(args.table)
    lines = [selection.where]
    for file in selection.tables:
        lines += [*table_lines(file.table, measured_now=False), *advice(file.table), ""]
    # One table is itself, so that its JSON can be read again; several are a report.
    plain = [json.loads(to_text(file.stored.request, file.table)) for file in selection.tables]
    output.report(args, lines[:-1], plain[0] if len(plain) == 1 else plain)
    return 0


# explain


def options_of_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, required=True, help="num_tokens of the batch")
    parser.add_argument("--graph", action="store_true", help="for a call captured into a graph")
    _add_table_and_json(parser)


def run_explain(args: argparse.Namespace) -> int:
    if args.tokens < 1:
        raise UsageError(f"--tokens={args.tokens} is not accepted: give a token count of 1 or more")
    selection = select(args.table)
    lines, plain = [selection.where], []
    # Of the tables of one model each block size has its own counts.
    fitting = [file for file in selection.tables if is_for(file.table, args.tokens)]
    for file in fitting or selection.tables:
        why = explain(file.table, args.tokens, captured=args.graph)
        lines += [file.describe(), *why]
        plain.append(
            {
                "file": str(file.path),
                "num_tokens": args.tokens,
                "captured": args.graph,
                "candidate": file.table.candidate(args.tokens, captured=args.graph),
                "why": why,
            }
        )
    output.report(args, lines, plain[0] if len(plain) == 1 else plain)
    return 0


# plot


def options_of_plot(parser: argparse.ArgumentParser) -> None:
    output.add_output(parser, "the .svg or .png to write", required=True)
    _add_table_and_json(parser)


def run_plot(args: argparse.Namespace) -> int:
    image_format = plot_format(args.output)
    output.check_place(args.output)
    selection = select(args.table)
    paths = _plot_paths(args.output, len(selection.tables))
    for path, file in zip(paths, selection.tables, strict=True):
        output.write(path, draw(file.table, image_format))
    if args.output == output.STDOUT:
        return 0
    lines = [selection.where, *(f"written to {path}" for path in paths)]
    output.report(args, lines, {"source": selection.where, "written": paths})
    return 0


def _plot_paths(path: str, number: int) -> list[str]:
    """A file for each table: times.svg, or times-1.svg and so on."""
    if number == 1:
        return [path]
    if path == output.STDOUT:
        raise UsageError(f"{number} plots do not fit one output: give a file, or one --table")
    place = Path(path)
    return [str(place.with_stem(f"{place.stem}-{n}")) for n in range(1, number + 1)]


# page


def options_of_page(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="FILE", help="the .html to write; - is standard output")
    _add_table_and_json(parser, "all of the newest start")


def run_page(args: argparse.Namespace) -> int:
    output.check_place(args.output)
    selection = select(args.table)
    if args.table is None:
        selection = start_of(selection.tables[0])
    tables = [file.table for file in selection.tables]
    plots, missing = [], None
    try:
        plots = [inline_svg(table, f"plot{number}-") for number, table in enumerate(tables)]
    except ValueError as error:
        missing = str(error)  # the page is worth having without them
    source = f"read from {selection.where}" + (f"; without plots: {missing}" if missing else "")
    output.write(args.output, page(tables, source, plots).encode("utf-8"))
    if args.output != output.STDOUT:
        lines = [source, f"{plural(len(tables), 'table')} written to {args.output}"]
        plain = {"source": selection.where, "written": args.output, "tables": len(tables)}
        output.report(args, lines, {**plain, "plots": len(plots)})
    return 0


def _add_table_and_json(parser: argparse.ArgumentParser, default: str = "the newest") -> None:
    parser.add_argument(
        "--table",
        metavar="WHICH",
        help=f"a folder, a stored or report file, part of a stored name, or a model [{default}]",
    )
    output.add_json(parser)
