"""The SGLang plugin (entry-point group `sglang.srt.plugins`), run in every process of SGLang.

With no variable of ours set it returns at once. SGLang 0.5.22 and later pass AITER a policy of
their own, 2 unless the user set SGLANG_AITER_MOE_SORTING_DISPATCH_POLICY; earlier ones pass none. A
user's choice wins. SGLang's own default is the baseline: it gives way to what was measured to be
faster, and stays everywhere else.

SGLang runs no model before it captures its first graph, so that is when calibration runs: between
the eager runs of a first capture, which show the shapes, and the capture itself. Where nothing is
captured, a dummy batch shows them: the one that SGLang itself has for tuning kernels, run where
every rank has just come by, before serving. SGLang's small-batch sort sits below the seam; it is
measured, and keeps working, as part of AITER.

Read in SGLang 0.5.20 to 0.5.23.
"""

import functools
import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any
from weakref import WeakSet

from adaptive_moe.engines.plugin import safely, start, when_imported, wrap

logger = logging.getLogger("adaptive_moe")

SGLANG_VARIABLE = "SGLANG_AITER_MOE_SORTING_DISPATCH_POLICY"

_BACKENDS = "sglang.srt.model_executor.runner_backend"
BACKENDS = {
    f"{_BACKENDS}.full_cuda_graph_backend": "FullCudaGraphBackend",
    f"{_BACKENDS}.breakable_cuda_graph_backend": "BreakableCudaGraphBackend",
    f"{_BACKENDS}.tc_piecewise_cuda_graph_backend": "TcPiecewiseCudaGraphBackend",
}
MODEL_RUNNER = "sglang.srt.model_executor.model_runner"
# Enough to show the model's layers; their sorts at other counts are asked of AITER.
DUMMY_REQUESTS = 32


def register() -> None:
    """Entry point. Never raises: without us SGLang starts as it would have."""
    start(_register, "SGLang")


def _register() -> None:
    from adaptive_moe.engines import process
    from adaptive_moe.settings import Mode

    settings = process.asked_for()
    if settings is None:
        return
    chosen = os.environ.get(SGLANG_VARIABLE)
    if chosen:
        logger.warning(
            "%s=%s is set and wins: adaptive_moe leaves SGLang's policy alone; unset it to have "
            "policies measured",
            SGLANG_VARIABLE,
            chosen,
        )
        return
    engine = process.named("sglang")
    if not process.install(settings, engine_policy=_engine_policy(), engine=engine):
        return
    if settings.mode is Mode.AUTO:
        for module, name in BACKENDS.items():
            when_imported(module, functools.partial(_wrap_capture, name))
        when_imported(MODEL_RUNNER, _wrap_model_runner)


def _engine_policy() -> int:
    """What SGLang passes when its user chose nothing; versions without the variable pass none."""
    from sglang.srt.environ import envs

    field = getattr(envs, SGLANG_VARIABLE, None)
    return 0 if field is None else int(field.get())


def _wrap_capture(name: str, module: ModuleType) -> None:
    if not wrap(getattr(module, name, None), "capture_one", _warm_up_before_it):
        logger.warning(
            "this SGLang has no %s.capture_one, so nothing will be calibrated with that graph "
            "backend and the baseline stays: use SGLang 0.5.20 to 0.5.23",
            name,
        )


def _warm_up_before_it(original: Callable[..., Any]) -> Callable[..., Any]:
    def capture_one(
        self: Any,
        shape_key: Any,
        forward_fn: Callable[[], Any],
        capture_inputs: Any = None,
        post_warmup_hook: Callable[[], None] | None = None,
    ) -> Any:
        # SGLang calls this after each eager run, before it captures.
        def after_eager_run() -> None:
            if post_warmup_hook is not None:
                post_warmup_hook()
            safely(_before_capture, self)

        return original(self, shape_key, forward_fn, capture_inputs, after_eager_run)

    return capture_one


# Graph backends that were warmed up for.
_warmed: "WeakSet[Any]" = WeakSet()
# Shapes there were at the latest warm-up.
_seen_before = 0


