"""What one file of the store holds, and the key that says what it is good for. Pure.

Everything that can change the answer is in the key, and a file answers only a request with exactly
that key. A file is believed only whole: unaltered since it was written, of this schema, holding a
table that passes every check a fresh one passes and choosing what its own measurements support.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Rule, Standing, Verdict, conclude
from adaptive_moe.policy.environment import Environment, describe_environment
from adaptive_moe.policy.evidence import DECISION_VERSION, SCHEMA, Calibration
from adaptive_moe.policy.losses import combine
from adaptive_moe.policy.plain import differences, from_plain, to_plain
from adaptive_moe.policy.coverage import Situation
from adaptive_moe.policy.table import PolicyTable

if TYPE_CHECKING:
    from adaptive_moe.kernels import SortKernel
    from adaptive_moe.tuning.calibrator import Plan

__all__ = ["DECISION_VERSION", "Key", "Request", "Stored", "check", "differences", "key_for"]


@dataclass(frozen=True)
class Request:
    """The part of a key that a calibration does not record itself.

    engine    who asked, and its version, such as `vllm 0.33.0`; it decides what runs around a sort
    first     token counts measured first, empty for the default grid
    decision  DECISION_VERSION of who measured
    """

    engine: str
    first: tuple[int, ...] = ()
    decision: int = DECISION_VERSION


@dataclass(frozen=True)
class Key:
    """Everything that can change the answer. The budget is not in it: it changes how much is
    settled, not what is true, and a table measured at leisure may serve a hurried start.

    kernel identifies by content what lies below the seam (kernels/); coverage holds the baseline
    and the caller's context.
    """

    request: Request
    environment: Environment
    kernel: str
    candidates: tuple[str, ...]
    coverage: Coverage
    rule: Rule
    schema: int

    def file_name(self) -> str:
        """Such as `256x8-7168-bfloat16-b32-vllm-0.33.0-amd-mi300x-0123456789abcdef.json`."""
        shape = self.coverage.shape
        words = (
            f"{shape.num_experts}x{shape.topk}-{shape.model_dim}-{shape.dtype}-b{shape.block_size}"
            f"-{self.request.engine}-{self.environment.device}"
        )
        readable = re.sub(r"[^a-z0-9_.]+", "-", words.lower()).strip("-.")[:100]
        text = json.dumps(to_plain(self), sort_keys=True)
        return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


@dataclass(frozen=True)
class Stored:
    """One file's content."""

    request: Request
    table: PolicyTable

    @property
    def key(self) -> Key:
        """The only request this file answers. Derived, so that it cannot contradict the table."""
        found = self.table.evidence
        return Key(
            self.request,
            found.environment,
            found.kernel,
            found.candidates,
            found.coverage,
            found.rule,
            found.schema,
        )

    def to_text(self) -> str:
        """JSON whose first line holds the hash of the rest."""
        request = json.dumps(to_plain(self.request))
        body = f'"request": {request},\n"calibration": {self.table.to_json()}\n}}\n'
        return _hash_line(body) + body

    @classmethod
    def from_text(cls, text: str) -> "Stored":
        """Rebuild what `to_text` wrote; ValueError for anything else, down to a changed space."""
        first, newline, body = text.partition("\n")
        if first + newline != _hash_line(body):
            raise ValueError("its content is not what was written there (the hash differs)")
        request, _, calibration = body.partition("\n")
        request = request.removeprefix('"request": ').removesuffix(",")
        calibration = calibration.removeprefix('"calibration": ').removesuffix("\n}\n")
        try:
            plain = json.loads(request)
        except RecursionError:
            raise ValueError("the JSON is nested too deeply") from None
        table = PolicyTable.from_json(calibration)
        check(table.evidence)
        return cls(from_plain(Request, plain, "request"), table)


def key_for(kernel: "SortKernel", coverage: Coverage, plan: "Plan", engine: str) -> Key:
    """The key of what `calibrate(kernel, coverage, plan)` would measure here and now, for an engine
    such as `vllm 0.33.0`."""
    return Key(
        Request(engine, tuple(plan.first)),
        describe_environment(kernel.device),
        kernel.name,
        tuple(candidate.name for candidate in kernel.candidates),
        coverage.on(kernel.device.type),
        plan.rule,
        SCHEMA,
    )


def check(found: Calibration) -> None:
    """Raise ValueError where the evidence does not lead to the table it is said to have made, or
    belongs to other token counts than its coverage."""
    for situation in Situation:
        counts, buckets = found.coverage.counts(situation), found.section(situation)
        if situation is Situation.GRAPH and bool(counts) != bool(buckets):
            raise ValueError("graph buckets and captured sizes do not belong together")
        for bucket in buckets:
            if bucket.num_tokens not in counts:
                raise ValueError(
                    f"{bucket.num_tokens} tokens ({situation.value}) are not in its coverage"
                )
            for result in (r for verdict in bucket.verdicts for r in verdict.results):
                if not (result.gain or 0.0) < 1.0 or not (result.median_us or 0.0) >= 0.0:
                    raise ValueError(f"its measurements are impossible: {result}")
            fits = bool(bucket.fills) and all(_supported(v, found) for v in bucket.verdicts)
            if not fits or combine(bucket.verdicts, found.rule.margin)[0] != bucket.candidate:
                raise ValueError(
                    f"{bucket.candidate} at {bucket.num_tokens} tokens is not what its own "
                    "measurements support"
                )


def _supported(verdict: Verdict, found: Calibration) -> bool:
    """Is the verdict's candidate the one that its results lead to?"""
    results = verdict.results
    sure = (
        r.gain_low is not None and r.gain_low > found.rule.margin
        for r in results
        if r.standing is Standing.FASTER
    )
    return (
        tuple(r.candidate for r in results) == found.candidates
        and all(sure)
        and conclude(results, verdict.rounds).candidate == verdict.candidate
    )


def _hash_line(body: str) -> str:
    return f'{{"sha256": "{hashlib.sha256(body.encode(errors="replace")).hexdigest()}",\n'
