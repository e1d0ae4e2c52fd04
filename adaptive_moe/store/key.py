"""The key of a table: everything that can change which candidate is fastest.

A stored table serves a start with exactly its key. Not in the key: the budget, because it changes
how much is settled and not what is true; the device name, because one and the same AMD GPU has
several, by driver image; and Python's version. Evidence records these for readers.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.evidence import DECISION_VERSION, SCHEMA, Environment, Evidence, Rule
from adaptive_moe.store.plain import to_plain

if TYPE_CHECKING:
    from adaptive_moe.kernels import SortKernel

# Characters of a field's value that a log line shows.
MAX_SHOWN = 60


@dataclass(frozen=True)
class Request:
    """The part of a key that evidence does not record.

    engine    name and version of the engine that asked, such as `vllm 0.33.0`: it decides what runs
              around a sort
    first     token counts measured first, empty for the default grid
    decision  DECISION_VERSION of the code that measured
    """

    engine: str
    first: tuple[int, ...] = ()
    decision: int = DECISION_VERSION


@dataclass(frozen=True)
class TableKey:
    """What a table is valid for. `kernel` names AITER's version and, by content, everything that
    sorts (kernels/identity.py); `arch` to `host` are as in Environment."""

    request: Request
    coverage: Coverage
    candidates: tuple[str, ...]
    rule: Rule
    schema: int
    kernel: str
    arch: str
    compute_units: int
    memory_gib: int
    runtime: str
    torch: str
    host: str

    @property
    def shape_name(self) -> str:
        """What the names of all files of this shape begin with: `256x8-7168-bfloat16-b32-`."""
        shape = self.coverage.shape
        return (
            f"{shape.num_experts}x{shape.topk}-{shape.model_dim}-{shape.dtype}-b{shape.block_size}-"
        )

    @property
    def name(self) -> str:
        """Such as `256x8-7168-bfloat16-b32-vllm-0.33.0-gfx942-0123456789abcdef`; the end is a hash
        of the whole key."""
        words = f"{self.shape_name}{self.request.engine}-{self.arch}".lower()
        readable = re.sub(r"[^a-z0-9_.]+", "-", words).strip("-.")[:100]
        text = json.dumps(to_plain(self), sort_keys=True)
        return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def key_for(
    kernel: "SortKernel",
    coverage: Coverage,
    rule: Rule,
    *,
    engine: str,
    first: tuple[int, ...] = (),
) -> TableKey:
    """The key of what measuring that coverage on that kernel would give here.

    Make it before anything is measured: measuring may load modules that change the kernel's name.
    """
    from adaptive_moe.kernels.environment import describe_environment

    return _key(
        Request(engine, first),
        coverage.on(kernel.device.type),
        tuple(candidate.name for candidate in kernel.candidates),
        rule,
        SCHEMA,
        kernel.name,
        describe_environment(kernel.device),
    )


def key_of(request: Request, evidence: Evidence) -> TableKey:
    """The key of evidence that was measured for that request."""
    return _key(
        request,
        evidence.coverage,
        evidence.candidates,
        evidence.rule,
        evidence.schema,
        evidence.kernel,
        evidence.environment,
    )


def differing_fields(key: TableKey, other: TableKey) -> list[str]:
    """The fields in which `other` differs, such as `torch: 2.9.0, here 2.13.0`."""
    here, there = _flat(to_plain(key)), _flat(to_plain(other))
    return [
        f"{name}: {_short(there[name])}, here {_short(here[name])}"
        for name in here
        if here[name] != there[name]
    ]


def _key(
    request: Request,
    coverage: Coverage,
    candidates: tuple[str, ...],
    rule: Rule,
    schema: int,
    kernel: str,
    environment: Environment,
) -> TableKey:
    return TableKey(
        request,
        coverage,
        candidates,
        rule,
        schema,
        kernel,
        environment.arch,
        environment.compute_units,
        environment.memory_gib,
        environment.runtime,
        environment.torch,
        environment.host,
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _flat(plain: object, name: str = "") -> dict[str, object]:
    if not isinstance(plain, dict):
        return {name: plain}
    fields: dict[str, object] = {}
    for key, value in plain.items():
        fields.update(_flat(value, f"{name}.{key}" if name else str(key)))
    return fields
