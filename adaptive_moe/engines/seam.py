"""A function of AITER's put behind a wrapper that picks its dispatch policy, and taken out again.

The wrapper is compiled with the very signature of the function it wraps, whatever this version's
parameters after the ninth are: every argument but one goes through as it came, and binding them
costs a third of what `*args, **kwargs` would.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from adaptive_moe.kernels.aiter import LEADING, SEAM

# pick(topk_ids, num_experts, model_dim, moebuf_dtype, block_size, expert_mask, num_local_tokens,
# dispatch_policy, accumulate, unsorted) -> the policy to use. It must not raise.
Pick = Callable[..., Any]

# AITER's function that picks block_size for a token count, called just before each sort.
CHOOSER = "get_2stage_cfgs"

_PICKS_FROM = tuple(name for name in LEADING if name != "topk_weights")
# Arguments that make AITER leave out the sort, or the policy.
UNSORTED = ("flat", "output_aux")


class Layer:
    """One wrapper around the seam of one module, and one around its chooser, which leaves behind
    in `asked.last` how it was asked. Inactive, both only pass calls on."""

    def __init__(self, module: ModuleType, asked: threading.local) -> None:
        self.module = module
        self.seam: Callable[..., Any] = getattr(module, SEAM)
        self.chooser: Callable[..., Any] | None = getattr(module, CHOOSER, None)
        self.active = True
        self._wrapper = self.seam
        self._watcher = None if self.chooser is None else _watch(self.chooser, asked)

    def put(self, pick: Pick) -> None:
        self._wrapper = with_policy(self.seam, pick)
        setattr(self.module, SEAM, self._wrapper)
        if self._watcher is not None:
            setattr(self.module, CHOOSER, self._watcher)

    def take_out(self) -> bool:
        """Put back what was there; False where somebody wrapped us since, and keeps their wrapper
        and us, passive, below it."""
        self.active = False
        if self._watcher is not None and getattr(self.module, CHOOSER, None) is self._watcher:
            setattr(self.module, CHOOSER, self.chooser)
        if getattr(self.module, SEAM, None) is not self._wrapper:
            return False
        setattr(self.module, SEAM, self.seam)
        return True

    def is_reached_from(self, module: ModuleType) -> bool:
        """Is this layer certainly below `module.moe_sorting`, whoever wrapped it since?

        Wrappers that hide what they wrap cannot be seen through. A layer below such a one is left
        passive, and a new one goes on top.
        """
        function = getattr(module, SEAM, None)
        while function is not None:
            if function is self._wrapper:
                return module is self.module
            function = getattr(function, "__wrapped__", None)
        return False


def with_policy(seam: Callable[..., Any], pick: Pick) -> Callable[..., Any]:
    """`seam` with its dispatch_policy replaced by what `pick` returns for the call."""
    # What the function itself takes: one that wraps another may take less than it says.
    parameters = list(inspect.signature(seam, follow_wrapped=False).parameters.values())
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return _opaque(seam, pick)
    names = [p.name for p in parameters]
    heads = [
        p.name if p.default is p.empty else f"{p.name}=_default[{p.name!r}]" for p in parameters
    ]
    accumulate = "accumulate" if "accumulate" in names else "True"
    unsorted = " or ".join(name for name in UNSORTED if name in names) or "False"
    picked = f"_pick({', '.join(_PICKS_FROM)}, {accumulate}, {unsorted})"
    given = [picked if name == "dispatch_policy" else name for name in names]
    source = f"def moe_sorting({', '.join(heads)}):\n    return _seam({', '.join(given)})\n"
    defaults = {p.name: p.default for p in parameters}
    scope: dict[str, Any] = {"_seam": seam, "_pick": pick, "_default": defaults}
    exec(compile(source, f"<{__name__}>", "exec"), scope)
    return functools.wraps(seam)(scope["moe_sorting"])


def _opaque(seam: Callable[..., Any], pick: Pick) -> Callable[..., Any]:
    """For a seam of another shape, such as another tool's wrapper with `*args, **kwargs`."""
    declared = inspect.signature(seam).parameters
    names = tuple(declared) if "dispatch_policy" in declared else LEADING
    defaults = {p.name: p.default for p in declared.values() if p.default is not p.empty}

    @functools.wraps(seam)
    def moe_sorting(*args: Any, **kwargs: Any) -> Any:
        named = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        asked = named.get("dispatch_policy", 0)
        picked = pick(
            *(asked if name == "dispatch_policy" else named.get(name) for name in _PICKS_FROM),
            named.get("accumulate", True),
            any(named.get(name) for name in UNSORTED),
        )
        if picked is asked:
            return seam(*args, **kwargs)
        if len(args) >= len(LEADING):
            return seam(*args[: len(LEADING) - 1], picked, *args[len(LEADING) :], **kwargs)
        return seam(*args, **{**kwargs, "dispatch_policy": picked})

    return moe_sorting


def _watch(chooser: Callable[..., Any], asked: threading.local) -> Callable[..., Any]:
    @functools.wraps(chooser)
    def get_2stage_cfgs(*args: Any, **kwargs: Any) -> Any:
        asked.last = (args, kwargs)
        return chooser(*args, **kwargs)

    for name in ("cache_clear", "cache_info"):  # it is an lru_cache, and AITER's tuner clears it
        if hasattr(chooser, name):
            setattr(get_2stage_cfgs, name, getattr(chooser, name))
    return get_2stage_cfgs
