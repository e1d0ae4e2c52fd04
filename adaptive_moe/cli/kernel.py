"""The kernel that sorts: --kernel auto, or the one that was given, and why that one in words."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from adaptive_moe.kernels import SortKernel
    from adaptive_moe.policy.coverage import Coverage, Situation
    from adaptive_moe.tuning.clocks import Clock

# Our own kernels, best first, and what it means to calibrate one.
WHY = {
    "triton": "on our Triton kernel, which engines use only where ADAPTIVE_MOE_SORTS says so",
    "cpu": (
        "on the CPU kernel: this is a rehearsal that tunes nothing, since no engine sorts with it"
    ),
}
# Tokens of the call of AITER's sort that shows how it returns its results.
_FIRST_TOKENS = 8


def choose(asked: str) -> tuple[str, str]:
    """aiter, triton or cpu, and why in words for whoever reads the result.

    Raises KernelUnavailableError where AITER is asked for by name and cannot be used.
    """
    import torch

    from adaptive_moe.kernels import KernelUnavailableError
    from adaptive_moe.kernels.aiter import find_aiter

    if asked in WHY:
        return asked, WHY[asked]
    aiter, gpu = find_aiter(), torch.cuda.is_available()
    if asked == "aiter" and aiter.problem is not None:
        raise KernelUnavailableError(
            f"--kernel aiter cannot run here, {aiter.problem}: run this where the engine serves; "
            "--kernel cpu rehearses it"
        )
    if asked == "aiter" or (aiter.problem is None and gpu):
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


def cpu_clock(situation: "Situation", device: "torch.device") -> "Clock":
    """The processor's time of the one thread that sorts, which other work on the machine does not
    lengthen as it does a wall clock's."""
    import time

    from adaptive_moe.tuning.clocks import Neutral, WallClock

    return WallClock(time.thread_time, Neutral(device))


def load_aiter(coverage: "Coverage", sorts: tuple[str, ...]) -> "SortKernel":
    """AITER's sort as it is installed, called with no argument beyond the ninth, and the other
    sorts of these names. It runs once, with a few tokens: what it returns says which other sorts
    can answer for it.

    Raises KernelUnavailableError where AITER cannot be imported or is not one we know.
    """
    from importlib import import_module

    import torch

    from adaptive_moe.kernels import KernelUnavailableError
    from adaptive_moe.kernels.aiter import MODULE, SEAM, seam_problem
    from adaptive_moe.kernels.call import Live, is_rounded
    from adaptive_moe.kernels.live import live_kernel
    from adaptive_moe.tuning.inputs import Routing, default_mask, route, sorting_inputs

    try:
        module = import_module(MODULE)
    # AITER raises anything at import: no GPU, no compiler, a missing library.
    except Exception as error:
        raise KernelUnavailableError(f"{MODULE} cannot be imported: {error}") from error
    if (problem := seam_problem(module)) is not None:
        raise KernelUnavailableError(problem)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    if not gpu:
        torch.set_num_threads(1)  # as engines' workers have it
    shape, seam = coverage.shape, getattr(module, SEAM)
    tokens = route(shape, _FIRST_TOKENS, Routing.UNIFORM, 0, device)
    inputs = sorting_inputs(shape, tokens, _FIRST_TOKENS, default_mask(shape, device))
    outputs = seam(*inputs.arguments(0))
    rounded = is_rounded(outputs, _FIRST_TOKENS, shape.topk, shape.num_experts, shape.block_size)
    live = Live(module, seam, device, 0, {}, rounded, len(outputs))
    kernel, _ = live_kernel(live, coverage, sorts)
    return kernel


def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None
