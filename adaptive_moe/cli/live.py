"""Calibrating the live AITER for the next start of an engine: what its warm-up would do, before."""

import argparse
from dataclasses import replace
from functools import partial

import torch

from adaptive_moe.cli import options
from adaptive_moe.cli.options import UsageError
from adaptive_moe.cli.progress import Progress
from adaptive_moe.disk.file import Request, Stored
from adaptive_moe.engines.rehearsal import MoeLayer, calls_of, rehearse
from adaptive_moe.engines.warm_up import warm_up
from adaptive_moe.settings import Mode, Settings
from adaptive_moe.tuning.calibrator import calibrate


def calibrate_live(
    args: argparse.Namespace, settings: Settings, progress: Progress
) -> list[Stored]:
    """A table for each block size that AITER chooses for the layer, as the engine's warm-up makes
    and stores them. RuntimeError where there is none, with why."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    if not gpu:
        torch.set_num_threads(1)  # as engines' workers have it
    max_tokens = options.max_tokens_from(args, on_cpu=not gpu)
    sizes = options.capture_sizes_from(args, max_tokens, on_cpu=False)
    calls = calls_of(args.engine)
    hook = rehearse(_layer(args), max_tokens, calls, replace(settings, mode=Mode.AUTO), device)
    try:
        made = warm_up(
            hook,
            max_tokens,
            sizes,
            padding_rows=calls.padding_rows,
            engine=calls.name,
            measure=partial(calibrate, progress=progress),
        )
    finally:
        hook.uninstall()
    if not made.tables:
        raise RuntimeError("; ".join(made.problems) or "nothing was measured")
    request = Request(calls.name, settings.buckets)
    return [Stored(request, table) for table in made.tables.values()]


def _layer(args: argparse.Namespace) -> MoeLayer:
    """The layer on one rank, as far as the options and the model's config tell."""
    model = options.model_from(args)
    quant = args.quant or (model.quant if model else "") or "none"
    inter_dim = model.moe_intermediate_size if model else 0
    if args.inter is not None:
        inter_dim = args.inter
    if not inter_dim:
        raise UsageError(
            "AITER's block sizes depend on the experts' hidden columns, which are not known here: "
            "give --inter N, or a --model or --config that says so"
        )
    if args.tp < 1 or inter_dim % args.tp:
        raise UsageError(f"--tp={args.tp} does not divide {inter_dim} columns: give one that does")
    return MoeLayer(options.shape_from(args), inter_dim // args.tp, quant, args.block_size)
