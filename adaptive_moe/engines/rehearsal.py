"""What an engine's first forward would show the hook, without the engine's model: for calibrating
before anything is served.

AITER's own fused_moe is called as the engine calls it, with weights that have a shape but no
memory, and is left right after the sort. So the hook sees a call with every argument that this
AITER gives the sort, and how its chooser was asked for the block size. From there on it is an
engine's warm-up like any other (warm_up.py): the same counts, the same keys, the same store.

What is known of an engine's calls was read in vLLM 0.22.1 to 0.33.0 and SGLang 0.5.20 to 0.5.23.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from adaptive_moe.engines import sglang, vllm
from adaptive_moe.engines.hook import AiterHook
from adaptive_moe.kernels.aiter import MODULE, SEAM
from adaptive_moe.settings import Settings
from adaptive_moe.shape import SortingShape

if TYPE_CHECKING:
    import torch

PLAIN = "plain"

# Names of AITER's QuantType, and of the weights' dtype in aiter.dtypes, "" being the layer's own;
# and how many values one element of such weights holds.
QUANTS = {
    "none": ("No", "", 1),
    "fp8": ("per_Token", "fp8", 1),
    "fp8-block": ("per_1x128", "fp8", 1),
    "mxfp4": ("per_1x32", "fp4x2", 2),
}


class RehearsalError(RuntimeError):
    """The engine's call could not be made here; the text says why."""


@dataclass(frozen=True)
class EngineCalls:
    """What decides a key besides the layer: who asks, what it passes, and whether rows of -1 occur.

    name    and version, as the engine's plugin has it
    policy  what it passes where its user chose nothing
    """

    name: str
    policy: int = 0
    padding_rows: bool = False


@dataclass(frozen=True)
class MoeLayer:
    """One layer as this rank holds it.

    inter_dim   columns of an expert's hidden activations on this rank
    quant       of the weights, a name of QUANTS
    block_size  None: AITER chooses
    """

    shape: SortingShape
    inter_dim: int
    quant: str = "none"
    block_size: int | None = None


def calls_of(engine: str) -> EngineCalls:
    """How `plain`, `vllm` or `sglang` calls AITER here. RehearsalError where it is not installed:
    its version is in the key."""
    if engine == PLAIN:
        return EngineCalls(PLAIN)
    try:
        name = f"{engine} {importlib.metadata.version(engine)}"
        if engine == "vllm":
            return EngineCalls(name, padding_rows=vllm.has_padding_rows())
        sglang.patch_small_sort()
        return EngineCalls(name, sglang.engine_policy(), sglang.has_padding_rows())
    except (importlib.metadata.PackageNotFoundError, ImportError) as error:
        raise RehearsalError(
            f"--for {engine} needs {engine} installed here ({error}): a table is kept for its "
            "version; run this where it serves, or leave --for out"
        ) from error


def rehearse(
    layer: MoeLayer, num_tokens: int, calls: EngineCalls, settings: Settings, device: "torch.device"
) -> AiterHook:
    """A hook on this process's AITER that has seen the engine's call of that layer.

    Args:
        num_tokens: the largest batch; an engine's first forward has that many.
        settings: who may compete, as in serving.

    Raises:
        RehearsalError: AITER cannot be imported here, or never came to the sort.
    """
    try:
        module = import_module(MODULE)
    # AITER raises anything at import: no GPU, no compiler, a missing library.
    except Exception as error:
        raise RehearsalError(f"{MODULE} cannot be imported: {error}") from error
    hook = AiterHook(settings, engine_policy=calls.policy)
    if not hook.install(module):
        raise RehearsalError(f"{MODULE} has no sort that can be chosen for: see the warning above")
    came, problem = _until_sorted(
        module, lambda: _forward(module, layer, num_tokens, calls, device)
    )
    if not came:
        raise RehearsalError(f"AITER's fused_moe did not come to its sort: {problem}")
    if not hook.seen:
        raise RehearsalError("AITER sorts this layer in a way that no policy changes")
    return hook


class _SortedError(Exception):
    """The sort has run, and there is nothing to see after it."""


def _until_sorted(module: ModuleType, forward: Callable[[], Any]) -> tuple[bool, str]:
    """Run the forward up to the end of its sort; did it come there, and what else happened."""
    sort = getattr(module, SEAM)
    came = False

    def sort_and_leave(*args: Any, **kwargs: Any) -> Any:
        nonlocal came
        sort(*args, **kwargs)
        came = True
        raise _SortedError

    setattr(module, SEAM, sort_and_leave)
    try:
        forward()
    # Between us and the sort are torch's custom ops, which may change the exception.
    except Exception as error:
        return came, f"{type(error).__name__}: {error}"
    finally:
        setattr(module, SEAM, sort)
    return came, "it returned without one"


def _forward(
    module: ModuleType, layer: MoeLayer, num_tokens: int, calls: EngineCalls, device: "torch.device"
) -> None:
    import torch

    from adaptive_moe.tuning.routing import Routing, default_mask, route, sorting_inputs

    shape = layer.shape
    aiter = import_module("aiter")
    quant, weights, packed = QUANTS[layer.quant]
    dtype = getattr(torch, shape.dtype)
    weight_dtype = getattr(aiter.dtypes, weights) if weights else dtype
    tokens = route(shape, num_tokens, Routing.UNIFORM, 0, device)
    mask = default_mask(shape, device)
    inputs = sorting_inputs(shape, tokens, num_tokens, mask)
    experts = shape.local_experts or shape.num_experts
    options: dict[str, Any] = {}
    if calls.policy:
        options["moe_sorting_dispatch_policy"] = calls.policy
    if layer.block_size is not None:
        options["block_size_M"] = layer.block_size
    # One element each, seen as many: AITER reads their shapes before the sort, and nothing else.
    hidden = torch.empty((), dtype=dtype, device=device)
    one = torch.empty((), dtype=weight_dtype, device=device)
    module.fused_moe(
        hidden.expand(num_tokens, shape.model_dim),
        one.expand(experts, 2 * layer.inter_dim, shape.model_dim // packed),
        one.expand(experts, shape.model_dim, layer.inter_dim // packed),
        inputs.topk_weights,
        inputs.topk_ids,
        expert_mask=mask,
        quant_type=getattr(aiter.QuantType, quant),
        num_local_tokens=inputs.num_local_tokens,
        **options,
    )
