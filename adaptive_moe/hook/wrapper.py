"""The function put in AITER's place, compiled with the very signature of the one it wraps.

Every argument but one goes through as it came, and binding them costs a third of what
`*args, **kwargs` would. What happens at each call is written out here once, in one function,
because a call of another one costs as much as the look-up: compare the arguments with those of
the latest call, one by one, and index its array by the token count. A call that differs builds a
key and finds its entry. Everything rarer is left to slow_path.py, in plain Python.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adaptive_moe.hook.entries import ASK
from adaptive_moe.kernels.aiter import BUFFERS, KNOWN, LEADING, UNSORTED
from adaptive_moe.kernels.call import TRUE

if TYPE_CHECKING:
    from adaptive_moe.hook.counters import Counters
    from adaptive_moe.hook.wrapped_module import WrappedModule

# AITER's own, for a seam that does not say.
_DEFAULTS = {
    "block_size": 32,
    "dispatch_policy": 0,
    "return_local_topk_ids": False,
    "accumulate": True,
}
# One sort, by whatever sorts it: the leading arguments without the policy, and accumulate.
SORT_ARGUMENTS = (*LEADING[:-1], "accumulate")

# The arguments that make the key and what the latest call had there, the likeliest to differ first:
# AITER picks block_size by token count, and the rest differs by layer. What is not equal costs only
# the building of a key. `is` where Python has one object of each value.
_COMPARED = (
    ("block_size == {latest}", "block_size"),
    ("num_experts == {latest}", "num_experts"),
    ("dispatch_policy is {latest}", "dispatch_policy"),
    ("model_dim == {latest}", "model_dim"),
    ("topk == {latest}", "topk"),
    ("moebuf_dtype is {latest}", "moebuf_dtype"),
    ("(expert_mask is None) is {latest}", "expert_mask is None"),
    ("(num_local_tokens is None) is {latest}", "num_local_tokens is None"),
)

_MEASURED = """
def moe_sorting({heads}):
    choice = None
    try:
        num_tokens, topk = topk_ids.shape
        if topk_ids.__class__ is not _Tensor:
            choice = _slow
        elif not num_tokens{unsorted}:
            _wrapped.passed()
        else:
            entries = _wrapped.entries
            {latest}, array, both, choices, stay, go = entries.latest or _NEVER
            if not ({same}):
                array, both, choices, stay, go, _ = entries[
                    num_experts, topk, model_dim, moebuf_dtype, block_size,
                    expert_mask is not None, num_local_tokens is not None,
                    expert_mask is not None or {accumulate}, {local_ids}, {more}, {baseline},
                    {device},
                ]
                entries.latest = ({arguments}, array, both, choices, stay, go)
            index = array[num_tokens]
            if index == {ASK}:
                index = both[_is_capturing()][num_tokens]
            if index:
                choice = choices[index]
                go()
            else:
                stay()
    except Exception:
        choice = _slow
    if choice is None:
        return _seam({given})
    if choice is _slow:
        return _slow({all})
    try:
        if choice.__class__ is int:
            return _seam({chosen})
        return choice({sort_arguments})
    except (Exception, SystemExit) as error:
        if not _falls_back(choice, error):
            raise
    return _seam({given})
"""

_FIXED = """
def moe_sorting({heads}):
    try:
        if _wrapped.active:
            if not topk_ids.shape[0]{unsorted}:
                _wrapped.passed()
            else:
                _fixed()
                dispatch_policy = _policy
    except Exception:
        _unreadable()
    return _seam({given})
