"""adaptive-moe page FILE.html: everything of a start on one page."""

import argparse

from adaptive_moe.cli import output
from adaptive_moe.cli.source import add_table, start_of
from adaptive_moe.report.page import page
from adaptive_moe.report.plot import inline_svg
from adaptive_moe.report.words import plural


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="FILE", help="the .html to write; - is standard output")
    add_table(parser)
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    output.check_place(args.output)
    sources = start_of(args)
    tables = [found.table for found in sources.tables]
    plots, missing = [], None
    try:
        plots = [inline_svg(table, f"plot{number}-") for number, table in enumerate(tables)]
    except ValueError as error:
        missing = str(error)  # the page is worth having without them
    source = f"read from {sources.where}" + (f"; without plots: {missing}" if missing else "")
    output.write(args.output, page(tables, source, plots).encode("utf-8"))
    if args.output != output.STDOUT:
        lines = [source, f"{plural(len(tables), 'table')} written to {args.output}"]
        plain = {"source": sources.where, "written": args.output, "tables": len(tables)}
        output.report(args, lines, {**plain, "plots": len(plots)})
    return 0
