"""Part of check_hook_gpu.py: our sort serves in place of AITER's, and two GPUs are told apart."""

import sys
from dataclasses import replace

import torch

from adaptive_moe.engines.hook import AiterHook
from adaptive_moe.engines.key import Key
from adaptive_moe.kernels.sorts import GROUPS
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.shape import SortingShape
from calibration.hooked_layer import EXPERTS, MAX_TOKENS, MODEL_DIM, TOPK, Checks, Layer
from tests.tables import make_table

OURS = "triton one-shot"


def check_other_sorts(aiter, hook: AiterHook, checks: Checks) -> None:
    """Ours answers every call: eager, captured and replayed; then it raises, and AITER's does."""
    hook.settings = replace(hook.settings, sorts=GROUPS["all"])
    hook.drop_tables()
    (key,) = (key for key in hook.seen if key.model_dim == MODEL_DIM)
    checks.that("our sort is offered", serve_with(OURS, hook, key))
    layer, sort = Layer(aiter.fused_moe, 64), sys.modules["aiter.sort"]
    layer()  # compiles
    sorted_before, chosen = len(sort.calls), hook.counts().chosen
    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = layer()
    checks.that("AITER's sort does not run then", len(sort.calls) == sorted_before)
    checks.that("eager and captured calls are counted", hook.counts().chosen == chosen + 2)
    for seed in (1, 2, 3):
        layer.route(seed)
        graph.replay()
        # A policy of the caller's own goes past every table.
        checks.that("ours replays exactly", torch.equal(result, layer(policy=1)), seed)
    hook._sorts[key] = {OURS: raising}
    hook.set_tables(hook.tables)
    expected = layer(policy=1)
    for attempt in (1, 2):
        checks.that("where ours raises AITER's answers", torch.equal(layer(), expected), attempt)
    checks.that("and ours is asked once", hook.counts().fell_back == 1, hook.counts())


def raising(*arguments):
    raise RuntimeError("made to fail")


def serve_with(name: str, hook: AiterHook, key: Key) -> bool:
    """Set a table for `key` in which that candidate answers every call, if it is offered."""
    shape = SortingShape(EXPERTS, TOPK, key.model_dim)
    coverage = Coverage.up_to(shape, MAX_TOKENS, busy_from=1)
    names = [c.name for c in hook.kernel(hook.seen[key], key, coverage).candidates]
    if name in names:
        chosen = {MAX_TOKENS: names.index(name)}
        hook.set_tables({key: make_table(chosen, candidates=names, coverage=coverage)})
    return name in names


def check_two_gpus(aiter, hook: AiterHook, checks: Checks) -> None:
    """Where there are two."""
    if torch.cuda.device_count() < 2:
        return
    hook.drop_tables()
    for device in (0, 1):
        with torch.cuda.device(device):
            Layer(aiter.fused_moe, 64)()
            torch.cuda.synchronize()
    devices = sorted(key.device for key in hook.seen if key.model_dim == MODEL_DIM)
    checks.that("layers on two GPUs are told apart", devices == [0, 1], devices)