"""


def measured(
    wrapped: "WrappedModule",
    slow: Callable[..., Any],
    falls_back: Callable[[Any, BaseException], bool],
) -> Callable[..., Any]:
    """The seam of `wrapped`, answered as `wrapped.entries` says.

    slow(wrapped, values, made) answers what has no entry and raises nothing that AITER does not.
    falls_back(choice, error) is told of a candidate that raised; True where the baseline may answer
    the same call, False where the error has to pass on.
    """
    import torch

    words = {
        "ASK": ASK,
        # True only where AITER's schema declares a bool. True == 1, so the key must tell them
        # apart.
        "baseline": f"{TRUE!r} if dispatch_policy is True else dispatch_policy",
    }
    scope = {
        "_wrapped": wrapped,
        "_Tensor": torch.Tensor,
        "_is_capturing": wrapped.is_capturing,
        "_slow": functools.partial(slow, wrapped),
        "_falls_back": falls_back,
    }
    return _around(wrapped, _MEASURED, words, scope)


def fixed(wrapped: "WrappedModule", policy: int | None, counters: "Counters") -> Callable[..., Any]:
    """The seam of `wrapped` with that policy at every call that sorts."""

    def unread(values: tuple[Any, ...], made: Any) -> Any:
        counters["unreadable"].add()
        return wrapped.seam(*made[0], **made[1])

    scope = {
        "_wrapped": wrapped,
        "_slow": unread,
        "_policy": policy,
        "_fixed": counters["fixed"].add,
        "_unreadable": counters["unreadable"].add,
    }
    return _around(wrapped, _FIXED, {}, scope)


def _around(
    wrapped: "WrappedModule", template: str, words: dict[str, Any], scope: dict[str, Any]
) -> Callable[..., Any]:
    # What the function itself takes: one that wraps another may take less than it says.
    parameters = list(inspect.signature(wrapped.seam, follow_wrapped=False).parameters.values())
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return _around_opaque(wrapped, template, words, scope)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    wrapped.names = tuple(p.name for p in parameters)
    given = ", ".join(wrapped.names)
    chosen = ", ".join("choice" if n == "dispatch_policy" else n for n in wrapped.names)
    words = {**words, "given": given, "chosen": chosen}
    wrapper = _compile(template, wrapped.names, defaults, words, scope, wrapped)
    return functools.wraps(wrapped.seam)(wrapper)


def _around_opaque(
    wrapped: "WrappedModule", template: str, words: dict[str, Any], scope: dict[str, Any]
) -> Callable[..., Any]:
    """For a seam of another shape, such as another tool's wrapper with `*args, **kwargs`: each call
    reaches it as it was made, but for the policy."""
    seam = wrapped.seam
    declared = inspect.signature(seam).parameters
    aiters = (*LEADING, *(n for n in KNOWN if n not in BUFFERS))
    names = tuple(declared) if {*LEADING} <= declared.keys() else aiters
    defaults = {p.name: p.default for p in declared.values() if p.default is not p.empty}
    defaults = _DEFAULTS | defaults
    wrapped.names = names

    def again(made: Any, policy: Any) -> Any:
        args, kwargs, callers = made
        if policy is callers:
            return seam(*args, **kwargs)
        if len(args) >= len(LEADING):
            return seam(*args[: len(LEADING) - 1], policy, *args[len(LEADING) :], **kwargs)
        return seam(*args, **{**kwargs, "dispatch_policy": policy})

    words = {**words, "given": "_made, dispatch_policy", "chosen": "_made, choice"}
    inner = _compile(template, names, dict.fromkeys(names) | defaults, words, scope, wrapped, again)

    @functools.wraps(seam)
    def moe_sorting(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) > len(names) or not given.keys() <= set(names):
            return scope["_slow"]((), (args, kwargs, None))
        callers = given.get("dispatch_policy", defaults["dispatch_policy"])
        return inner(**given, _made=(args, kwargs, callers))

    return moe_sorting


def _compile(
    template: str,
    names: tuple[str, ...],
    defaults: dict[str, Any],
    words: dict[str, Any],
    scope: dict[str, Any],
    wrapped: "WrappedModule",
    again: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    heads = [f"{name}=_default[{name!r}]" if name in defaults else name for name in names]
    unknown = [name for name in names[len(LEADING) :] if name not in KNOWN]
    buffers = [name for name in BUFFERS if name in names]
    more = [f"(() if {name} is None else ({name!r},))" for name in buffers]
    if unknown:
        more = [f"({', '.join(unknown)},)", *more]
    compared = [
        *_COMPARED,
        *(("{latest} is " + n, n) for n in ("accumulate", "return_local_topk_ids") if n in names),
        *(("{latest} == " + n, n) for n in unknown),
        *((f"({n} is None) is {{latest}}", f"{n} is None") for n in buffers),
    ]
    device = "topk_ids.get_device()" if wrapped.device is None else str(wrapped.device)
    if wrapped.device is None:
        compared.append((f"{{latest}} == {device}", device))
    latest = [f"latest_{number}" for number in range(len(compared))]
    values = f"({', '.join(names)},)"
    source = template.format(
        **words,
        heads=", ".join(heads if again is None else [*heads, "_made=None"]),
        all=values if again is None else f"{values}, _made",
        unsorted="".join(f" or {name}" for name in UNSORTED if name in names),
        latest=", ".join(latest),
        same=" and ".join(
            test.format(latest=name) for name, (test, _) in zip(latest, compared, strict=True)
        ),
        arguments=", ".join(value for _, value in compared),
        accumulate="accumulate" if "accumulate" in names else "True",
        local_ids="return_local_topk_ids" if "return_local_topk_ids" in names else "False",
        more=" + ".join(more) or "()",
        device=device,
        sort_arguments=", ".join(n if n in names else "True" for n in SORT_ARGUMENTS),
    )
    function: dict[str, Any] = {
        **scope,
        "_seam": again or wrapped.seam,
        "_default": defaults,
        # Equal to no call: nothing is None there.
        "_NEVER": (None,) * (len(compared) + 5),
    }
    exec(compile(source, f"<{__name__}>", "exec"), function)
    compiled: Callable[..., Any] = function["moe_sorting"]
    return compiled
