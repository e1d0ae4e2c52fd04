"""Damaged files: each must be a miss with one warning that names the file, and nothing else."""

import json
import logging
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptive_moe.store.folder import Folder
from adaptive_moe.store.text import MAX_BYTES, to_text
from tests.store.making import HERE, KEY, REQUEST, made_table
from tests.store.test_text import sealed

Damage = Callable[[random.Random, bytes], bytes]
TABLE = made_table()


def run(files: int, seed: int = 0) -> dict[str, Any]:
    """Write `files` damaged files, load each; counts by kind of damage, and what went wrong."""
    chance = random.Random(seed)
    good = to_text(REQUEST, TABLE).encode()
    kinds: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Folder(Path(name))
        path = folder.file(KEY)
        for number in range(files):
            kind, damage = DAMAGES[number % len(DAMAGES)]
            content = damage(chance, good)
            assert content != good
            path.write_bytes(content)
            kinds[kind] += 1
            with listening() as lines:
                try:
                    found = folder.get(KEY)
                except BaseException as error:
                    failures[f"{kind}: raised {type(error).__name__}: {error}"[:200]] += 1
                    continue
            if found is not None:
                failures[f"{kind}: loaded"] += 1
            if len(lines) != 1 or str(path) not in lines[0]:
                failures[f"{kind}: {len(lines)} log lines"] += 1
        path.write_bytes(good)
        if folder.get(KEY) != TABLE:
            failures["the undamaged file does not load"] += 1
    return {"files": files, "kinds": dict(kinds), "failures": dict(failures)}


@contextmanager
def listening(level: int = logging.WARNING) -> Iterator[list[str]]:
    """The lines that the package logs at `level` and above meanwhile."""
    lines: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    ear, logger = Ear(level), logging.getLogger("adaptive_moe")
    before = logger.level, logger.propagate
    logger.setLevel(level)
    logger.propagate = False
    logger.addHandler(ear)
    try:
        yield lines
    finally:
        logger.removeHandler(ear)
        logger.level, logger.propagate = before


def _truncated(chance: random.Random, good: bytes) -> bytes:
    return good[: chance.randrange(len(good))]


