"""The vLLM plugin (entry-point group `vllm.general_plugins`), run in every process of vLLM.

With neither variable set it returns at once; this module itself imports nothing heavier than
logging. Else vLLM's own parser of the variable learns the word `auto`, the seam is wrapped as soon
as vLLM imports AITER, and calibration runs inside vLLM's kernel_warmup: on every rank, after the
memory profile and the KV cache, before graphs are captured.

Ranks agree over torch.distributed's default group: all ranks of the engine and, where data-parallel
engines run one MoE model together, of all of those. vLLM builds its own world group from exactly
these, which each of them has to take part in, and makes their dummy batches wait for each other: so
all of them come to kernel_warmup, equally often.

Read in vLLM 0.22.1, 0.23.0, 0.27.1 and 0.33.0.
"""

import functools
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

logger = logging.getLogger("adaptive_moe")

# As in settings.py, which is only imported when one of them is set.
VARIABLES = ("VLLM_ROCM_AITER_MOE_DISPATCH_POLICY", "ADAPTIVE_MOE_DISPATCH_POLICY")
PLUGIN = "adaptive_moe"
KERNEL_WARMUP = "vllm.model_executor.warmup.kernel_warmup"


def register() -> None:
    """Entry point. Never raises: without us vLLM starts as it would have."""
    if not any(os.environ.get(name) for name in VARIABLES):
        return
    try:
        _register()
    except Exception:
        logger.exception("adaptive_moe could not start; vLLM goes on without it")


def plugin_problem(environ: Mapping[str, str]) -> str | None:
    """Why vLLM would not load this plugin although the environment asks for `auto`; or None."""
    allowed = environ.get("VLLM_PLUGINS")
    asked = environ.get(VARIABLES[0], "")
    if allowed is None or PLUGIN in allowed.split(",") or asked.strip().lower() != "auto":
        return None
    return (
        f"VLLM_PLUGINS={allowed!r} leaves {PLUGIN} out, and vLLM alone cannot read "
        f"{VARIABLES[0]}={asked!r} (ValueError: invalid literal for int()): add {PLUGIN} to "
        "VLLM_PLUGINS, or unset the variable"
    )


def _register() -> None:
    from adaptive_moe.engines import process
    from adaptive_moe.engines.on_import import when_imported
    from adaptive_moe.kernels.aiter import find_aiter
    from adaptive_moe.settings import Mode

    _log_as_vllm()
    _teach_envs()
    settings = process.asked_for()
    if settings is None:
        return
    found = find_aiter()
    if found.problem is not None:
        # Each of vLLM's processes comes by here; the first one speaks for them.
        if multiprocessing.parent_process() is None:
            logger.warning("the dispatch policy has no effect here: %s", found.problem)
        return
    process.install(settings)
    if settings.mode is Mode.AUTO:
        when_imported(KERNEL_WARMUP, _wrap_kernel_warmup)


def _teach_envs() -> None:
    """Every reader of the variable in vLLM goes through this table of parsers."""
    from vllm import envs

    parsers: dict[str, Callable[[], Any]] | None = getattr(envs, "environment_variables", None)
    if parsers is None:
        logger.warning(
            "this vLLM has no vllm.envs.environment_variables, so it cannot be taught the word "
            "auto: set ADAPTIVE_MOE_DISPATCH_POLICY=auto instead of %s",
            VARIABLES[0],
        )
        return
    parsers[VARIABLES[0]] = policy_for_vllm


def policy_for_vllm() -> int:
    """What vLLM reads: the integer that was set, and 0, AITER's own choice, for `auto` or nothing.

    Raises SettingsError, a ValueError as vLLM's own parser would, for what is not accepted.
    """
    from adaptive_moe.settings import read_settings

    return read_settings(os.environ).fixed_policy or 0


def _wrap_kernel_warmup(module: ModuleType) -> None:
    original = getattr(module, "kernel_warmup", None)
    if original is None:
        logger.warning(
            "this vLLM has no kernel_warmup, so nothing will be calibrated and AITER's own policy "
            "stays: use a vLLM from 0.22.1 to 0.33.0, or call adaptive_moe.warm_up() yourself"
        )
        return
    if hasattr(original, "warms_up_adaptive_moe"):  # plugins may be loaded twice
        return

    @functools.wraps(original)
    def kernel_warmup(worker: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(worker, *args, **kwargs)
        # Said to a worker that joins engines at work (elastic expert parallelism): no rank comes
        # but this one. It is warmed up once more, like the others, before its graphs are captured.
        if kwargs.get("process_local_only"):
            return result
        try:
            _warm_up(worker)
        except Exception:
            logger.exception("warm-up failed; AITER's own policy stays where nothing was measured")
        return result

    kernel_warmup.warms_up_adaptive_moe = True  # type: ignore[attr-defined]
    # gpu_worker and others import it by name, some of them before this plugin is loaded.
    for name, other in list(sys.modules.items()):
        # Not getattr: vLLM has modules that import, or raise, when asked for a name.
        held = vars(other) if name.startswith("vllm.") and isinstance(other, ModuleType) else {}
        if held.get("kernel_warmup") is original:
            held["kernel_warmup"] = kernel_warmup


def _warm_up(worker: Any) -> None:
    from adaptive_moe.engines import process

    config = worker.vllm_config
    process.warm_up(
        max_tokens=config.scheduler_config.max_num_batched_tokens,
        capture_sizes=config.compilation_config.cudagraph_capture_sizes or (),
        agree=True,
    )


def _log_as_vllm() -> None:
    """Our lines through vLLM's handlers and at its level, unless the user configured ours.

    As a child of vLLM's logger, whatever that is set up with: vLLM does it after loading plugins.
    """
    if logger.handlers or logger.level != logging.NOTSET:
        return
    logger.parent = logging.getLogger("vllm")
    logger.setLevel(logging.NOTSET)  # forgets which levels were on under the old parent
