"""The hook at AITER's seam, `aiter.fused_moe.moe_sorting`: each call is answered by the candidate
that was measured for it, and everything else by the baseline, argument for argument.

AITER's own function is called exactly once a call whatever happens here, unless another sort
answers in its place. What a call costs is in wrapper.py; here is what happens rarely.

    hook = AiterHook(read_settings())
    hook.install(aiter.fused_moe)      # from now on shapes are seen, and run as they came
    ... a first forward ...
    warm_up(hook, max_tokens=16384)    # warm_up.py measures the shapes seen, and sets their tables
    hook.uninstall()

When something goes wrong. A call we cannot read (symbolic sizes, something unhashable, a fake or
meta tensor, no matrix) costs itself alone: it goes through as it came and is counted, however many
there are. A failure of our own, such as a driver that does not say whether it captures, also costs
that call only its choice, and is logged once; after MAX_FAILURES of them the hook stands aside for
the process, because what fails so often will go on failing, and each failure costs microseconds.
"""

import contextvars
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Real
from types import ModuleType
from typing import TYPE_CHECKING, Any

from adaptive_moe.engines.counters import Counters, Counts
from adaptive_moe.engines.entries import entry_for, grown, left_alone, unanswered
from adaptive_moe.engines.seam import Layer
from adaptive_moe.engines.seen import TRUE, Buffer, Key, SeenCall, is_rounded
from adaptive_moe.engines.wrapper import Entry, fixed, measured
from adaptive_moe.kernels import POLICIES, SortKernel
from adaptive_moe.kernels.aiter import (
    BUFFERS,
    KNOWN,
    LEADING,
    UNSORTED,
    ConfigCall,
    meaning_of,
    seam_problem,
)
from adaptive_moe.kernels.live import Live, live_kernel
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.settings import Mode, Settings

if TYPE_CHECKING:
    import torch

__all__ = ["AiterHook", "Buffer", "Key", "SeenCall", "capture_query"]

logger = logging.getLogger("adaptive_moe")

# Far more shapes than a model has; a caller that varies without end must not fill the memory.
MAX_SEEN = 256
MAX_FAILURES = 16

IsCapturing = Callable[[], bool]


class _OddCall(Exception):
    """The arguments of a call are none that we can read."""