def _flipped(chance: random.Random, good: bytes) -> bytes:
    damaged = bytearray(good)
    damaged[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def _spliced(chance: random.Random, good: bytes) -> bytes:
    """A page of zeros, as a crash of the machine can leave behind."""
    place = chance.randrange(len(good))
    return good[:place] + bytes(min(4096, len(good) - place)) + good[place + 4096 :]


def _noise(chance: random.Random, good: bytes) -> bytes:
    return chance.randbytes(chance.randrange(2000))


def _too_large(chance: random.Random, good: bytes) -> bytes:
    return good + b" " * MAX_BYTES


def _another_machine(chance: random.Random, good: bytes) -> bytes:
    other = [{"arch": "gfx950"}, {"compute_units": 38}, {"torch": "2.10.0"}, {"host": "other"}]
    table = made_table(environment=replace(HERE, **chance.choice(other)))
    return to_text(REQUEST, table).encode()


def _another_kernel(chance: random.Random, good: bytes) -> bytes:
    kernel = chance.choice(["aiter 0.1.8 opus", "aiter 0.1.9 ck", "triton"])
    return to_text(REQUEST, made_table(kernel=kernel)).encode()


def _another_request(chance: random.Random, good: bytes) -> bytes:
    fields = [{"decision": 99}, {"engine": "sglang 0.5.23"}, {"first": (1, 64)}]
    return to_text(replace(REQUEST, **chance.choice(fields)), TABLE).encode()


def _other_candidates(chance: random.Random, good: bytes) -> bytes:
    """Candidates that this process does not offer for that key."""
    names = chance.choice([("policy 0", "policy 2", "policy 1"), ("policy 0", "policy 9", "x")])
    return to_text(REQUEST, made_table(names=names)).encode()


def _sealed(change: Callable[[random.Random, Any], str]) -> Damage:
    """Damage to the JSON with a hash that fits: what checks the content must find."""

    def damage(chance: random.Random, good: bytes) -> bytes:
        plain = json.loads(good)
        parts = {name: plain[name] for name in ("request", "evidence")}
        return sealed(change(chance, parts)[1:]).encode()

    return damage


def _leaves(plain: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value."""
    if isinstance(plain, dict):
        items = list(plain.items())
    else:
        items = list(enumerate(plain)) if isinstance(plain, list) else []
    for key, value in items:
        yield (*path, key)
        yield from _leaves(value, (*path, key))


def _set(plain: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        plain = plain[key]
    plain[path[-1]] = value


def _get(plain: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        plain = plain[key]
    return plain


def _wrong_type(chance: random.Random, plain: Any) -> str:
    place = chance.choice(list(_leaves(plain)))
    old = _get(plain, place)
    wrong = [w for w in ("text", [7], {"a": 1}, True) if type(w) is not type(old)]
    _set(plain, place, chance.choice(wrong))
    return json.dumps(plain)


def _huge(chance: random.Random, plain: Any) -> str:
    place = chance.choice([p for p in _leaves(plain) if isinstance(_get(plain, p), (int, float))])
    _set(plain, place, "@")
    huge = chance.choice(["1e400", "-1e400", "9" * 40, "9" * 5000, "1e308", "-" + "8" * 30])
    return json.dumps(plain).replace('"@"', huge, 1)


def _not_a_number(chance: random.Random, plain: Any) -> str:
    place = chance.choice([p for p in _leaves(plain) if isinstance(_get(plain, p), float)])
    _set(plain, place, chance.choice([float("nan"), float("inf"), float("-inf")]))
    return json.dumps(plain)


def _nested(chance: random.Random, plain: Any) -> str:
    depth = chance.randrange(1000, 200_000)
    _set(plain, chance.choice(list(_leaves(plain))), "@")
    return json.dumps(plain).replace('"@"', "[" * depth + "]" * depth, 1)


def _long(chance: random.Random, plain: Any) -> str:
    place = chance.choice([p for p in _leaves(plain) if isinstance(_get(plain, p), (str, list))])
    is_text = isinstance(_get(plain, place), str)
    _set(plain, place, "x" * 5000 if is_text else [0] * 5000)
    return json.dumps(plain)


def _fields(chance: random.Random, plain: Any) -> str:
    objects = [p for p in _leaves(plain) if isinstance(_get(plain, p), dict)]
    target = _get(plain, chance.choice(objects))
    if chance.random() < 0.5:
        del target[chance.choice(list(target))]
    else:
        target["extra"] = 1
    return json.dumps(plain)


def _schema(chance: random.Random, plain: Any) -> str:
    plain["evidence"]["schema"] += chance.choice([-1, 1, 98])
    return json.dumps(plain)


def _names(chance: random.Random, plain: Any) -> str:
    """Results of a candidate that was not offered, or offered twice."""
    bucket = chance.choice(plain["evidence"][chance.choice(["eager", "graph"])])
    results = bucket["fills"][0]["results"]
    results[1]["candidate"] = chance.choice(["", "policy 2", "policy 3", "x" * 99])
    return json.dumps(plain)


def _order(chance: random.Random, plain: Any) -> str:
    buckets = plain["evidence"]["eager"]
    kind = chance.randrange(4)
    if kind == 0:
        buckets.reverse()
    elif kind == 1:
        buckets.append(buckets[-1])
    elif kind == 2:
        buckets.clear()
    else:
        buckets[0]["num_tokens"] = 0
    return json.dumps(plain)


DAMAGES: tuple[tuple[str, Damage], ...] = (
    ("truncated", _truncated),
    ("one bit flipped", _flipped),
    ("a page of zeros", _spliced),
    ("noise", _noise),
    ("wrong type", _sealed(_wrong_type)),
    ("huge number", _sealed(_huge)),
    ("NaN or infinity", _sealed(_not_a_number)),
    ("deep nesting", _sealed(_nested)),
    ("over-long text or list", _sealed(_long)),
    ("missing or unknown field", _sealed(_fields)),
    ("another schema", _sealed(_schema)),
    ("results of other candidates", _sealed(_names)),
    ("buckets out of order", _sealed(_order)),
    ("another machine's key", _another_machine),
    ("another kernel's key", _another_kernel),
    ("another request's key", _another_request),
    ("other candidates' key", _other_candidates),
    ("too large", _too_large),
)
