"""The kernels that sort, behind one calling convention: AITER's own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from adaptive_moe.kernels.contract import SortingInputs

# AITER's seam, `aiter.fused_moe.moe_sorting(topk_ids, topk_weights, num_experts, model_dim,
# moebuf_dtype, block_size, expert_mask, num_local_tokens, dispatch_policy, ...)`: the same
# positional arguments for every kernel, see contract.py for what goes in and comes out.
MoeSorting = Callable[..., "tuple[torch.Tensor, ...]"]

POLICIES = (0, 1, 2)

# One prepared sort: runs it once, and returns its outputs.
Call = Callable[[], "tuple[torch.Tensor, ...]"]


class KernelUnavailableError(RuntimeError):
    """The kernel asked for cannot run here; the text says why and what would."""


@dataclass(frozen=True)
class Candidate:
    """One way to answer a sort.

    name  such as `policy 1` or `flydsl`; what tables, logs and keys call it
    bind  makes the call that sorts these inputs, so that timing it adds nothing to it
    """

    name: str
    bind: Callable[["SortingInputs"], Call]


@dataclass(frozen=True)
class SortKernel:
    """A sort to calibrate: what would run without us, and what may take its place.

    name        such as `cpu`, `triton` or `aiter 0.1.22 opus ...`; what a calibration is valid for
    candidates  the first is the baseline
    """

    name: str
    device: "torch.device"
    candidates: tuple[Candidate, ...]

    @property
    def baseline(self) -> Candidate:
        return self.candidates[0]


def policy_name(policy: object) -> str:
    """The name of a dispatch policy as a candidate: `policy 2`; `policy True` of a bool schema."""
    return f"policy {policy}"


def policy_candidates(
    moe_sorting: MoeSorting, baseline: object = 0, policies: Sequence[int] = POLICIES
) -> tuple[Candidate, ...]:
    """The dispatch policies of a sort as candidates, the baseline first."""
    others = [policy for policy in policies if policy != baseline]
    return tuple(_policy_candidate(moe_sorting, policy) for policy in (baseline, *others))


def _policy_candidate(moe_sorting: MoeSorting, policy: object) -> Candidate:
    def bind(inputs: "SortingInputs") -> Call:
        return partial(moe_sorting, *inputs.arguments(policy))

    return Candidate(policy_name(policy), bind)


def load_kernel(name: str) -> SortKernel:
    """`cpu` or `triton`. Raises KernelUnavailableError, or ValueError for another name."""
    import torch

    if name == "cpu":
        from adaptive_moe.kernels import cpu_sort

        return SortKernel("cpu", torch.device("cpu"), policy_candidates(cpu_sort.moe_sorting))
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
                f"kernel 'triton' needs the package triton ({error}): pip install triton"
            ) from error
        device = torch.device("cuda", torch.cuda.current_device())
        return SortKernel("triton", device, policy_candidates(triton_sort.moe_sorting))
    raise ValueError(f"kernel {name!r} is not known: give cpu or triton")
