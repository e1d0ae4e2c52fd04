"""The kernel that sorts: --kernel auto, or the one that was given, and why that one in words."""

from dataclasses import replace
from typing import TYPE_CHECKING

from adaptive_moe.settings import Mode, Settings

if TYPE_CHECKING:
    from adaptive_moe.kernels import SortKernel
    from adaptive_moe.policy.coverage import Coverage

# Our own kernels, best first, and what it means to calibrate one.
WHY = {
    "triton": "on our Triton kernel, which engines use only where ADAPTIVE_MOE_SORTS says so",
    "cpu": (
        "on the CPU kernel, which tunes nothing, since no engine sorts with it: two real "
        "algorithms, neither slowed on purpose, and a rule that picks one of them"
    ),
}
# Tokens of the one call that the hook sees.
_FIRST_TOKENS = 8


def pick(name: str) -> tuple[str, str]:
    """aiter, triton or cpu, for a --kernel of that name or of auto; and why, in words.

    Raises KernelUnavailableError where --kernel names AITER, and it cannot be used.
    """
    import torch

    from adaptive_moe.kernels import KernelUnavailableError
    from adaptive_moe.kernels.aiter import find_aiter

    if name in WHY:
        return name, WHY[name]
    aiter, gpu = find_aiter(), torch.cuda.is_available()
    if name == "aiter" and aiter.problem is not None:
        raise KernelUnavailableError(
            f"--kernel aiter cannot run here, {aiter.problem}: run this where the engine serves; "
            "--kernel cpu shows the method"
        )
    if name == "aiter" or (aiter.problem is None and gpu):
        return "aiter", f"on AITER {aiter.version}, which is what engines sort with"
    name = "triton" if gpu and _has_triton() else "cpu"
    return name, f"{WHY[name]}; {aiter.problem or 'AITER needs a GPU, and torch sees none'}"


def load(name: str) -> "SortKernel":
    """One of our own kernels. On the CPU with one thread of torch: a second one, where something
    else runs on its core, makes the first wait a hundred times as long as a sort takes."""
    import torch

    from adaptive_moe.kernels import load_kernel

    if name == "cpu":
        torch.set_num_threads(1)
    return load_kernel(name)


def load_aiter(coverage: "Coverage", settings: Settings) -> "SortKernel":
    """AITER's sort as it is installed, called with nine arguments, and the other sorts that the
    settings admit. It runs once, with a few tokens: that call is what is measured.

    Raises KernelUnavailableError where AITER cannot be imported or is not one we know.
    """
    from importlib import import_module

    import torch

    from adaptive_moe.hook.hook import AiterHook
    from adaptive_moe.kernels import KernelUnavailableError
    from adaptive_moe.kernels.aiter import MODULE
    from adaptive_moe.tuning.inputs import Routing, default_mask, route, sorting_inputs

    try:
        module = import_module(MODULE)
    # AITER raises anything at import: no GPU, no compiler, a missing library.
    except Exception as error:
        raise KernelUnavailableError(f"{MODULE} cannot be imported: {error}") from error
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    if not gpu:
        torch.set_num_threads(1)  # as engines' workers have it
    hook = AiterHook(replace(settings, mode=Mode.AUTO))
    if not hook.install(module):
        raise KernelUnavailableError(f"{MODULE} has no sort that can be measured, as said above")
    try:
        tokens = route(coverage.shape, _FIRST_TOKENS, Routing.UNIFORM, 0, device)
        mask = default_mask(coverage.shape, device)
        inputs = sorting_inputs(coverage.shape, tokens, _FIRST_TOKENS, mask)
        module.moe_sorting(*inputs.arguments(0))
        (call,) = hook.seen.values()
        return hook.kernel(call, call.key, coverage)
    finally:
        hook.uninstall()


def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None
