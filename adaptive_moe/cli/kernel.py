"""Who sorts: --kernel auto, or what was asked for, and why that one in words."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptive_moe.kernels import SortKernel

REHEARSAL = (
    "on the CPU kernel: this is a rehearsal that tunes nothing, since no engine sorts with it"
)


def choose(asked: str) -> tuple[str, str]:
    """aiter, triton or cpu, and why in words for whoever reads the result."""
    import torch

    from adaptive_moe.kernels.aiter import find_aiter

    if asked == "cpu":
        return "cpu", REHEARSAL
    aiter, gpu = find_aiter(), torch.cuda.is_available()
    if asked == "aiter":
        return "aiter", f"on AITER {aiter.version}, which is what engines sort with"
    if asked == "triton":
        return (
            "triton",
            "on our Triton kernel, which engines use only where ADAPTIVE_MOE_SORTS says so",
        )
    if aiter.problem is None and gpu:
        return "aiter", f"on AITER {aiter.version}, which is what engines sort with"
    why = aiter.problem or "AITER needs a GPU, and torch sees none"
    if gpu and _has_triton():
        return "triton", f"on our Triton kernel: {why}"
    return "cpu", f"{REHEARSAL}; {why}"


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
