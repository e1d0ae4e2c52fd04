"""What ranks write to each other: each its summaries, the leader the decision. Pure.

The decision is a function of the messages alone, in whatever order they came. Equal messages are
merged once, so a thousand ranks that start from the same stored tables cost no more than one.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.ranks.merging import merge
from adaptive_moe.ranks.summary import (
    MAX_BYTES,
    Summary,
    canonical,
    decode,
    encode,
    parse,
    summarize,
)

FORMAT = 2
# Far more coverages than a model has, and far more than their tables take.
_MAX_COVERAGES = 256
_MAX_DECISION = 256 << 20


@dataclass(frozen=True)
class Decision:
    """tables: a table's JSON by its coverage's; voided: why a coverage has none; missing: why a
    rank's message is (and with it every table)."""

    tables: dict[str, str] = field(default_factory=dict)
    voided: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def encode_message(tables: Mapping[Coverage, PolicyTable], failed: Mapping[Coverage, str]) -> bytes:
    """One rank's message: its tables' summaries, and what it could not calibrate and why."""
    why = {canonical(coverage): text[:200] for coverage, text in failed.items()}
    parts: dict[str, bytes] = {}
    for coverage, table in tables.items():
        try:
            parts[canonical(coverage)] = encode(summarize(table.evidence))
        except ValueError as error:
            why[canonical(coverage)] = f"its table cannot be exchanged: {error}"
    header = {"format": FORMAT, "sizes": {name: len(p) for name, p in parts.items()}, "failed": why}
    return b"".join([json.dumps(header).encode(), b"\n", *parts.values()])


def decide(messages: Mapping[int, bytes | None]) -> Decision:
    """The decision that every rank will read; None is the message of a rank that sent none."""
    found: dict[str, dict[bytes, Summary]] = {}
    failed: dict[str, str] = {}
    missing: dict[str, str] = {}
    for rank, message in sorted(messages.items()):
        try:
            if message is None:
                raise ValueError("did not take part in time")
            parts, why = _read_message(message)
            for name, part in parts.items():
                known = found.setdefault(name, {})
                if part not in known:
                    known[part] = decode(part)
        except ValueError as error:
            missing[str(rank)] = str(error)
            continue
        for name, text in why.items():
            failed.setdefault(name, f"rank {rank} could not calibrate it: {text}")
    if missing:
        return Decision(missing=missing)
    tables, voided = {}, dict(sorted(failed.items()))
    for name in sorted(found.keys() - voided.keys()):
        try:
            table = merge(list(found[name].values()))
            if canonical(table.evidence.coverage) != name:
                raise ValueError("a table of another coverage was sent for it")
            text = table.to_json()
            PolicyTable.from_json(text)  # a number that no rank could read would cost all tables
        except (ValueError, ArithmeticError) as error:
            voided[name] = str(error)
            continue
        tables[name] = text
    return Decision(tables, voided)


def encode_decision(decision: Decision) -> bytes:
    """Compressed JSON: what one rank sends to all the others."""
    return zlib.compress(json.dumps({"format": FORMAT, **vars(decision)}).encode())


def read_decision(content: bytes) -> Decision:
    """What `encode_decision` wrote; ValueError for anything else."""
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(content, _MAX_DECISION)
    except zlib.error as error:
        raise ValueError(f"not a decision: {error}") from None
    plain = parse(text)
    if not isinstance(plain, dict) or plain.pop("format", None) != FORMAT:
        raise ValueError("not a decision of this format: ranks run different versions")
    if set(plain) != set(vars(Decision())) or not all(map(_is_texts, plain.values())):
        raise ValueError("not a decision: other fields than expected")
    return Decision(**plain)


def _read_message(message: bytes) -> tuple[dict[str, bytes], dict[str, str]]:
    line, _, rest = message.partition(b"\n")
    header = parse(line)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError("sent a message of another format: ranks run different versions")
    sizes, failed = header.get("sizes"), header.get("failed")
    if not _is_texts(failed) or not isinstance(sizes, dict) or len(sizes) > _MAX_COVERAGES:
        raise ValueError("sent a message that cannot be read")
    parts, place = {}, 0
    for name, size in sizes.items():
        if not isinstance(size, int) or not 0 < size <= MAX_BYTES:
            raise ValueError(f"sent a summary of {size!r} bytes, {MAX_BYTES} are accepted")
        parts[name] = rest[place : place + size]
        place += size
    if place != len(rest):
        raise ValueError("sent a message that was cut")
    return parts, failed


def _is_texts(value: object) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
