"""The SGLang plugin (entry-point group `sglang.srt.plugins`), run in every process of SGLang.

With neither variable set it returns at once. SGLang passes AITER a policy of its own, 2 unless its
user set SGLANG_AITER_MOE_SORTING_DISPATCH_POLICY. A user's choice wins. SGLang's own default gives
way to what was measured, and stays where nothing was.

SGLang runs no model before it captures its first graph, so that is when calibration runs: between
the eager runs of the first capture, which show the shapes, and the capture itself. SGLang's
small-batch sort sits below the seam; it is measured, and keeps working, as part of AITER.

Ranks agree over the tensor-parallel group of the graph backend. SGLang itself makes all of that
group wait for each other right before each of those eager runs, so they surely all come by here:
at the first capture of all, whatever they saw, and later at one that shows them new shapes.

Read in SGLang 0.5.23.
"""

import functools
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

logger = logging.getLogger("adaptive_moe")

# As in settings.py, which is only imported when one of them is set.
VARIABLES = ("ADAPTIVE_MOE_DISPATCH_POLICY", "VLLM_ROCM_AITER_MOE_DISPATCH_POLICY")
SGLANG_VARIABLE = "SGLANG_AITER_MOE_SORTING_DISPATCH_POLICY"

_BACKENDS = "sglang.srt.model_executor.runner_backend"
BACKENDS = {
    f"{_BACKENDS}.full_cuda_graph_backend": "FullCudaGraphBackend",
    f"{_BACKENDS}.breakable_cuda_graph_backend": "BreakableCudaGraphBackend",
    f"{_BACKENDS}.tc_piecewise_cuda_graph_backend": "TcPiecewiseCudaGraphBackend",
}


def register() -> None:
    """Entry point. Never raises: without us SGLang starts as it would have."""
    if not any(os.environ.get(name) for name in VARIABLES):
        return
    try:
        _register()
    except Exception:
        logger.exception("adaptive_moe could not start; SGLang goes on without it")


def _register() -> None:
    from adaptive_moe.engines import process
    from adaptive_moe.engines.on_import import when_imported
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
    if not process.install(settings, engine_policy=_engine_policy()):
        return
    if settings.mode is Mode.AUTO:
        for module, name in BACKENDS.items():
            when_imported(module, functools.partial(_wrap_capture, name))


def _engine_policy() -> int:
    """What SGLang passes when its user chose nothing."""
    from sglang.srt.environ import envs

    return int(getattr(envs, SGLANG_VARIABLE).get())


def _wrap_capture(name: str, module: ModuleType) -> None:
    backend = getattr(module, name, None)
    original = getattr(backend, "capture_one", None)
    if original is None:
        logger.warning(
            "this SGLang has no %s.capture_one, so nothing will be calibrated with that graph "
            "backend and SGLang's own policy stays: use SGLang 0.5.23",
            name,
        )
        return
    if hasattr(original, "warms_up_adaptive_moe"):
        return

    @functools.wraps(original)
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
            try:
                _warm_up(self)
            except Exception:
                logger.exception("warm-up failed; SGLang's own policy stays for what has no table")

        return original(self, shape_key, forward_fn, capture_inputs, after_eager_run)

    capture_one.warms_up_adaptive_moe = True  # type: ignore[attr-defined]
    backend.capture_one = capture_one  # type: ignore[union-attr]


# Shapes there were at the latest warm-up: it runs again only when a capture shows new ones. As many
# on all ranks of a group, since they run the same layers.
_seen_before: int | None = None


def _warm_up(backend: Any) -> None:
    global _seen_before  # noqa: PLW0603
    from adaptive_moe.engines import process

    hook = process.current()
    if hook is None or len(hook.seen) == _seen_before:
        return
    _seen_before = len(hook.seen)
    max_tokens, capture_sizes = _counts(backend)
    group = getattr(getattr(backend, "_tp_group", None), "cpu_group", None)
    process.warm_up(max_tokens, capture_sizes, agree=False if group is None else group)


def _counts(backend: Any) -> tuple[int, tuple[int, ...]]:
    """The largest batch, and the token counts SGLang captures: decode graphs count requests, of
    one token each unless it speculates."""
    from sglang.srt.runtime_context import get_exec, max_prefill_buffer_tokens

    sizes: set[int] = set()
    phases = get_exec().graph.cuda_graph_config
    if phases is not None:
        width = getattr(getattr(backend, "_cuda_graph_runner", None), "captured_req_width", 1)
        sizes.update(size * width for size in phases.decode.bs or ())
        if phases.prefill.backend != "disabled":
            sizes.update(phases.prefill.bs or ())
    return max(max_prefill_buffer_tokens(), *sizes, 1), tuple(sorted(sizes))
