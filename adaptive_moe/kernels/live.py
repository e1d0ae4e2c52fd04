"""The live AITER as a kernel to measure: its seam under every policy, and the sorts beside it."""

import contextvars
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from adaptive_moe.kernels import POLICIES, Candidate, SortKernel, policy_name
from adaptive_moe.kernels.aiter import installed_version
from adaptive_moe.kernels.call import Buffer, SortCall
from adaptive_moe.kernels.identity import content, digest, replacements
from adaptive_moe.kernels.sorts import POLICIES_WORD, OtherSort, offered, say_once
from adaptive_moe.policy.coverage import Coverage

if TYPE_CHECKING:
    from adaptive_moe.kernels import Call
    from adaptive_moe.kernels.contract import SortingInputs

# With so many experts policy 1 never returns. AITER's one-shot kernel has 8,192 integers of LDS for
# a table of one column per expert and at least ten rows: two for counts, and tokens in steps of
# eight. 8,192 // (819 + 1) is nine, so its loop over tokens has a step of 0. Policy 0 does not
# choose the kernel there. Source: moe_sorting_get_smem_row_col in AITER's moe_sorting_opus.h.
ONE_SHOT_NEVER_RETURNS_FROM = 819


def live_kernel(
    seen: SortCall, coverage: Coverage, sorts: Sequence[str] = (POLICIES_WORD,)
) -> tuple[SortKernel, dict[str, Callable[..., Any]]]:
    """The candidates for such calls, the baseline first; and the functions that serve under the
    names of other sorts. sorts: names of kernels/sorts.py."""
    shape = coverage.shape
    policies = _policies(seen, coverage) if POLICIES_WORD in sorts else []
    others = offered(seen, shape, sorts)
    if coverage.padding_rows:
        for sort in others:
            if not sort.takes_padding:
                _not_offered(sort.name, coverage, "it may use such an id as an index")
        others = [sort for sort in others if sort.takes_padding]
    candidates = (
        *(Candidate(policy_name(p), _seam(seen, p)) for p in (seen.baseline, *policies)),
        *(Candidate(sort.name, _other(seen, sort)) for sort in others),
    )
    kernel = SortKernel(name(seen, others), seen.device, candidates)
    return kernel, {sort.name: sort.call for sort in others}


def name(seen: SortCall, others: Sequence[OtherSort] = ()) -> str:
    """What a calibration of it is valid for: version, backends, and a digest of all their
    sources, since a source checkout keeps its version over pulls."""
    found = f"aiter {installed_version()} {seen.backend(seen.baseline)}"
    by_policy = {seen.backend(policy) for policy in POLICIES} - {seen.backend(seen.baseline)}
    found += "".join(f" or {other}" for other in sorted(by_policy))
    found += "".join(f", {name}" for name in replacements(seen.module, seen.seam))
    found += f", {content(seen.module, seen.seam)}"
    if others:
        found += f", {digest((), [sort.identity.encode() for sort in others])}"
    return found


def _policies(seen: SortCall, coverage: Coverage) -> list[int]:
    """The policies to try beside the baseline.

    Rows of padding have expert ids of -1 (docs/engines.md), and some of AITER's kernels use such an
    id as an index. Multi-phase compares ids below 2,048 tokens in every version read, and from
    there on it is what policy 0 runs itself: so beside policy 0 only policy 2 is safe, and beside
    any other baseline none is.
    """
    policies = [p for p in POLICIES if p != seen.baseline]
    if coverage.shape.num_experts >= ONE_SHOT_NEVER_RETURNS_FROM:
        policies = [p for p in policies if p != 1]
    if not coverage.padding_rows:
        return policies
    safe = [2] if seen.baseline == 0 else []
    for policy in policies:
        if policy not in safe:
            why = f"its kernel may use such an id as an index where {coverage.baseline} does not"
            _not_offered(policy_name(policy), coverage, why)
    return [p for p in policies if p in safe]


def _not_offered(candidate: str, coverage: Coverage, why: str) -> None:
    say_once(
        f"{candidate} is not offered for {coverage.shape.describe()}: rows of padding have expert "
        f"ids of -1, and {why}"
    )


def _seam(seen: SortCall, policy: object) -> Callable[["SortingInputs"], "Call"]:
    def bind(inputs: "SortingInputs") -> "Call":
        num_tokens = inputs.topk_ids.shape[0]
        extras = {
            key: value.make(num_tokens, seen.device) if isinstance(value, Buffer) else value
            for key, value in seen.extras.items()
        }
        call = functools.partial(seen.seam, *inputs.arguments(policy), **extras)
        return _without_smaller_batches(call, num_tokens)

    return bind


def _without_smaller_batches(call: "Call", num_tokens: int) -> "Call":
    """The context of the seen call may hold tensors of its batch, and a sort read a row of them for
    each token that it is given, as SGLang's does that quantises small batches. A call of more
    tokens than they have rows is made without them: it would read past their end."""
    import torch

    here = contextvars.copy_context()
    kept = {
        variable: value
        for variable, value in here.items()
        if not (isinstance(value, torch.Tensor) and value.ndim and len(value) < num_tokens)
    }
    if len(kept) == len(here):
        return call
    context = contextvars.Context()
    for variable, value in kept.items():
        context.run(variable.set, value)
    return functools.partial(context.run, call)


def _other(seen: SortCall, sort: OtherSort) -> Callable[["SortingInputs"], "Call"]:
    accumulate = seen.extras.get("accumulate", True)

    def bind(inputs: "SortingInputs") -> "Call":
        call = functools.partial(sort.call, *inputs.arguments(0)[:-1], accumulate)
        return _without_smaller_batches(call, inputs.topk_ids.shape[0])

    return bind
