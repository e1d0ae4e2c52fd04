"""Who sorts: --kernel auto, or what was asked for, and why that one in words."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptive_moe.kernels import SortKernel

# Our own kernels, best first, and what it means to calibrate one.
WHY = {
    "triton": "on our Triton kernel, which engines use only where ADAPTIVE_MOE_SORTS says so",
    "cpu": (
        "on the CPU kernel: this is a rehearsal that tunes nothing, since no engine sorts with it"
    ),
}


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


def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None
