"""adaptive-moe: calibrate | show | explain | plot | bench | cache | doctor."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from adaptive_moe import __version__
from adaptive_moe.models import config_dtype, find_model, model_from_config
from adaptive_moe.shape import DTYPES, SortingShape

# What the CPU kernel is given where nothing is said: it is a thousand times slower than a GPU.
CPU_BUDGET_S, CPU_MAX_TOKENS, GPU_MAX_TOKENS = 30.0, 4096, 16384
# vLLM's default capture sizes up to 512, which SGLang's resemble.
KERNELS = ("cpu", "triton")
CAPTURE_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))


class UsageError(ValueError):
    """An option cannot be served; the text names it and what would work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 where it did what was asked, 2 for bad input, 1 for a failure."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return int(args.run(args))
    except (ValueError, OSError) as error:
        # Every error text of ours is written for the person at the terminal.
        print(f"adaptive-moe {args.command}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"adaptive-moe {args.command}: {error}", file=sys.stderr)
        return 1


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which model's sort is meant."""
    parser.add_argument("--model", help="a known model, such as deepseek-v3 or gpt-oss-120b")
    parser.add_argument("--config", type=Path, help="a Hugging Face config.json")
    parser.add_argument(
        "--fuse-shared", action="store_true", help="with --config: sort its shared experts too"
    )
    parser.add_argument("--experts", type=int, help="number of experts (with --topk and --hidden)")
    parser.add_argument("--topk", type=int, help="experts a token")
    parser.add_argument("--hidden", type=int, help="hidden size")
    parser.add_argument("--block-size", type=int, default=32, help="rows of a GEMM tile [32]")
    parser.add_argument("--dtype", choices=DTYPES, help="of the output buffer [bfloat16]")
    parser.add_argument(
        "--local-experts", type=int, help="expert parallelism: experts on this rank"
    )
    parser.add_argument(
        "--padded", action="store_true", help="row count is a capacity (num_local_tokens)"
    )
    parser.add_argument("--kernel", choices=KERNELS, default="cpu", help="who sorts [cpu]")
    parser.add_argument(
        "--max-tokens", type=int, help="largest batch [4096 on the CPU, else 16384]"
    )


def shape_from(args: argparse.Namespace) -> SortingShape:
    """The one shape that the options name; UsageError where they name none or several."""
    numbers = (args.experts, args.topk, args.hidden)
    given = [args.model is not None, args.config is not None, any(n is not None for n in numbers)]
    if sum(given) != 1:
        raise UsageError(
            "say which sort is meant, one way: --model NAME, --config PATH, "
            "or --experts, --topk and --hidden"
        )
    dtype = args.dtype or "bfloat16"
    if args.model is not None:
        shape = find_model(args.model).shape(args.block_size, dtype)
    elif args.config is not None:
        model = model_from_config(args.config, fuse_shared=args.fuse_shared)
        shape = model.shape(args.block_size, args.dtype or config_dtype(args.config))
    elif None in numbers:
        raise UsageError("--experts, --topk and --hidden belong together: give all three")
    else:
        shape = SortingShape(args.experts, args.topk, args.hidden, dtype, args.block_size)
    return replace(shape, local_experts=args.local_experts, num_local_tokens=args.padded)


def _parser() -> argparse.ArgumentParser:
    from adaptive_moe.cli import commands
    from adaptive_moe.cli import store as cache_cli
    from adaptive_moe.cli.bench import add_bench_parser

    parser = argparse.ArgumentParser(
        prog="adaptive-moe",
        description="Measures which MoE sorting dispatch policy is fastest for each token count.",
    )
    parser.add_argument("--version", action="version", version=f"adaptive-moe {__version__}")
    sub = parser.add_subparsers(dest="command", required=True)

    calibrate = sub.add_parser("calibrate", help="measure one model's sort and decide")
    add_shape_options(calibrate)
    calibrate.add_argument(
        "--capture-sizes", metavar="N,N", help="token counts captured into graphs [vLLM's]"
    )
    calibrate.add_argument(
        "--budget", metavar="S", help="seconds of measuring [30 on the CPU, else 1]"
    )
    calibrate.add_argument("--margin", help="gain that policy 0 must be beaten by [0.01]")
    calibrate.add_argument(
        "--buckets", metavar="N,N", help="token counts measured first [powers of two]"
    )
    calibrate.add_argument(
        "--output", type=Path, help="where the calibration is written [the cache folder]"
    )
    calibrate.add_argument("--verbose", action="store_true", help="also print every sample")
    calibrate.set_defaults(run=commands.calibrate)

    show = sub.add_parser("show", help="print a calibration's table again")
    explain = sub.add_parser("explain", help="say why a token count gets its policy")
    explain.add_argument("--tokens", type=int, required=True, help="num_tokens of the batch")
    explain.add_argument("--graph", action="store_true", help="for a call captured into a graph")
    plot = sub.add_parser("plot", help="draw time against tokens as a PNG")
    plot.add_argument("--output", type=Path, required=True, help="the PNG to write")
    doctor = sub.add_parser("doctor", help="say what was found here and what would happen")
    for command, run in (
        (show, commands.show),
        (explain, commands.explain),
        (plot, commands.plot),
        (doctor, commands.doctor),
    ):
        command.set_defaults(run=run)
        if command is not doctor:
            command.add_argument("--table", type=Path, help="a calibration file [the latest one]")
    for command in (calibrate, show, explain, plot, doctor):
        command.add_argument("--json", action="store_true", help="print JSON instead")
    add_bench_parser(sub)
    cache_cli.add_parser(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
