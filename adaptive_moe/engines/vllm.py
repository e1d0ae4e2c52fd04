"""The vLLM plugin (entry-point group `vllm.general_plugins`), run in every process of vLLM.

With no variable of ours set it returns at once. Else vLLM's own parser of its variable learns our
words, the seam is wrapped as soon as vLLM imports AITER, and calibration runs inside vLLM's
kernel_warmup: on every rank, after the memory profile and the KV cache, before graphs are captured.

Read in vLLM 0.22.1, 0.23.0, 0.27.1 and 0.33.0.
"""

import logging
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from adaptive_moe import VLLM_VARIABLE
from adaptive_moe.engines.plugin import safely, start, when_imported, wrap

logger = logging.getLogger("adaptive_moe")

KERNEL_WARMUP = "vllm.model_executor.warmup.kernel_warmup"
INT4 = "vllm.model_executor.layers.fused_moe.fused_flydsl_moe"


def register() -> None:
    """Entry point. Never raises: without us vLLM starts as it would have."""
    start(_register, "vLLM")


def _register() -> None:
    from adaptive_moe.engines import process
    from adaptive_moe.kernels.aiter import find_aiter
    from adaptive_moe.settings import Mode

    _log_as_vllm()
    if VLLM_VARIABLE in os.environ and _is_ours(os.environ[VLLM_VARIABLE]):
        _teach_envs()
    settings = process.asked_for()
    if settings is None:
        return
    found = find_aiter()
    if found.problem is not None:
        # Each of vLLM's processes comes by here; the first one speaks for them.
        if process.is_first_process():
            logger.warning("the dispatch policy has no effect here: %s", found.problem)
        return
    process.install(settings, engine=process.named("vllm"))
    if settings.mode is Mode.AUTO:
        when_imported(KERNEL_WARMUP, _wrap_kernel_warmup)
        when_imported(INT4, _watch_int4)


def _is_ours(text: str) -> bool:
    from adaptive_moe.settings import OFF

    return text.strip().lower() in ("auto", *OFF, "")


def _teach_envs() -> None:
    """Every reader of the variable in vLLM goes through this table of parsers. Only a word of ours
    is read here; for anything else vLLM's own parser answers, or raises, as without us."""
    from vllm import envs

    parsers: dict[str, Callable[[], Any]] | None = getattr(envs, "environment_variables", None)
    if parsers is None:
        logger.warning(
            "this vLLM has no vllm.envs.environment_variables, so it cannot be taught the word "
            "auto: set ADAPTIVE_MOE_DISPATCH_POLICY=auto instead of %s",
            VLLM_VARIABLE,
        )
        return
    original = parsers.get(VLLM_VARIABLE)
    if hasattr(original, "reads_adaptive_moe"):  # plugins may be loaded twice
        return

    def parse() -> Any:
        if _is_ours(os.environ.get(VLLM_VARIABLE, "")) or original is None:
            return 0  # AITER's own choice, where nothing was measured
        return original()

    parse.reads_adaptive_moe = True  # type: ignore[attr-defined]
    parsers[VLLM_VARIABLE] = parse


def _wrap_kernel_warmup(module: ModuleType) -> None:
    original = getattr(module, "kernel_warmup", None)
    if not wrap(module, "kernel_warmup", _then_warm_up):
        logger.warning(
            "this vLLM has no kernel_warmup, so nothing will be calibrated and the baseline stays: "
            "use a vLLM from 0.22.1 to 0.33.0, or call adaptive_moe.warm_up() yourself"
        )
        return
    # gpu_worker and others import it by name, some of them before this plugin is loaded.
    for name, other in list(sys.modules.items()):
        # Not getattr: vLLM has modules that import, or raise, when asked for a name.
        held = vars(other) if name.startswith("vllm.") and isinstance(other, ModuleType) else {}
        if held.get("kernel_warmup") is original:
            held["kernel_warmup"] = module.kernel_warmup


def _then_warm_up(original: Callable[..., Any]) -> Callable[..., Any]:
    def kernel_warmup(worker: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(worker, *args, **kwargs)
        # Said to a worker that joins engines at work (elastic expert parallelism): it is warmed up
        # once more before its graphs are captured.
        if kwargs.get("process_local_only"):
            return result
        safely(_warm_up, worker)
        return result

    return kernel_warmup


_int4: list[Any] = []


def _watch_int4(module: ModuleType) -> None:
    from adaptive_moe.engines.block_sizes import VllmInt4

    _int4[:] = [VllmInt4(module)]


def _warm_up(worker: Any) -> None:
    from adaptive_moe.engines import process
    from adaptive_moe.engines.wanted import Batches

    config = worker.vllm_config
    batches = Batches(
        max_tokens=config.scheduler_config.max_num_batched_tokens,
        captured=tuple(config.compilation_config.cudagraph_capture_sizes or ()),
        pooled=_pooled(config.parallel_config),
        padding_rows=_has_padding_rows(),
        choosers=tuple(_int4),
        owner=worker,
    )
    process.warm_up_for(batches)


def _pooled(config: Any) -> int:
    """Data-parallel ranks whose tokens are gathered before the sort: all of them where vLLM has no
    all-to-all kernels for it, which is what `allgather_reducescatter` means, and without expert
    parallelism. Its ranks pad captured batches to one size."""
    gathers = config.all2all_backend in ("allgather_reducescatter", "naive")
    if gathers or not config.enable_expert_parallel:
        return int(config.data_parallel_size)
    return 1


def _has_padding_rows() -> bool:
    """vLLM marks rows of padding by ids of -1 in some routings, where this is on. Which routing a
    layer has cannot be told at the sort."""
    from vllm import envs

    known: Mapping[str, Callable[[], Any]] = getattr(envs, "environment_variables", {})
    asks = known.get("VLLM_MOE_SKIP_PADDING")
    return asks is not None and bool(asks())


def _log_as_vllm() -> None:
    """Our lines through vLLM's handlers and at its level, unless the user configured ours.

    As a child of vLLM's logger, whatever that is set up with: vLLM does it after loading plugins.
    """
    if logger.handlers or logger.level != logging.NOTSET:
        return
    logger.parent = logging.getLogger("vllm")
    logger.setLevel(logging.NOTSET)  # forgets which levels were on under the old parent
