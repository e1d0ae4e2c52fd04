"""The live AITER as a kernel to measure: its seam under every policy, and the sorts beside it."""

import contextvars
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_moe.kernels import POLICIES, Candidate, SortKernel, policy_name
from adaptive_moe.kernels.aiter import installed_version
from adaptive_moe.kernels.aiter_padding import (
    Kernel,
    kernels_for,
    one_shot_rows,
    refusal,
    unguarded,
)
from adaptive_moe.kernels.call import Buffer, Live
from adaptive_moe.kernels.identity import content, digest, strangers
from adaptive_moe.kernels.sorts import POLICIES as POLICIES_WORD
from adaptive_moe.kernels.sorts import OtherSort, offered, say_once
from adaptive_moe.policy.coverage import Coverage

if TYPE_CHECKING:
    from adaptive_moe.kernels import Call
    from adaptive_moe.kernels.contract import SortingInputs


def live_kernel(
    live: Live, coverage: Coverage, sorts: Sequence[str] = (POLICIES_WORD,)
) -> tuple[SortKernel, dict[str, Callable[..., Any]]]:
    """Who may answer such calls, the baseline first; and what serves by the names of other sorts.

    sorts: names of sorts.py. Left out, with one line each that says why, is whose kernel takes ids
    of -1 for indices where rows of padding occur, unless the baseline runs that very kernel.
    """
    shape = coverage.shape
    policies = list(_policies(live, shape.num_experts)) if POLICIES_WORD in sorts else []
    others = offered(live, shape, sorts)
    if coverage.padding_rows:
        policies = [p for p in policies if _takes_padding(live, coverage, p, live.backend(p))]
        others = [
            sort
            for sort in others
            if sort.backend is None or _takes_padding(live, coverage, sort.name, sort.backend)
        ]
    candidates = (
        *(Candidate(policy_name(p), _seam(live, p)) for p in (live.baseline, *policies)),
        *(Candidate(sort.name, _other(live, sort)) for sort in others),
    )
    kernel = SortKernel(name(live, others), live.device, candidates)
    return kernel, {sort.name: sort.call for sort in others}


def name(live: Live, others: Sequence[OtherSort] = ()) -> str:
    """What a calibration of it is valid for: version, who sorts, and a digest of all their
    sources, since a source checkout keeps its version over pulls."""
    found = f"aiter {installed_version()} {live.backend(live.baseline)}"
    by_policy = {live.backend(policy) for policy in POLICIES} - {live.backend(live.baseline)}
    found += "".join(f" or {other}" for other in sorted(by_policy))
    found += "".join(f", {who}" for who in strangers(live.module, live.seam))
    found += f", {content(live.module, live.seam)}"
    if others:
        found += f", {digest((), [sort.identity.encode() for sort in others])}"
    return found


def _policies(live: Live, num_experts: int) -> Iterator[int]:
    """The policies to try beside the baseline."""
    for policy in POLICIES:
        # With so many experts the one-shot kernel never returns; policy 0 does not choose it.
        never_returns = policy == 1 and one_shot_rows(num_experts) == 0
        if policy != live.baseline and not never_returns:
            yield policy


def _seam(live: Live, policy: object) -> Callable[["SortingInputs"], "Call"]:
    def bind(inputs: "SortingInputs") -> "Call":
        num_tokens = inputs.topk_ids.shape[0]
        extras = {
            key: value.make(num_tokens, live.device) if isinstance(value, Buffer) else value
            for key, value in live.extras.items()
        }
        call = functools.partial(live.seam, *inputs.arguments(policy), **extras)
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


def _other(live: Live, sort: OtherSort) -> Callable[["SortingInputs"], "Call"]:
    accumulate = live.extras.get("accumulate", True)

    def bind(inputs: "SortingInputs") -> "Call":
        call = functools.partial(sort.call, *inputs.arguments(0)[:-1], accumulate)
        return _without_smaller_batches(call, inputs.topk_ids.shape[0])

    return bind


def _takes_padding(live: Live, coverage: Coverage, candidate: object, backend: str) -> bool:
    """May that candidate be given rows of -1, at every count that there is?"""
    shape = coverage.shape
    unsafe = _unguarded(Path(live.module.__file__ or "").parent, installed_version())
    policy = candidate if isinstance(candidate, int) else 0
    for count in _telling_counts(coverage):
        at = (count, shape.num_experts, shape.topk)
        runs = kernels_for(backend, policy, *at)
        baseline = kernels_for(live.backend(live.baseline), int(live.baseline), *at)
        why = refusal(unsafe, runs, baseline)
        if why is not None:
            word = candidate if isinstance(candidate, str) else policy_name(candidate)
            say_once(f"{word} is not offered for {shape.describe()}: {why}")
            return False
    return True


def _telling_counts(coverage: Coverage) -> list[int]:
    """Counts among which each kernel occurs that occurs at any: kernels change at few counts."""
    rows = one_shot_rows(coverage.shape.num_experts)
    edges = {1, *(edge + one for edge in (*range(16, 257), rows, 2047, 2048) for one in (0, 1))}
    spans = (*coverage.eager, *((count, count) for count in coverage.captured))
    edges |= {count for span in spans for count in span}
    return sorted(e for e in edges if any(first <= e <= last for first, last in spans))


@functools.lru_cache(maxsize=4)
def _unguarded(package: Path, version: str) -> Mapping[Kernel, str]:
    return unguarded(package, version, os.environ)
