"""Is a candidate right: does it return what the baseline returns, in everything a consumer reads?

The baseline defines right. The contract checker (kernels/contract.py), which proves our own
kernels, only gives a warning where a live baseline breaks our reading of it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from adaptive_moe.kernels import Candidate
from adaptive_moe.kernels.contract import (
    Expected,
    SortingInputs,
    check_contract,
    differences_from,
    expected,
    poisoned_memory,
)
from adaptive_moe.policy.decision import Standing
from adaptive_moe.tuning.race import short

logger = logging.getLogger("adaptive_moe")


@dataclass(frozen=True)
class Exclusion:
    """Why a candidate is none for this coverage at all."""

    standing: Standing  # WRONG or FAILED
    reason: str


def check_candidates(
    candidates: Sequence[Candidate], inputs: SortingInputs, accumulate: bool
) -> tuple[dict[str, Exclusion], list[str]]:
    """Run each candidate once on poisoned memory and compare it with the baseline, the first.

    Returns what is excluded by name, and how the baseline breaks our reading of the contract. This
    is also each candidate's first call, in which kernels may compile: never timed. An exception of
    the baseline passes through: without it nothing can be said.
    """
    baseline, *others = candidates
    with poisoned_memory():
        outputs = baseline.bind(inputs)()
    surprises = check_contract(inputs, outputs, accumulate=accumulate)
    right = expected(outputs)
    del outputs  # moe_buf is as large as the batch's activations
    found: dict[str, Exclusion] = {}
    for candidate in others:
        try:
            problems = _compare(candidate, inputs, right)
        # A candidate may fail in any way its kernel likes; that must only cost it the candidacy.
        except Exception as error:
            found[candidate.name] = Exclusion(Standing.FAILED, f"raised {short(error)}")
            continue
        if problems:
            found[candidate.name] = Exclusion(Standing.WRONG, "; ".join(problems))
    return found, surprises


def _compare(candidate: Candidate, inputs: SortingInputs, right: Expected) -> list[str]:
    """How its outputs differ; they are freed before the next candidate runs."""
    with poisoned_memory():
        outputs = candidate.bind(inputs)()
    return differences_from(right, outputs, inputs)
