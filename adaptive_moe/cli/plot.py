"""adaptive-moe plot: time against tokens, as .svg or .png."""

import argparse
from pathlib import Path

from adaptive_moe.cli import output
from adaptive_moe.cli.options import UsageError
from adaptive_moe.cli.source import add_table, tables_of
from adaptive_moe.report.plot import draw, plot_format


def add_options(parser: argparse.ArgumentParser) -> None:
    output.add_output(parser, "the .svg or .png to write", required=True)
    add_table(parser)
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    image_format = plot_format(args.output)
    output.check_place(args.output)
    sources = tables_of(args)
    paths = _paths(args.output, len(sources.tables))
    for path, found in zip(paths, sources.tables, strict=True):
        output.write(path, draw(found.table, image_format))
    if args.output == output.STDOUT:
        return 0
    lines = [sources.where, *(f"written to {path}" for path in paths)]
    output.report(args, lines, {"source": sources.where, "written": paths})
    return 0


def _paths(path: str, number: int) -> list[str]:
    """One file a table: times.svg, or times-1.svg and so on."""
    if number == 1:
        return [path]
    if path == output.STDOUT:
        raise UsageError(f"{number} plots do not fit one output: give a file, or one --table")
    place = Path(path)
    return [str(place.with_stem(f"{place.stem}-{n}")) for n in range(1, number + 1)]
