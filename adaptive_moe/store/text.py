"""The text of a table: the same in the cache folder, between ranks and in a report.

    {"sha256": "...",
    "request": {...},
    "evidence": {...},
    "applied": {"graph": [[1, 8, "policy 1"]], "eager": [...]},
    "savings": {"graph": {"counts": 9, "settled": 8, "improved": 3, ...}, "eager": {...}}
    }

JSON. The first line holds the hash of the rest: it shows damage, not origin. The key is derived
from request and evidence, and the choices from the evidence, by the one judge: a text cannot
contradict itself. `applied` and `savings` are for readers, and ignored on load.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptive_moe.policy.coverage import Situation
from adaptive_moe.policy.evidence import Evidence
from adaptive_moe.policy.savings import savings
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.store.key import Request, TableKey, key_of
from adaptive_moe.store.plain import from_plain, to_plain

# A table of a hundred buckets has 0.2 MiB. Larger texts are neither read nor shared: a value above
# 8 MiB makes torch's TCPStore drop the connection for good.
MAX_BYTES = 4 << 20
# A report holds a few tables for each model.
MAX_REPORT_BYTES = 64 * MAX_BYTES


@dataclass(frozen=True)
class StoredTable:
    """One text, parsed. The table is built when it is first asked for, and raises ValueError where
    the evidence is not whole: look at the key first."""

    request: Request
    evidence: Evidence

    @property
    def key(self) -> TableKey:
        return key_of(self.request, self.evidence)

    @cached_property
    def table(self) -> PolicyTable:
        return PolicyTable(self.evidence)


def to_text(request: Request, table: PolicyTable) -> str:
    """The text of a table that was measured for that request."""
    applied = {
        situation.value: table.runs(captured=situation is Situation.GRAPH)
        for situation in Situation
    }
    body = (
        f'"request": {_json(to_plain(request))},\n'
        f'"evidence": {_json(to_plain(table.evidence))},\n'
        f'"applied": {_json(applied)},\n'
        f'"savings": {_json({s.value: to_plain(savings(table, s)) for s in Situation})}\n}}\n'
    )
    return _hash_line(body) + body


def from_text(text: str) -> StoredTable:
    """Parse what `to_text` wrote. ValueError for anything else, down to a changed space."""
    first, newline, body = text.partition("\n")
    if first + newline != _hash_line(body):
        raise ValueError("its content is not what was written there (the hash differs)")
    return _from_plain(_parse(text))


def read_any(path: Path) -> list[StoredTable]:
    """The tables of a stored file or a report (a JSON list of texts), for people to look at: the
    hash does not count. OSError, or ValueError saying what is wrong."""
    with open(path, "rb") as file:
        content = file.read(MAX_REPORT_BYTES + 1)
    if len(content) > MAX_REPORT_BYTES:
        raise ValueError(f"{path} has more than {MAX_REPORT_BYTES} bytes: it is no file of tables")
    try:
        plain = _parse(content.decode("utf-8"))
        items = plain if isinstance(plain, list) else [plain]
        return [_whole(_from_plain(item)) for item in items]
    except ValueError as error:
        raise ValueError(
            f"{path} holds no tables ({error}): give a file of the cache folder, or one that "
            "ADAPTIVE_MOE_REPORT or `calibrate --output` named"
        ) from None


def report_text(texts: Iterable[str]) -> str:
    """Several texts as one JSON list, which `read_any` reads."""
    return "[" + ",\n".join(texts) + "]\n"


def _whole(stored: StoredTable) -> StoredTable:
    try:
        stored.table  # noqa: B018  raises ValueError where the evidence is not whole
    except ArithmeticError as error:  # of numbers that no calibration gives
        raise ValueError(f"impossible measurement: {error}") from None
    return stored


def _from_plain(plain: Any) -> StoredTable:
    if not isinstance(plain, dict) or not {"request", "evidence"} <= plain.keys():
        raise ValueError("it has no request and evidence")
    return StoredTable(
        from_plain(Request, plain["request"], "request"),
        from_plain(Evidence, plain["evidence"], "evidence"),
    )


def _parse(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _json(plain: Any) -> str:
    return json.dumps(plain, allow_nan=False)


def _hash_line(body: str) -> str:
    return f'{{"sha256": "{hashlib.sha256(body.encode(errors="replace")).hexdigest()}",\n'
