"""adaptive-moe show: a calibration's table again."""

import argparse
import json

from adaptive_moe.cli import output
from adaptive_moe.cli.source import add_table, tables_of
from adaptive_moe.report.text import advice, bucket_table, headline


def add_options(parser: argparse.ArgumentParser) -> None:
    add_table(parser)
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    sources = tables_of(args)
    lines = [sources.where]
    for found in sources.tables:
        lines += [headline(found.table, measured_now=False), *bucket_table(found.table)]
        lines += [*advice(found.table), ""]
    # One table is itself, so that its JSON can be read again; several are a report.
    plain = [json.loads(found.table.to_json()) for found in sources.tables]
    output.report(args, lines[:-1], plain[0] if len(plain) == 1 else plain)
    return 0
