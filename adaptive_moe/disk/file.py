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

from adaptive_moe.policy.buckets import check_domain
from adaptive_moe.policy.decision import Rule, Standing, combine
from adaptive_moe.policy.environment import Environment, describe_environment
from adaptive_moe.policy.plain import from_plain, to_plain
from adaptive_moe.policy.table import SCHEMA, Bucket, PolicyTable
from adaptive_moe.shape import SortingShape

if TYPE_CHECKING:
    from adaptive_moe.kernels import SortKernel
    from adaptive_moe.tuning.calibrator import Plan

# Raise when the same samples would be taken, judged or interpolated differently than before.
DECISION_VERSION = 2


@dataclass(frozen=True)
class Request:
    """The part of a key that a calibration does not record itself.

    capture_sizes  token counts captured into graphs, empty where calls are timed eagerly only
    first          token counts measured first, empty for the default grid
    """

    decision: int
    capture_sizes: tuple[int, ...]
    first: tuple[int, ...]


@dataclass(frozen=True)
class Key:
    """Everything that can change the answer. The budget is not in it: it changes how much is
    settled, not what is true, and a table measured at leisure may serve a hurried start."""

    request: Request
    environment: Environment
    kernel: str
    policies: tuple[int, ...]
    shape: SortingShape
    max_tokens: int
    rule: Rule
    schema: int

    def file_name(self) -> str:
        """Such as `256x8-7168-bfloat16-b32-amd-instinct-mi300x-0123456789abcdef.json`."""
        shape = self.shape
        words = (
            f"{shape.num_experts}x{shape.topk}-{shape.model_dim}-{shape.dtype}-b{shape.block_size}"
            f"-{self.environment.device}"
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
            found.policies,
            found.shape,
            found.max_tokens,
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
        stored = cls(from_plain(Request, plain, "request"), PolicyTable.from_json(calibration))
        try:
            stored._check()
        except ArithmeticError as error:  # such as a gain of all the time there is
            raise ValueError(f"its measurements are impossible: {error}") from None
        return stored

    def _check(self) -> None:
        found = self.table.evidence
        if bool(found.graph) != bool(self.request.capture_sizes):
            raise ValueError("graph buckets and capture sizes do not belong together")
        for bucket in (*found.eager, *found.graph):
            if not _supported(bucket, found.policies):
                raise ValueError(
                    f"policy {bucket.policy} at {bucket.num_tokens} tokens is not what its own "
                    "measurements support"
                )


def key_for(kernel: "SortKernel", shape: SortingShape, plan: "Plan") -> Key:
    """The key of what `calibrate(kernel, shape, plan)` would measure here and now."""
    captured = plan.capture_sizes if kernel.device.type != "cpu" else ()
    return Key(
        Request(DECISION_VERSION, check_domain("capture_sizes", captured), tuple(plan.first)),
        describe_environment(kernel.device),
        kernel.name,
        kernel.policies,
        shape,
        plan.max_tokens,
        plan.rule,
        SCHEMA,
    )


def differences(theirs: object, ours: object, where: str = "here") -> list[str]:
    """Of two keys, field by field, such as `environment.torch ('2.9.0', here '2.13.0')`."""
    found = []
    for name, value in _flat(to_plain(theirs)).items():
        here = _flat(to_plain(ours)).get(name)
        if value != here:
            found.append(f"{name} ({value!r}, {where} {here!r})")
    return found


def _hash_line(body: str) -> str:
    return f'{{"sha256": "{hashlib.sha256(body.encode("utf-8", "replace")).hexdigest()}",\n'


def _supported(bucket: Bucket, policies: tuple[int, ...]) -> bool:
    """Is the bucket's policy the one its own verdicts lead to?"""
    for fill in bucket.fills:
        results = fill.verdict.results
        faster = {r.policy for r in results if r.standing is Standing.FASTER}
        if tuple(r.policy for r in results) != policies or fill.verdict.policy not in {0, *faster}:
            return False
    return bool(bucket.fills) and combine([f.verdict for f in bucket.fills])[0] == bucket.policy


def _flat(plain: object, name: str = "") -> dict[str, object]:
    if not isinstance(plain, dict):
        return {name: plain}
    found: dict[str, object] = {}
    for key, value in plain.items():
        found.update(_flat(value, f"{name}.{key}" if name else str(key)))
    return found