def _before_capture(backend: Any) -> None:
    """At a backend's first capture, and whenever a capture shows new shapes."""
    global _seen_before  # noqa: PLW0603
    from adaptive_moe.engines import process

    hook = process.current()
    seen = 0 if hook is None else len(hook.seen)
    if backend in _warmed and seen == _seen_before:
        return
    # First of all, so that a warm-up that fails does so once.
    _warmed.add(backend)
    _seen_before = seen
    runner = getattr(backend, "_cuda_graph_runner", None)
    _warm_up(_capture_sizes(getattr(runner, "captured_req_width", 1)))


def _wrap_model_runner(module: ModuleType) -> None:
    """`init_cuda_graphs` comes by on every rank, before serving, whether or not graphs are captured
    in it."""
    if not wrap(getattr(module, "ModelRunner", None), "init_cuda_graphs", _warm_up_after_it):
        logger.warning(
            "this SGLang has no ModelRunner.init_cuda_graphs, so nothing will be calibrated with "
            "--disable-cuda-graph and the baseline stays there: use SGLang 0.5.20 to 0.5.23"
        )


def _warm_up_after_it(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_cuda_graphs(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        safely(_after_graphs, self)
        return result

    return init_cuda_graphs


def _after_graphs(model_runner: Any) -> None:
    """Where nothing was captured, nothing has run so far."""
    graphs = ("decode_cuda_graph_runner", "prefill_cuda_graph_runner")
    captured = any(getattr(model_runner, name, None) is not None for name in graphs)
    if captured or getattr(model_runner, "is_draft_worker", False):
        return
    try:
        _show_shapes(model_runner.eager_runner)
    except Exception as error:
        logger.warning("no dummy batch could show the model's shapes: %r", error)
    _warm_up(())


def _show_shapes(runner: Any) -> None:
    """One small decode batch of SGLang's own making, as it has it for tuning kernels: all ranks run
    it, and it neither needs nor leaves a request."""
    model_runner = runner.model_runner
    speculates = model_runner.spec_algorithm.is_speculative()
    width = model_runner.decode_num_tokens_per_req() if speculates else 1
    # A multiple of the ranks that share attention, as SGLang's own largest batch is.
    batch_size = min(DUMMY_REQUESTS * runner.attn_tp_size, runner._eager_max_bs)
    canary = getattr(model_runner, "canary_manager", None)
    run_ctx = canary.with_active_single_forward_manager(0) if canary is not None else nullcontext()
    with getattr(runner, "model_context", nullcontext)():
        buffers = runner._alloc_dummy_decode_buffers(batch_size, num_tokens_per_req=width)
        runner._dummy_run(batch_size=batch_size, buffers=buffers, run_ctx=run_ctx)


def _warm_up(capture_sizes: tuple[int, ...]) -> None:
    from sglang.srt.runtime_context import max_prefill_buffer_tokens

    from adaptive_moe.engines import process
    from adaptive_moe.engines.wanted import Batches

    batches = Batches(
        max_tokens=max(max_prefill_buffer_tokens(), *capture_sizes, 1),
        captured=capture_sizes,
        pooled=_pooled(),
        padding_rows=_has_padding_rows(),
    )
    process.warm_up_for(batches)


def _capture_sizes(width: int) -> tuple[int, ...]:
    """The token counts SGLang captures: decode graphs count requests, of `width` tokens each."""
    from sglang.srt.runtime_context import get_exec

    sizes: set[int] = set()
    phases = get_exec().graph.cuda_graph_config
    if phases is not None:
        sizes.update(size * width for size in phases.decode.bs or ())
        if phases.prefill.backend != "disabled":
            sizes.update(phases.prefill.bs or ())
    return tuple(sorted(sizes))


def _pooled() -> int:
    """Attention ranks with batches of their own whose tokens SGLang gathers before the experts."""
    from sglang.srt.runtime_context import get_parallel
    from sglang.srt.utils.common import require_mlp_tp_gather

    if not require_mlp_tp_gather():
        return 1
    parallel = get_parallel()
    ranks = getattr(parallel, "num_dp_ranks", None)
    return int(parallel.dp_size if ranks is None else ranks)


def _has_padding_rows() -> bool:
    """On ROCm SGLang gives rows of padding the id 0, but for one router that writes -1."""
    return any(name.endswith(".dsv41.vl_routing") for name in sys.modules)
