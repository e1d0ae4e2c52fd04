"""Other sorts that can answer a call of AITER's seam. To add one: write a module with a function
`sorts(seen, shape)` as kernels/ours.py has it, and name it in an entry point of the group
ENTRY_POINTS in your own package, or in a line of REGISTRY.
"""

import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptive_moe.kernels.call import SortCall
    from adaptive_moe.shape import SortingShape

logger = logging.getLogger("adaptive_moe")

_AITERS, _OURS = "adaptive_moe.kernels.aiter_sorts", "adaptive_moe.kernels.ours"

# The group in which other packages name their sorts: a candidate's name, and its module.
ENTRY_POINTS = "adaptive_moe.sorts"


def _of_other_packages() -> dict[str, str]:
    try:
        return {point.name: point.module for point in entry_points(group=ENTRY_POINTS)}
    except Exception as error:  # a package with broken metadata
        logger.warning("sorts of other packages are not known: %r", error)
        return {}


# A candidate's name -> the module that makes it. Its place here is its place among candidates.
REGISTRY: dict[str, str] = {
    "ck": _AITERS,
    "opus": _AITERS,
    "flydsl": _AITERS,
    "triton one-shot": _OURS,
    "triton multi-phase": _OURS,
}
# A name of ours stays ours.
REGISTRY = {**REGISTRY, **{n: m for n, m in _of_other_packages().items() if n not in REGISTRY}}

# What a user may say for several of them, `policies` being those of AITER's configured backend.
POLICIES_WORD = "policies"
GROUPS: dict[str, tuple[str, ...]] = {
    POLICIES_WORD: (POLICIES_WORD,),
    "aiter": (POLICIES_WORD, *(name for name, module in REGISTRY.items() if module == _AITERS)),
    "all": (POLICIES_WORD, *REGISTRY),
}

# With one of these a user has chosen among AITER's backends.
BACKEND_VARIABLES = (
    "AITER_USE_CK_MOE_SORTING",
    "AITER_USE_FLYDSL_MOE_SORTING",
    "AITER_USE_OPUS_MOE_SORTING",
)


@dataclass(frozen=True)
class OtherSort:
    """One sort that can answer a seen call.

    call      sorts: (topk_ids, topk_weights, num_experts, model_dim, moebuf_dtype, block_size,
              expert_mask, num_local_tokens, accumulate) -> what the baseline returns for it. It may
              raise, and must neither wait for the device nor keep anything between calls, so that
              it can be captured into a graph
    identity  changes when the sort may answer otherwise or take another time: version and content
    takes_padding  True where it skips rows whose expert ids are -1. Where such rows can occur,
              a sort that does not is not offered
    """

    name: str
    call: Callable[..., Any]
    identity: str
    takes_padding: bool = False


def offered(
    seen: "SortCall",
    shape: "SortingShape",
    names: Iterable[str],
    environ: Mapping[str, str] = os.environ,
) -> list[OtherSort]:
    """The sorts of these names that know every argument and result of the call, in the order of
    REGISTRY. The words of GROUPS are names, too. A module that raises has none."""
    given = tuple(names)
    asked = {name for word in given for name in GROUPS.get(word, (word,))}
    chosen = any(environ.get(variable) for variable in BACKEND_VARIABLES)
    if chosen and asked == set(GROUPS["aiter"]):
        return []  # the user's own choice of a backend; only `all` or a name goes beyond it
    if not seen.is_known:
        return []
    found: list[OtherSort] = []
    for module in dict.fromkeys(REGISTRY[name] for name in REGISTRY if name in asked):
        try:
            found += list(importlib.import_module(module).sorts(seen, shape))
        except Exception as error:  # a module of another package: skip only its own sorts
            say_once(f"the sorts of {module} are not offered: {type(error).__name__}: {error}")
    return [sort for name in REGISTRY for sort in found if sort.name == name in asked]


@functools.lru_cache(maxsize=256)
def say_once(line: str) -> None:
    """A warning, once a process."""
    logger.warning("%s", line)
