"""The function put in AITER's place, compiled with the very signature of the one it wraps.

Every argument but one goes through as it came, and binding them costs a third of what
`*args, **kwargs` would. What happens at each call is written out here once, in one function,
because a call of another one costs as much as the look-up: build a key, find the entry, index its
array by the token count. Everything rarer is left to rare.py, in plain Python.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adaptive_moe.engines.entries import ASK
from adaptive_moe.engines.key import TRUE
from adaptive_moe.kernels.aiter import BUFFERS, KNOWN, LEADING, UNSORTED

if TYPE_CHECKING:
    from adaptive_moe.engines.counters import Counters
    from adaptive_moe.engines.seam import Layer

# AITER's own, for a seam that does not say.
_DEFAULTS = {
    "block_size": 32,
    "dispatch_policy": 0,
    "return_local_topk_ids": False,
    "accumulate": True,
}
# One sort, by whoever sorts it: the leading arguments without the policy, and accumulate.
SORT_ARGUMENTS = (*LEADING[:-1], "accumulate")

_MEASURED = """
def moe_sorting({heads}):
    sort = None
    try:
        num_tokens, topk = topk_ids.shape
        if topk_ids.__class__ is not _Tensor or not num_tokens{unsorted}:
            sort = _rare
        else:
            key = (
                num_experts, topk, model_dim, moebuf_dtype, block_size, expert_mask is not None,
                num_local_tokens is not None, expert_mask is not None or {accumulate}, {local_ids},
                {more}, {baseline}, {device},
            )
            entries = _layer.entries
            known, array, both, choices, plain, stay, go = entries.latest
            if key != known:
                array, both, choices, plain, stay, go, _ = entry = entries[key]
                entries.latest = (key, *entry[:-1])
            index = array[num_tokens]
            if index == {ASK}:
                index = both[_is_capturing()][num_tokens]
            if not index:
                stay()
            elif index < plain:
                dispatch_policy = choices[index]
                go()
            else:
                sort = choices[index]
                go()
    except Exception:
        sort = _rare
    if sort is None:
        return _seam({given})
    if sort is _rare:
        return _rare({all})
    try:
        return sort({sort_arguments})
    except Exception as error:
        _broke(sort, error)
    return _seam({given})
"""

_FIXED = """
def moe_sorting({heads}):
    try:
        if _layer.active:
            if not topk_ids.shape[0]{unsorted}:
                _passed()
            else:
                _fixed()
                dispatch_policy = _policy
    except Exception:
        _odd()
    return _seam({given})
"""


def measured(
    layer: "Layer",
    rare: Callable[..., Any],
    broke: Callable[[Any, Exception], None],
) -> Callable[..., Any]:
    """The seam of `layer`, answered as `layer.entries` says.

    rare(layer, values, call) answers what has no entry; broke(sort, error) hears of a sort that
    raised, before the baseline answers. Neither raises what AITER does not.
    """
    import torch

    words = {
        "ASK": ASK,
        # Only a schema of bool makes it True, of an engine's own; to others both are not ours.
        "baseline": f"{TRUE!r} if dispatch_policy is True else dispatch_policy",
        "device": "topk_ids.get_device()" if layer.device is None else str(layer.device),
    }
    scope = {
        "_layer": layer,
        "_Tensor": torch.Tensor,
        "_is_capturing": layer.is_capturing,
        "_rare": functools.partial(rare, layer),
        "_broke": broke,
    }
    return _around(layer, _MEASURED, words, scope)


def fixed(layer: "Layer", policy: int | None, counters: "Counters") -> Callable[..., Any]:
    """The seam of `layer` with that policy at every call that sorts."""

    def unread(values: tuple[Any, ...], call: Any) -> Any:
        counters.odd.add()
        return layer.seam(*call[0], **call[1])

    scope = {
        "_layer": layer,
        "_rare": unread,
        "_policy": policy,
        "_passed": counters.passed.add,
        "_fixed": counters.fixed.add,
        "_odd": counters.odd.add,
    }
    return _around(layer, _FIXED, {}, scope)


def _around(
    layer: "Layer", template: str, words: dict[str, Any], scope: dict[str, Any]
) -> Callable[..., Any]:
    # What the function itself takes: one that wraps another may take less than it says.
    parameters = list(inspect.signature(layer.seam, follow_wrapped=False).parameters.values())
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return _around_opaque(layer, template, words, scope)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    layer.names = tuple(p.name for p in parameters)
    values = ", ".join(layer.names)
    wrapper = _compile(template, layer.names, defaults, {**words, "given": values}, scope, layer)
    return functools.wraps(layer.seam)(wrapper)


def _around_opaque(
    layer: "Layer", template: str, words: dict[str, Any], scope: dict[str, Any]
) -> Callable[..., Any]:
    """For a seam of another shape, such as another tool's wrapper with `*args, **kwargs`: each call
    reaches it as it was made, but for the policy."""
    seam = layer.seam
    declared = inspect.signature(seam).parameters
    aiters = (*LEADING, *(n for n in KNOWN if n not in BUFFERS))
    names = tuple(declared) if {*LEADING} <= declared.keys() else aiters
    defaults = {p.name: p.default for p in declared.values() if p.default is not p.empty}
    defaults = _DEFAULTS | defaults
    layer.names = names

    def again(call: Any, policy: Any) -> Any:
        args, kwargs, asked = call
        if policy is asked:
            return seam(*args, **kwargs)
        if len(args) >= len(LEADING):
            return seam(*args[: len(LEADING) - 1], policy, *args[len(LEADING) :], **kwargs)
        return seam(*args, **{**kwargs, "dispatch_policy": policy})

    words = {**words, "given": "_call, dispatch_policy"}
    inner = _compile(template, names, dict.fromkeys(names) | defaults, words, scope, layer, again)

    @functools.wraps(seam)
    def moe_sorting(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) > len(names) or not given.keys() <= set(names):
            return scope["_rare"]((), (args, kwargs, None))
        asked = given.get("dispatch_policy", defaults["dispatch_policy"])
        return inner(**given, _call=(args, kwargs, asked))

    return moe_sorting


def _compile(
    template: str,
    names: tuple[str, ...],
    defaults: dict[str, Any],
    words: dict[str, Any],
    scope: dict[str, Any],
    layer: "Layer",
    again: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    heads = [f"{name}=_default[{name!r}]" if name in defaults else name for name in names]
    unknown = [name for name in names[len(LEADING) :] if name not in KNOWN]
    more = [f"(() if {name} is None else ({name!r},))" for name in BUFFERS if name in names]
    if unknown:
        more = [f"({', '.join(unknown)},)", *more]
    values = f"({', '.join(names)},)"
    source = template.format(
        **words,
        heads=", ".join(heads if again is None else [*heads, "_call=None"]),
        all=values if again is None else f"{values}, _call",
        unsorted="".join(f" or {name}" for name in UNSORTED if name in names),
        accumulate="accumulate" if "accumulate" in names else "True",
        local_ids="return_local_topk_ids" if "return_local_topk_ids" in names else "False",
        more=" + ".join(more) or "()",
        sort_arguments=", ".join(n if n in names else "True" for n in SORT_ARGUMENTS),
    )
    function: dict[str, Any] = {**scope, "_seam": again or layer.seam, "_default": defaults}
    exec(compile(source, f"<{__name__}>", "exec"), function)
    compiled: Callable[..., Any] = function["moe_sorting"]
    return compiled
