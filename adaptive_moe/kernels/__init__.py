"""Who sorts: one calling convention (AITER's own) in front of every kernel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# AITER's seam, `aiter.fused_moe.moe_sorting(topk_ids, topk_weights, num_experts, model_dim,
# moebuf_dtype, block_size, expert_mask, num_local_tokens, dispatch_policy, ...)`: the same
# positional arguments for every kernel, see contract.py for what goes in and comes out.
MoeSorting = Callable[..., "tuple[torch.Tensor, ...]"]

POLICIES = (0, 1, 2)


class KernelUnavailableError(RuntimeError):
    """The kernel asked for cannot run here; the text says why and what would."""


@dataclass(frozen=True)
class SortKernel:
    """A sort to calibrate.

    name      such as `cpu`, `triton` or `aiter 0.1.9`; part of what a calibration is valid for
    policies  the dispatch policies it takes; the first is 0
    """

    name: str
    moe_sorting: MoeSorting
    device: "torch.device"
    policies: tuple[int, ...] = POLICIES


def load_kernel(name: str) -> SortKernel:
    """`cpu` or `triton`. Raises KernelUnavailableError, or ValueError for another name."""
    import torch

    if name == "cpu":
        from adaptive_moe.kernels import cpu_sort

        return SortKernel("cpu", cpu_sort.moe_sorting, torch.device("cpu"))
    if name == "triton":
        if not torch.cuda.is_available():
            raise KernelUnavailableError(
                "kernel 'triton' needs a GPU that torch can see, and torch "
                f"{torch.__version__} sees none: use --kernel cpu, or a machine with a GPU"
            )
        try:
            from adaptive_moe.kernels import triton_sort
        except ImportError as error:
            raise KernelUnavailableError(
                f"kernel 'triton' needs the package triton ({error}): "
                "pip install 'adaptive-moe[triton]'"
            ) from error
        device = torch.device("cuda", torch.cuda.current_device())
        return SortKernel("triton", triton_sort.moe_sorting, device)
    raise ValueError(f"kernel {name!r} is not known: give cpu or triton")
