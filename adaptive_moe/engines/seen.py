"""A call as it was seen at the seam, and everything needed to make it again."""

import contextvars
import enum
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from adaptive_moe.engines.key import Key
from adaptive_moe.kernels.aiter import ConfigCall
from adaptive_moe.kernels.call import Buffer

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class SeenCall:
    """A shape as it was seen at the seam. References only, nothing allocated.

    num_tokens   the largest batch; the rest is of the first call
    baseline     the policy as the caller passes it: 0, 2, True
    extras       every argument after the ninth by name, as passed; the batch's tensors as Buffer
    config       how AITER's chooser was asked just before, if it was
    context      the caller's ContextVars, which some sorts read. What they hold lives as long
    stream       current on that device; None on the CPU
    rounded      whether the baseline rounds sorted_ids up to whole blocks; None where that batch
                 does not tell
    num_outputs  how many tensors the baseline returned
    """

    key: Key
    num_tokens: int
    device: "torch.device"
    baseline: Any
    expert_mask: "torch.Tensor | None"
    extras: Mapping[str, Any]
    config: ConfigCall | None
    context: contextvars.Context
    grad: bool
    inference: bool
    stream: "torch.cuda.Stream | None"
    rounded: bool | None = None
    num_outputs: int = 0

    @classmethod
    def now(
        cls,
        key: Key,
        num_tokens: int,
        named: Mapping[str, Any],
        passed: Mapping[str, Any],
        asked: tuple[tuple[Any, ...], dict[str, Any]] | None,
    ) -> "SeenCall":
        """The call that is being made, of these arguments by name. passed: those after the ninth
        that reach the seam; asked: how the chooser was asked just before."""
        import torch

        device = named["topk_ids"].device
        args, kwargs = asked or ((), {})
        return cls(
            key=key,
            num_tokens=num_tokens,
            device=device,
            baseline=named["dispatch_policy"],
            expert_mask=named["expert_mask"],
            extras={
                name: Buffer(tuple(value.shape[1:]), value.dtype)
                if isinstance(value, torch.Tensor)
                else value
                for name, value in passed.items()
            },
            config=ConfigCall(args[1:], tuple(kwargs.items())) if args else None,
            context=contextvars.copy_context(),
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            stream=None if device.type == "cpu" else torch.cuda.current_stream(device),
        )

    def as_called(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a function where this call ran: in a copy of its context, on its device and stream,
        in its grad and inference mode. Everything is afterwards as it was."""
        return self.context.copy().run(lambda: self._in_place(function, *args, **kwargs))

    def _in_place(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        import torch

        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.device.type != "cpu":
                stack.enter_context(torch.cuda.device(self.device))
                # Its own work on that stream comes first, as it does for the calls.
                stack.enter_context(torch.cuda.stream(self.stream))
            return function(*args, **kwargs)

    def context_values(self) -> str:
        """The caller's ContextVars that hold a plain value, `name=value` by name: what of them a
        table can be told apart by."""
        values = {
            variable.name: value
            for variable, value in self.context.items()
            if isinstance(value, bool | int | str | enum.Enum) and not _is_torchs(variable)
        }
        return ",".join(f"{name}={values[name]}" for name in sorted(values))


def _is_torchs(variable: "contextvars.ContextVar[Any]") -> bool:
    """Settings of torch's compiler are ContextVars too, and differ from one start to the next; no
    sort reads them. They are named after their module, or mean nothing until they are set."""
    if variable.name.startswith("torch."):
        return True
    unset = getattr(sys.modules.get("torch.utils._config_module"), "_UNSET_SENTINEL", None)
    return unset is not None and _default(variable) is unset


def _default(variable: "contextvars.ContextVar[Any]") -> Any:
    try:
        return contextvars.Context().run(variable.get)
    except LookupError:
        return None
