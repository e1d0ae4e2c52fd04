"""The seam: `aiter.fused_moe.moe_sorting`, wrapped so that its dispatch policy is the one measured.

The wrapper changes the ninth argument, the policy, and nothing else; AITER's own function is called
exactly once a call whatever happens here. A call costs a dict lookup on the sort's shape, one
question to the GPU runtime (is this stream being captured?) and one array index.

    hook = AiterHook(read_settings())
    hook.install(aiter.fused_moe)      # from now on shapes are seen, and run as AITER chooses
    ... a first forward ...
    warm_up(hook, max_tokens=16384)    # warm_up.py measures the shapes seen, and sets their tables
    hook.uninstall()
"""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from adaptive_moe.engines.counters import Counters, Counts
from adaptive_moe.engines.seam import Layer, Pick
from adaptive_moe.kernels import POLICIES
from adaptive_moe.kernels.aiter import ConfigCall, seam_problem
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.settings import Mode, Settings

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("adaptive_moe")

# Far more shapes than a model has; a caller that varies without end must not fill the memory.
MAX_SEEN = 256

IsCapturing = Callable[[], bool]


class Key(NamedTuple):
    """What of a call changes the sort's cost, as the call spells it. Plain tuples compare equal to
    it, and are what the hot path builds."""

    num_experts: int
    topk: int
    model_dim: int
    dtype: "torch.dtype"
    block_size: int
    has_expert_mask: bool
    has_num_local_tokens: bool
    accumulate: bool

    def describe(self) -> str:
        return (
            f"{self.num_experts} experts, topk {self.topk}, dim {self.model_dim}, "
            f"{str(self.dtype).removeprefix('torch.')}, block {self.block_size}"
        )


@dataclass(frozen=True)
class SeenCall:
    """A shape as it was seen at the seam.

    num_tokens: the largest batch; config: how AITER's chooser was asked just before, if it was.
    """

    key: Key
    num_tokens: int
    device: "torch.device"
    expert_mask: "torch.Tensor | None"
    config: ConfigCall | None


