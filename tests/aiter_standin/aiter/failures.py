"""Sorts that fail when asked to, so that what becomes of it can be seen.

AITER_STANDIN_FAIL=policy=1,kind=oom,times=3    the first three sorts by policy 1 are out of memory
                   backend=flydsl,kind=wrong    each sort by FlyDSL returns something wrong

policy and backend select sorts, all if left out; kind is oom, raise or wrong; times is how many of
them fail, all if left out; after is how many of them go well first. It is read at each sort; what
has failed so far is counted for each text of the variable, and reset() forgets it.
"""

import os
from collections import Counter

import torch

_matched: Counter[str] = Counter()


def reset() -> None:
    _matched.clear()


def failure_of(backend: str, policy: object) -> str | None:
    """The kind of failure that is due for this sort, which is counted; None for none."""
    asked = os.environ.get("AITER_STANDIN_FAIL")
    if not asked:
        return None
    wanted = dict(part.split("=") for part in asked.split(","))
    unknown = wanted.keys() - {"policy", "backend", "kind", "times", "after"}
    if unknown or wanted.get("kind") not in ("oom", "raise", "wrong"):
        raise ValueError(f"AITER_STANDIN_FAIL={asked!r}: see {__file__}")
    if wanted.get("backend", backend) != backend:
        return None
    if "policy" in wanted and int(wanted["policy"]) != int(policy):
        return None
    matched, first = _matched[asked], int(wanted.get("after", 0))
    _matched[asked] += 1
    times = int(wanted.get("times", matched + 1))
    return wanted["kind"] if first <= matched < first + times else None


def raise_if_due(kind: str | None) -> None:
    if kind == "oom":
        raise torch.OutOfMemoryError("AITER_STANDIN_FAIL: out of memory")
    if kind == "raise":
        raise RuntimeError("AITER_STANDIN_FAIL: this sort failed")


def spoil(sorted_ids: torch.Tensor) -> None:
    """Wrong where everybody looks: the first entry is another token's."""
    sorted_ids[:1] += 1