class AiterHook:
    """The choice at AITER's seam in this process. All methods are safe from any thread.

    engine_policy is what the engine passes where its user chose nothing. It and 0 are baselines:
    policies to measure against. Any other is the caller's own choice and is left alone.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        engine_policy: int = 0,
        is_capturing: IsCapturing | None = None,
    ) -> None:
        self.settings = settings
        self.engine_policy = engine_policy
        self.seen: dict[Key, SeenCall] = {}
        self.warmed_up = False
        # One warm-up at a time; a second waits, and then finds the tables there.
        self.warming = threading.Lock()
        self._tables: Mapping[Key, PolicyTable] = {}
        self._sorts: dict[Key, Mapping[str, Callable[..., Any]]] = {}
        self._off: set[str] = set()
        self._is_capturing = is_capturing
        self._counters = Counters()
        self._failures = 0
        self._layer: Layer | None = None
        self._lock = threading.RLock()
        self._asked = threading.local()

    def install(self, module: ModuleType) -> bool:
        """Wrap the seam of `module`; False, with one warning, where it is not the seam we know.

        Installing again is no second layer. A layer that somebody wrapped and that was uninstalled
        since is woken up again rather than doubled.
        """
        with self._lock:
            if self._layer is not None:
                self._layer.active = self._layer.is_reached_from(module)
                self._renew()
                if self._layer.active:
                    self._failures = 0
                    return True
            problem = seam_problem(module)
            if problem is not None:
                logger.warning("nothing is changed: %s", problem)
                return False
            self._layer = layer = Layer(module, self._asked)
            if self.settings.mode is Mode.FIXED:
                policy = self.settings.fixed_policy
                if policy is not None and policy not in POLICIES:
                    logger.warning("policy %d is %s: give one", policy, meaning_of(policy))
                layer.put(fixed(layer, policy, self._counters))
                return True
            self._renew()
            layer.put(measured(layer, self, self._is_capturing or capture_query()))
            return True

    def uninstall(self) -> None:
        """Put back what was there, where we are outermost; else pass calls on from now on, so that
        whoever wrapped us keeps their wrapper."""
        with self._lock:
            if self._layer is not None and self._layer.take_out():
                self._layer = None

    @property
    def layer(self) -> Layer | None:
        """The layer that is in place and chooses, or None."""
        layer = self._layer
        return layer if layer is not None and layer.active else None

    @property
    def tables(self) -> Mapping[Key, PolicyTable]:
        """The tables in use. Replaced whole, never changed in place."""
        return self._tables

    def set_tables(self, tables: Mapping[Key, PolicyTable]) -> None:
        """Add tables for these keys; calls under way finish with the ones they found. A candidate
        that nothing here answers to (kernel() makes known who does) is the baseline."""
        with self._lock:
            self._tables = {**self._tables, **tables}
            missing = {n for k, t in tables.items() for n in unanswered(t, self._sorts.get(k, {}))}
            self._renew()
        for name in sorted(missing):
            logger.warning("nothing here sorts as %r: the baseline serves in its place", name)

    def drop_tables(self) -> None:
        """Forget all tables: the baseline serves, until others are set."""
        with self._lock:
            self._tables = {}
            self._renew()

    def counts(self) -> Counts:
        """What happened to the calls so far."""
        return self._counters.read()

    def kernel(self, seen: SeenCall, key: Key, coverage: Coverage) -> SortKernel:
        """What may answer such calls, to be measured: the baseline, AITER's policies, and the sorts
        that the settings admit. key: the seen one, or that of the same layer at other counts.

        Run what measures it by seen.as_called(). RuntimeError where the hook is not in place.
        """
        layer = self.layer
        if layer is None:
            raise RuntimeError("adaptive_moe is not active in this process: install() it first")
        extras = dict(seen.extras)
        if key.accumulate != seen.key.accumulate:
            extras["accumulate"] = key.accumulate
        live = Live(
            module=layer.module,
            seam=layer.seam,
            device=seen.device,
            baseline=seen.baseline,
            extras=extras,
            rounded=seen.rounded,
            num_outputs=seen.num_outputs,
        )
        kernel, sorts = live_kernel(live, coverage, self.settings.sorts)
        with self._lock:
            self._sorts[key] = {name: s for name, s in sorts.items() if name not in self._off}
        return kernel

    # What wrapper.py asks for.

    def rare(self, layer: Layer, values: tuple[Any, ...], call: Any = None) -> Any:
        """Answer a call that the wrapper does not: make an entry for its key where it can have one,
        and let it through. `call`: how it was made, where that is not by `values` alone."""
        noted, again = None, False
        if layer.active:
            try:
                noted, again = self._look(layer, dict(zip(layer.names, values, strict=False)))
            except _OddCall:
                self._counters.odd.add()
            except Exception as error:
                self._fail(layer, error)
        args, kwargs = (values, {}) if call is None else call[:2]
        if again:
            return layer.wrapper(*args, **kwargs)
        outputs = layer.seam(*args, **kwargs)
        if noted is not None:
            try:
                self._note_outputs(*noted, outputs)
            except Exception as error:
                self._fail(layer, error)
        return outputs

    def broke(self, sort: Any, error: Exception) -> None:
        """That sort raised while serving: it is off in this process, whatever it was to answer."""
        self._counters.fell_back.add()
        with self._lock:
            names = {n for sorts in self._sorts.values() for n, s in sorts.items() if s is sort}
            if names <= self._off:
                return
            self._off |= names
            self._renew()
        logger.warning(
            "%s is off in this process, the baseline serves in its place: it raised %s: %s",
            *(", ".join(sorted(names)), type(error).__name__, error),
        )

    def _look(
        self, layer: Layer, named: dict[str, Any]
    ) -> tuple[tuple[Key, int] | None, bool]:
        """The key and count to look at the outputs of, if any, and whether the wrapper now knows
        the call. Raises _OddCall, or whatever failed in the wrapper."""
        key, num_tokens, passed = _read(named)
        if passed:
            self._counters.passed.add()
            return None, False
        with self._lock:
            entry = layer.entries.get(key)
            if entry is not None and num_tokens < len(entry.array):
                # What failed can only be this question; or the entry was made a moment ago.
                (self._is_capturing or capture_query())()
                self._counters.unknown.add()
                return None, False
            if not self._is_baseline(named["dispatch_policy"]):
                if entry is not None or len(layer.entries) < 2 * MAX_SEEN:
                    self._set_entry(layer, key, left_alone(self._counters.own.add, 2 * num_tokens))
                self._counters.own.add()
                return None, False
            noted = self._note(key, num_tokens, named)
            if entry is not None and key in self._tables:
                self._set_entry(layer, key, grown(entry, num_tokens))
                return None, True
            if key in self.seen:
                count = self._counters.unknown.add
                self._set_entry(layer, key, left_alone(count, num_tokens))
            self._counters.unknown.add()
            return (key, num_tokens) if noted else None, False

    def _is_baseline(self, asked: Any) -> bool:
        return asked == 0 or asked == self.engine_policy or (asked is True and self.engine_policy > 0)

    def _set_entry(self, layer: Layer, key: Key, entry: Entry) -> None:
        if layer.active:
            layer.entries = {**layer.entries, key: entry}

    def _renew(self) -> None:
        """Give the layer the entries of the tables. Those of other keys are made when called."""
        layer = self._layer
        if layer is None:
            return
        layer.entries = {} if not layer.active else {
            key: entry_for(table, self._sorts.get(key, {}), self._off, self._counters)
            for key, table in self._tables.items()
        }

    def _fail(self, layer: Layer, error: Exception) -> None:
        """Whatever goes wrong on our side must not cost a serving call: the baseline answers."""
        self._counters.failed.add()
        with self._lock:
            self._failures += 1
            first, last = self._failures == 1, self._failures == MAX_FAILURES
            if last:
                layer.active = False
                layer.entries = {}
        if first or last:
            logger.warning(
                "%s: choosing who sorts raised %s: %s",
                "stepping aside in this process, everything runs as it came"
                if last
                else "the baseline serves this call",
                type(error).__name__,
                error,
            )

    def _note(self, key: Key, num_tokens: int, named: Mapping[str, Any]) -> bool:
        """Remember a call, or that a larger batch came; True where its outputs are of interest.
        Holds references only: engines account for memory when they first run the model, which is
        when this happens."""
        known = self.seen.get(key)
        if known is not None:
            if known.num_tokens < num_tokens:
                self.seen[key] = replace(known, num_tokens=num_tokens)
            return known.rounded is None
        if len(self.seen) >= MAX_SEEN:
            return False
        self.seen[key] = _seen(key, num_tokens, named, getattr(self._asked, "last", ((), {})))
        if self.warmed_up:
            logger.warning(
                "sorting %d tokens of %s was first seen after warm-up: the baseline, %s, serves it "
                "until the next warm_up()",
                *(num_tokens, key.describe(), key.baseline_name),
            )
        return True

    def _note_outputs(self, key: Key, num_tokens: int, outputs: Any) -> None:
        if isinstance(outputs, tuple | list) and outputs:
            rounded = is_rounded(outputs, num_tokens, key)
            with self._lock:
                seen = self.seen[key]
                self.seen[key] = replace(seen, rounded=rounded, num_outputs=len(outputs))


def _read(named: Mapping[str, Any]) -> tuple[Key, int, bool]:
    """The key of a call, its token count, and whether it leaves nothing to choose; _OddCall."""
    import torch

    try:
        ids, asked = named["topk_ids"], named["dispatch_policy"]
        num_tokens, topk = ids.shape
        passed = not num_tokens or any(named.get(name) for name in UNSORTED)
        masked = named["expert_mask"] is not None
        more = {n: v for n, v in list(named.items())[len(LEADING) :] if n not in KNOWN or n in BUFFERS}
        key = Key(
            num_experts=named["num_experts"],
            topk=topk,
            model_dim=named["model_dim"],
            dtype=named["moebuf_dtype"],
            block_size=named["block_size"],
            has_expert_mask=masked,
            has_num_local_tokens=named["num_local_tokens"] is not None,
            accumulate=masked or named.get("accumulate", True),
            local_ids=named.get("return_local_topk_ids", False),
            more=tuple(v is not None if n in BUFFERS else v for n, v in more.items()),
            baseline=TRUE if asked is True else asked,
            device=ids.get_device(),
        )
        hash(key)
    except Exception as error:
        raise _OddCall from error
    numbers = (num_tokens, topk, key.num_experts, key.model_dim, key.block_size, asked)
    is_plain = (
        type(ids) is torch.Tensor
        and not ids.is_meta
        and all(isinstance(number, Real) for number in numbers)
        and isinstance(key.dtype, torch.dtype)
        and not any(isinstance(value, torch.Tensor) for value in key)
        and not any(isinstance(value, torch.Tensor) for value in key.more)
    )
    if not is_plain:
        raise _OddCall
    return key, num_tokens, passed


def _seen(
    key: Key, num_tokens: int, named: Mapping[str, Any], asked: tuple[tuple[Any, ...], dict[str, Any]]
) -> SeenCall:
    import torch

    device = named["topk_ids"].device
    args, kwargs = asked
    return SeenCall(
        key=key,
        num_tokens=num_tokens,
        device=device,
        baseline=named["dispatch_policy"],
        expert_mask=named["expert_mask"],
        extras={
            name: Buffer(tuple(value.shape[1:]), value.dtype)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in list(named.items())[len(LEADING) :]
        },
        config=ConfigCall(args[1:], tuple(kwargs.items())) if args else None,
        context=contextvars.copy_context(),
        grad=torch.is_grad_enabled(),
        inference=torch.is_inference_mode_enabled(),
        stream=None if device.type == "cpu" else torch.cuda.current_stream(device),
    )


def capture_query() -> IsCapturing:
    """A function that says whether the current stream is being captured into a graph. A torch
    built for the CPU cannot say, and never captures."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return lambda: False
    return torch.cuda.is_current_stream_capturing