class AiterHook:
    """The policy choice at AITER's seam in this process. All methods are safe from any thread.

    engine_policy is what the engine passes where its user chose nothing: like 0, it gives way to a
    measured policy, and is what runs where nothing was measured.
    tables is replaced whole, never changed in place: the hot path reads it without a lock.
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
        self.tables: Mapping[Key, PolicyTable] = {}
        self.seen: dict[Key, SeenCall] = {}
        self.warmed_up = False
        # One warm-up at a time; a second waits, and then finds the tables there.
        self.warming = threading.Lock()
        self._is_capturing = is_capturing
        self._counters = Counters()
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
                if self._layer.active:
                    return True
            problem = seam_problem(module)
            if problem is not None:
                logger.warning("nothing is changed: %s", problem)
                return False
            self._warn_of_policy()
            layer = Layer(module, self._asked)
            layer.put(self._pick(layer))
            self._layer = layer
            return True

    def uninstall(self) -> None:
        """Put back what was there, where we are outermost; else pass calls on from now on, so that
        whoever wrapped us keeps their wrapper."""
        with self._lock:
            if self._layer is not None and self._layer.take_out():
                self._layer = None

    @property
    def layer(self) -> Layer | None:
        """The layer that is in place and picks policies, or None."""
        layer = self._layer
        return layer if layer is not None and layer.active else None

    def set_tables(self, tables: Mapping[Key, PolicyTable]) -> None:
        """Add tables for these shapes; calls under way finish with the ones they found."""
        with self._lock:
            self.tables = {**self.tables, **tables}

    def counts(self) -> Counts:
        """What happened to the calls so far."""
        return self._counters.read()

    def _pick(self, layer: Layer) -> Pick:
        if self.settings.mode is Mode.FIXED:
            return self._pick_fixed(layer, self.settings.fixed_policy)
        return self._pick_measured(layer)

    def _pick_fixed(self, layer: Layer, policy: int | None) -> Pick:
        counters = self._counters

        def pick(topk_ids: Any, *others: Any) -> Any:
            asked, unsorted = others[6], others[8]
            if not layer.active:
                return asked
            try:
                if unsorted or not topk_ids.shape[0]:
                    counters.passed.add()
                    return asked
                counters.fixed.add()
                return policy
            except Exception as error:
                return self._failed(layer, error, asked)

        return pick

    def _pick_measured(self, layer: Layer) -> Pick:
        """The hot path, in one function because each call of another one costs as much as the
        look-up. A call adds to one counter, as the last thing that can fail."""
        counters, is_capturing = self._counters, self._is_capturing or capture_query()
        count_graph, count_eager = counters.graph.add, counters.eager.add
        engine_policy = self.engine_policy

        def pick(
            topk_ids: Any,
            num_experts: Any,
            model_dim: Any,
            dtype: Any,
            block_size: Any,
            expert_mask: Any,
            num_local_tokens: Any,
            asked: Any,
            accumulate: Any,
            unsorted: Any,
        ) -> Any:
            if not layer.active:
                return asked
            try:
                num_tokens, topk = topk_ids.shape
                if unsorted or not num_tokens:
                    counters.passed.add()
                    return asked
                if asked and asked != engine_policy:
                    counters.own.add()
                    return asked
                masked, padded = expert_mask is not None, num_local_tokens is not None
                # AITER allocates moe_buf for masked calls whatever accumulate says.
                zeroed = masked or accumulate
                key = (num_experts, topk, model_dim, dtype, block_size, masked, padded, zeroed)
                table = self.tables.get(key)  # type: ignore[call-overload]
                if table is None:
                    self._note(Key(*key), topk_ids, expert_mask)
                    counters.unknown.add()
                    return asked
                captured = is_capturing()
                array = table.graph if captured else table.eager
                policy = array[num_tokens] if num_tokens < len(array) else array[-1]
                count_graph() if captured else count_eager()
                return policy
            except Exception as error:
                return self._failed(layer, error, asked)

        return pick

    def _failed(self, layer: Layer, error: Exception, asked: Any) -> Any:
        """Whatever goes wrong on our side must not cost a serving call: the caller's own policy."""
        self._counters.failed.add()
        self._stand_aside(layer, error)
        return asked

    def _note(self, key: Key, topk_ids: "torch.Tensor", expert_mask: "torch.Tensor | None") -> None:
        """Remember a shape without a table. Holds references only: engines account for memory when
        they first run the model, which is when this happens."""
        num_tokens = topk_ids.shape[0]
        with self._lock:
            known = self.seen.get(key)
            if known is not None:
                if known.num_tokens < num_tokens:
                    self.seen[key] = replace(known, num_tokens=num_tokens)
                return
            if len(self.seen) >= MAX_SEEN:
                return
            args, kwargs = getattr(self._asked, "last", ((), {}))
            config = ConfigCall(args[1:], tuple(kwargs.items())) if args else None
            self.seen[key] = SeenCall(key, num_tokens, topk_ids.device, expert_mask, config)
        if self.warmed_up:
            logger.warning(
                "sorting %d tokens of %s was first seen after warm-up: AITER's own policy serves "
                "it until the next warm_up()",
                num_tokens,
                key.describe(),
            )

    def _stand_aside(self, layer: Layer, error: Exception) -> None:
        with self._lock:
            first, layer.active = layer.active, False
        if first:
            logger.warning(
                "stepping aside in this process, AITER runs as it is: choosing a policy raised "
                "%s: %s",
                type(error).__name__,
                error,
            )

    def _warn_of_policy(self) -> None:
        fixed = self.settings.fixed_policy
        if fixed is not None and fixed not in POLICIES:
            logger.warning(
                "policy %d is not one AITER names: it knows %s and takes any other as 2, "
                "multi-phase; give one of them, or auto",
                fixed,
                ", ".join(map(str, POLICIES)),
            )


def capture_query() -> IsCapturing:
    """A function that says whether the current stream is being captured into a graph. A torch
    built for the CPU cannot say, and never captures."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return lambda: False
    return torch.cuda.is_current_stream_capturing
