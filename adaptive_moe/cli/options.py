"""Options that several commands share: which sort is meant, on which kernel, for which calls."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adaptive_moe.cli.kernel import WHY
from adaptive_moe.policy.coverage import MAX_TOKENS
from adaptive_moe.settings import Settings, parse_buckets, read_for_serving
from adaptive_moe.shape import DTYPES, SortingShape

if TYPE_CHECKING:
    from typing import NoReturn

    from adaptive_moe.models import Model
    from adaptive_moe.policy.coverage import Coverage

KERNELS = ("auto", "aiter", *WHY)
# What the CPU kernel is given where nothing is said: it is a thousand times slower than a GPU.
CPU_BUDGET_S, CPU_MAX_TOKENS, GPU_MAX_TOKENS = 15.0, 4096, 16384
# vLLM's default capture sizes up to 512, which SGLang's resemble.
CAPTURE_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
# What a config's own quantisation, such as quark or compressed-tensors, means for a calibration.
QUANTISED = (
    "its weights are quantised ({}): AITER may then ask for other blocks than --block-size, by "
    "token count; an engine's own start measures those"
)


class UsageError(ValueError):
    """An option cannot be served; the text names it and what would work."""


class Parser(argparse.ArgumentParser):
    """argparse's parser, with errors of one line."""

    def error(self, message: str) -> "NoReturn":
        self.exit(2, f"{self.prog}: {message}: `{self.prog} --help` says what is accepted\n")


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which model's sort is meant."""
    model = parser.add_argument_group("which sort")
    model.add_argument(
        "--model", metavar="NAME", help="a known model or Hugging Face id, such as deepseek-v3"
    )
    model.add_argument("--config", type=Path, help="a config.json or params.json, or its folder")
    model.add_argument("--fuse-shared", action="store_true", help="sort its shared experts too")
    model.add_argument("--experts", type=int, help="number of experts (with --topk and --hidden)")
    model.add_argument("--topk", type=int, help="experts a token")
    model.add_argument("--hidden", type=int, help="hidden size")
    model.add_argument("--dtype", choices=DTYPES, help="of the output buffer [the model's]")
    model.add_argument("--block-size", type=int, default=32, help="rows of a GEMM tile [32]")
    model.add_argument(
        "--local-experts", type=int, metavar="N", help="expert parallelism: experts on this rank"
    )
    model.add_argument(
        "--padded", action="store_true", help="row count is a capacity (num_local_tokens)"
    )


def add_kernel_options(parser: argparse.ArgumentParser, names: tuple[str, ...] = KERNELS) -> None:
    """The options that say which kernel sorts, and for which calls."""
    calls = parser.add_argument_group("which calls")
    calls.add_argument(
        "--kernel",
        choices=names,
        default="auto",
        help="the kernel that sorts [auto: the first that is usable, the CPU last]",
    )
    calls.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"largest batch [{CPU_MAX_TOKENS} on the CPU, else {GPU_MAX_TOKENS}]",
    )
    calls.add_argument(
        "--capture-sizes",
        metavar="N,N",
        help="token counts captured into graphs, or none [vLLM's; none on the CPU]",
    )


def add_budget(parser: argparse._ActionsContainer) -> None:
    usual = f"{CPU_BUDGET_S:g} on the CPU, else {Settings.budget_s:g}"
    parser.add_argument("--budget", metavar="S", help=f"seconds a table [{usual}]")


def shape_from(args: argparse.Namespace) -> SortingShape:
    """The one shape that the options name; UsageError where they name none or several."""
    numbers = (args.experts, args.topk, args.hidden)
    given = [args.model is not None, args.config is not None, any(n is not None for n in numbers)]
    if sum(given) != 1:
        raise UsageError(
            "say which sort is meant, one way: --model NAME, --config PATH, "
            "or --experts, --topk and --hidden"
        )
    model = model_from(args)
    if model is not None:
        shape = model.shape(args.block_size, args.dtype)
    elif None in numbers:
        raise UsageError("--experts, --topk and --hidden belong together: give all three")
    elif args.fuse_shared:
        raise UsageError("--fuse-shared needs --model or --config: numbers name no shared experts")
    else:
        dtype = args.dtype or "bfloat16"
        shape = SortingShape(args.experts, args.topk, args.hidden, dtype, args.block_size)
    return replace(shape, local_experts=args.local_experts, num_local_tokens=args.padded)


def model_from(args: argparse.Namespace) -> "Model | None":
    """The model of --model or --config; None where only numbers are given. ModelError."""
    from adaptive_moe.models import find_model, model_from_config

    if args.model is not None:
        return find_model(args.model, fuse_shared=args.fuse_shared)
    if args.config is not None:
        return model_from_config(args.config, fuse_shared=args.fuse_shared)
    return None


def max_tokens_from(args: argparse.Namespace, *, on_cpu: bool) -> int:
    """The largest batch; UsageError for what is no token count."""
    if args.max_tokens is None:
        return CPU_MAX_TOKENS if on_cpu else GPU_MAX_TOKENS
    if not 1 <= args.max_tokens <= MAX_TOKENS:
        raise UsageError(
            f"--max-tokens={args.max_tokens} is not accepted: give a token count from 1 to "
            f"{MAX_TOKENS}"
        )
    return int(args.max_tokens)


def capture_sizes_from(
    args: argparse.Namespace, max_tokens: int, *, on_cpu: bool
) -> tuple[int, ...]:
    """The captured token counts. SettingsError for what is no such list."""
    if args.capture_sizes is None:
        return () if on_cpu else tuple(n for n in CAPTURE_SIZES if n <= max_tokens)
    if args.capture_sizes.strip().lower() in ("", "none"):
        return ()
    return parse_buckets("--capture-sizes", args.capture_sizes)


def coverage_from(args: argparse.Namespace, *, on_cpu: bool) -> "Coverage":
    """What a table is to be for: every eager count up to the largest, and the captured ones."""
    from adaptive_moe.policy.coverage import Coverage

    max_tokens = max_tokens_from(args, on_cpu=on_cpu)
    sizes = capture_sizes_from(args, max_tokens, on_cpu=on_cpu)
    return Coverage.up_to(shape_from(args), max_tokens, sizes)


def cache_folder_here() -> Path:
    """The folder of the store, whatever else the environment holds."""
    from adaptive_moe.store.folder import cache_folder

    settings, _ = read_for_serving()
    return cache_folder(settings)
