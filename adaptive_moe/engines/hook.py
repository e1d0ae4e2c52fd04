"""The hook at AITER's seam, `aiter.fused_moe.moe_sorting`: each call is answered by the candidate
that was measured for it, and everything else by the baseline, argument for argument.

AITER's own function is called exactly once a call whatever happens here, unless another sort
answers in its place. What each call costs is in wrapper.py, what happens rarely in rare.py.

    hook = AiterHook(read_settings())
    hook.install(aiter.fused_moe)      # from now on shapes are seen, and run as they came
    ... a first forward ...
    warm_up(hook, max_tokens=16384)    # warm_up.py measures the shapes seen, and sets their tables
    hook.uninstall()
"""

import logging
import threading
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from adaptive_moe.engines.counters import Counters, Counts
from adaptive_moe.engines.entries import Entries, Entry, entry_for, unanswered
from adaptive_moe.engines.key import Key
from adaptive_moe.engines.rare import RareCalls
from adaptive_moe.engines.seam import Layer
from adaptive_moe.engines.seen import SeenCall
from adaptive_moe.engines.wrapper import fixed, measured
from adaptive_moe.kernels import POLICIES, SortKernel
from adaptive_moe.kernels.aiter import meaning_of, seam_problem
from adaptive_moe.kernels.call import Live
from adaptive_moe.kernels.live import live_kernel
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.settings import Mode, Settings

logger = logging.getLogger("adaptive_moe")


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
        is_capturing: Callable[[], bool] | None = None,
    ) -> None:
        self.settings = settings
        self.engine_policy = engine_policy
        # One warm-up at a time; a second waits, and then finds the tables there.
        self.warming = threading.Lock()
        self._lock = threading.RLock()
        self._counters = Counters()
        self._is_capturing = is_capturing
        self._rare = RareCalls(self._lock, self._counters, engine_policy)
        self._layer: Layer | None = None
        self._tables: Mapping[Key, PolicyTable] = {}
        self._sorts: dict[Key, Mapping[str, Callable[..., Any]]] = {}
        self._off: set[str] = set()

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
                    self._rare.forgive()
                    return True
            problem = seam_problem(module)
            if problem is not None:
                logger.warning("nothing is changed: %s", problem)
                return False
            self._layer = layer = Layer(module, self._rare.asked, self._is_capturing)
            policy = self.settings.fixed_policy
            if self.settings.mode is Mode.FIXED and policy is not None:
                if policy not in POLICIES:
                    logger.warning("policy %d is %s", policy, meaning_of(policy))
                layer.put(fixed(layer, policy, self._counters))
            else:
                self._renew()
                layer.put(measured(layer, self._rare.answer, self._broke))
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
    def seen(self) -> Mapping[Key, SeenCall]:
        """What came by, whether it has a table or not, with the largest batch so far."""
        return self._rare.seen

    @property
    def warmed_up(self) -> bool:
        """Set it when a warm-up is over: shapes first seen from then on are warned of."""
        return self._rare.warmed_up

    @warmed_up.setter
    def warmed_up(self, over: bool) -> None:
        self._rare.warmed_up = over

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

    def kernel(self, seen: SeenCall, key: Key, coverage: Coverage) -> SortKernel:
        """Who may answer such calls, to be measured: the baseline, AITER's policies, and the sorts
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
            self._sorts[key] = sorts
            self._renew()
        return kernel

    def counts(self) -> Counts:
        """What happened to the calls so far."""
        return self._counters.read()

    def _renew(self) -> None:
        """Give the layer the entries of the tables; those of other keys are made when called."""
        layer = self._layer
        if layer is None:
            return
        found: dict[tuple[Any, ...], Entry] = {}
        for key, table in self._tables.items() if layer.active else ():
            found[key] = entry_for(table, self._sorts.get(key, {}), self._off, self._counters)
        layer.entries = Entries(found)

    def _broke(self, sort: Any, error: Exception) -> None:
        """That sort raised while serving: it is off in this process, whatever it was to answer."""
        self._counters.fell_back.add()
        with self._lock:
            names = {n for sorts in self._sorts.values() for n, s in sorts.items() if s is sort}
            if names <= self._off:
                return
            self._off |= names
            self._renew()
        logger.warning(
            "%s is off in this process and the baseline serves in its place: it raised %s: %s",
            *(", ".join(sorted(names)), type(error).__name__, error),
        )
