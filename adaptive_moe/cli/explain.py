"""adaptive-moe explain: why a token count gets what it gets."""

import argparse

from adaptive_moe.cli import output
from adaptive_moe.cli.options import UsageError
from adaptive_moe.cli.source import add_table, tables_of
from adaptive_moe.report.explain import explain, is_for


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, required=True, help="num_tokens of the batch")
    parser.add_argument("--graph", action="store_true", help="for a call captured into a graph")
    add_table(parser)
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    if args.tokens < 1:
        raise UsageError(f"--tokens={args.tokens} is not accepted: give a token count of 1 or more")
    sources = tables_of(args)
    lines, plain = [sources.where], []
    # Of the tables of one model each block size has its own counts.
    fitting = [found for found in sources.tables if is_for(found.table, args.tokens)]
    for found in fitting or sources.tables:
        why = explain(found.table, args.tokens, captured=args.graph)
        lines += [found.describe(), *why]
        plain.append(
            {
                "file": str(found.path),
                "num_tokens": args.tokens,
                "captured": args.graph,
                "candidate": found.table.candidate(args.tokens, captured=args.graph),
                "why": why,
            }
        )
    output.report(args, lines, plain[0] if len(plain) == 1 else plain)
    return 0
