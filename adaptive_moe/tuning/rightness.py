"""Is a candidate right: does it return what the baseline returns, in everything a consumer reads?

The baseline defines right.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from adaptive_moe.kernels import Candidate, SortKernel
from adaptive_moe.kernels.contract import (
    Expected,
    SortingInputs,
    differences_from,
    expected,
    poisoned_memory,
)
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Samples, Standing
from adaptive_moe.policy.situation import Situation
from adaptive_moe.tuning.errors import CalibrationFailedError
from adaptive_moe.tuning.inputs import Inputs
from adaptive_moe.tuning.race import short

logger = logging.getLogger("adaptive_moe")


@dataclass(frozen=True)
class Exclusion:
    """Why a candidate is none for this coverage at all."""

    standing: Standing  # WRONG or FAILED
    reason: str


class Rightness:
    """Which candidates of one calibration are out, everywhere, and why.

    seconds: what checking took so far, kernels compiled in it included; no budget is spent on it.
    """

    def __init__(
        self, kernel: SortKernel, coverage: Coverage, inputs: Inputs, now: Callable[[], float]
    ) -> None:
        self.kernel, self.coverage, self.inputs, self.now = kernel, coverage, inputs, now
        self.seconds = 0.0
        self.excluded: dict[str, Exclusion] = {}
        self._checked: set[tuple[int, float]] = set()

    def check(self, situation: Situation, num_tokens: int) -> None:
        """Check every candidate at that count, as it will be filled; once for each filling."""
        begun = self.now()
        for fill in self.inputs.fills(situation, num_tokens):
            if (num_tokens, fill) not in self._checked:
                self._checked.add((num_tokens, fill))
                self._check(num_tokens, fill)
        self.seconds += self.now() - begun

    def _check(self, num_tokens: int, fill: float) -> None:
        inputs = self.inputs.one(num_tokens, num_tokens, fill)
        still_in = [c for c in self.kernel.candidates if c.name not in self.excluded]
        try:
            found = check_candidates(still_in, inputs)
        # Whatever the baseline raises: without it nothing can be said.
        except Exception as error:
            why = f"at {num_tokens} tokens {self.coverage.baseline} raised {short(error)}"
            raise CalibrationFailedError(why) from error
        for name, exclusion in found.items():
            self.exclude(name, exclusion, num_tokens)

    def exclude(self, candidate: str, why: Exclusion, num_tokens: int) -> None:
        """From here on, and in every bucket measured before, it is no candidate."""
        if candidate == self.coverage.baseline:
            raise CalibrationFailedError(f"at {num_tokens} tokens {candidate} {why.reason}")
        if candidate not in self.excluded:
            self.excluded[candidate] = why
            logger.warning(
                "%s is out for %s: at %d tokens it %s",
                *(candidate, self.coverage.describe(), num_tokens, why.reason),
            )

    def without_excluded(self, samples: Sequence[Samples]) -> list[Samples]:
        """The samples with those excluded marked so, whatever they measured."""
        out = self.excluded
        return [
            replace(s, out=out[s.candidate].standing, reason=out[s.candidate].reason)
            if s.candidate in out
            else s
            for s in samples
        ]


def check_candidates(
    candidates: Sequence[Candidate], inputs: SortingInputs
) -> dict[str, Exclusion]:
    """Run each candidate once on poisoned memory and compare it with the baseline, the first.

    Returns what is excluded by name. This is also each candidate's first call, in which kernels may
    compile: never timed. An exception of the baseline passes through.
    """
    baseline, *others = candidates
    with poisoned_memory():
        outputs = baseline.bind(inputs)()
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
    return found


def _compare(candidate: Candidate, inputs: SortingInputs, right: Expected) -> list[str]:
    """How its outputs differ; they are freed before the next candidate runs."""
    with poisoned_memory():
        outputs = candidate.bind(inputs)()
    return differences_from(right, outputs, inputs)
