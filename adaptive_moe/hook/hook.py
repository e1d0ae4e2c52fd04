"""The hook at AITER's seam, `aiter.fused_moe.moe_sorting`: each call is answered by the candidate
that was measured for it, and everything else by the baseline, argument for argument.

What each call costs is in wrapper.py, what happens rarely in slow_path.py.

    hook = AiterHook(read_settings())
    hook.install(aiter.fused_moe)      # from now on shapes are seen, and run as they came
    ... a first forward ...
    warm_up_hook(hook, Batches(16384)) # engines/warm_up.py measures them, and sets their tables
    hook.uninstall()
"""

import logging
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from adaptive_moe.hook.counters import Counters, Counts
from adaptive_moe.hook.entries import Entries, entry_for, unanswered
from adaptive_moe.hook.slow_path import SlowPath
from adaptive_moe.hook.wrapped_module import WrappedModule, capture_query
from adaptive_moe.hook.wrapper import fixed, measured
from adaptive_moe.kernels import POLICIES, SortKernel, policy_name
from adaptive_moe.kernels.aiter import is_failure, meaning_of, seam_problem
from adaptive_moe.kernels.call import CallKey, SortCall
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
        self._counters = Counters()
        self._is_capturing = is_capturing
        self._slow_path = SlowPath(threading.RLock(), self._counters, engine_policy)
        self._wrapped: WrappedModule | None = None
        self._tables: Mapping[CallKey, PolicyTable] = {}
        self._sorts: dict[CallKey, Mapping[str, Callable[..., Any]]] = {}
        self._off: set[str] = set()
        self._owners: dict[CallKey, weakref.ref[Any]] = {}
        self.renew_locks()

    def renew_locks(self) -> None:
        """New locks that no thread holds: for a child that was forked while one was held."""
        # One warm-up at a time; a second waits, and then finds the tables there.
        self.warming = threading.Lock()
        self._lock = self._slow_path.lock = threading.RLock()

    def install(self, module: ModuleType) -> bool:
        """Wrap the seam of `module`; False, with one warning, where it is not the seam we know.

        Installing again adds no second wrapper. A wrapper that another tool wrapped and that was
        uninstalled since is switched on again. One whose module was loaded anew is replaced.
        """
        with self._lock:
            if self._wrapped is not None:
                self._wrapped.set_active(self._wrapped.is_reached_from(module))
                self._renew()
                if self._wrapped.active:
                    self._slow_path.forgive()
                    return True
            problem = seam_problem(module)
            if problem is not None:
                logger.warning("nothing is changed: %s", problem)
                return False
            wrapped = WrappedModule(module, self._counters["passed"].add, self._is_capturing)
            self._wrapped = wrapped
            policy = self.settings.fixed_policy
            if self.settings.mode is Mode.FIXED and policy is not None:
                if policy not in POLICIES:
                    logger.warning("policy %d is %s", policy, meaning_of(policy))
                wrapped.put(fixed(wrapped, policy, self._counters))
            else:
                self._renew()
                wrapped.put(measured(wrapped, self._slow_path.answer, self._falls_back))
            return True

    def uninstall(self) -> None:
        """Put back what was there, where we are outermost; else pass calls on from now on, so that
        a tool that wrapped us keeps its wrapper."""
        with self._lock:
            if self._wrapped is not None and self._wrapped.take_out():
                self._wrapped = None

    @property
    def wrapped(self) -> WrappedModule | None:
        """The module whose wrapper is in place and chooses, or None."""
        wrapped = self._wrapped
        return wrapped if wrapped is not None and wrapped.active else None

    @property
    def seen(self) -> Mapping[CallKey, SortCall]:
        """The calls that came by, by key, whether there is a table or not."""
        return self._slow_path.seen

    @property
    def tables(self) -> Mapping[CallKey, PolicyTable]:
        """The tables in use. Replaced whole, never changed in place."""
        return self._tables

    def set_tables(self, tables: Mapping[CallKey, PolicyTable]) -> None:
        """Add tables for these keys; calls under way finish with the ones they found. A candidate
        that nothing here answers to (kernel() makes the functions known) is the baseline."""
        with self._lock:
            self._tables = {**self._tables, **tables}
            missing = {n for k, t in tables.items() for n in unanswered(t, self._sorts.get(k, {}))}
            self._renew()
        for name in sorted(missing):
            logger.warning("nothing here sorts as %r: the baseline serves in its place", name)

    def wanted_by(self, owner: object) -> list[SortCall]:
        """The calls seen that a warm-up for `owner` is about: not those whose model is gone, nor
        those that another owner, an engine in this process, has warmed up."""

        def is_anothers(key: CallKey) -> bool:
            reference = self._owners.get(key)
            other = None if reference is None else reference()
            return other is not None and other is not owner

        with self._lock:
            calls = list(self.seen.values())
            return [call for call in calls if not (call.is_gone or is_anothers(call.key))]

    def end_warm_up(self, tables: Collection[CallKey], owner: object) -> None:
        """A warm-up is over that made tables for these keys: a key seen first from now on is warned
        of. Calls with a table keep no expert mask alive any more. Where there is an owner, its keys
        and tables are forgotten when it is gone."""
        keys = {*tables, *(call.key for call in self.wanted_by(owner))}
        with self._lock:
            self._slow_path.warmed_up = True
            for key in self._tables.keys() & self.seen.keys():
                self._slow_path.seen[key] = self.seen[key].without_keeping_mask()
            if owner is not None:
                try:
                    reference = weakref.ref(owner)
                except TypeError:  # it cannot be told when that is gone
                    return
                for key in keys:
                    self._owners.setdefault(key, reference)
                weakref.finalize(owner, self._owner_ended, keys).atexit = False

    def kernel(self, call: SortCall, key: CallKey, coverage: Coverage) -> SortKernel:
        """The candidates for such calls, to be measured: the baseline, AITER's policies, and the
        sorts that the settings admit. key: the seen one, or that of the same layer at other counts.

        Run what measures it by call.as_called(). RuntimeError where the hook is not in place.
        """
        wrapped = self.wrapped
        if wrapped is None:
            raise RuntimeError("adaptive_moe is not active in this process: install() it first")
        extras = dict(call.extras)
        if key.accumulate != call.key.accumulate:
            extras["accumulate"] = key.accumulate
        call = replace(call, module=wrapped.module, seam=wrapped.seam, extras=extras)
        kernel, sorts = live_kernel(call, coverage, self.settings.sorts)
        with self._lock:
            self._sorts[key] = sorts
            self._renew()
        return kernel

    def counts(self) -> Counts:
        """What happened to the calls so far."""
        return self._counters.read()

    def _renew(self) -> None:
        """Give the wrapper the entries of the tables; those of other keys are made when called."""
        wrapped = self._wrapped
        if wrapped is not None and wrapped.active:
            wrapped.entries = Entries(
                {
                    key: entry_for(table, self._sorts.get(key, {}), self._off, self._counters)
                    for key, table in self._tables.items()
                }
            )

    def _owner_ended(self, keys: Collection[CallKey]) -> None:
        # Called by the garbage collector, at any moment and in any thread: it must not wait. What
        # is left then costs the next engine a measurement that is not used.
        if self._lock.acquire(blocking=False):
            try:
                self._forget([k for k in keys if k in self._owners and self._owners[k]() is None])
            finally:
                self._lock.release()

    def _forget(self, keys: Collection[CallKey]) -> None:
        if not keys:
            return
        for kept in (self._slow_path.seen, self._sorts, self._owners):
            for key in keys:
                kept.pop(key, None)
        self._tables = {k: table for k, table in self._tables.items() if k not in keys}
        self._slow_path.warmed_up = bool(self._tables)
        self._renew()

    def _falls_back(self, choice: Any, error: BaseException) -> bool:
        """A candidate raised while serving: it is off in this process, for whatever it was to
        answer. May the baseline answer that call? Not while a graph is captured, unless memory ran
        out: what was launched before stays in the graph and would run at each replay."""
        if not is_failure(error):
            return False
        with self._lock:
            if isinstance(choice, int):
                names = {policy_name(choice)}
            else:
                sorts = [item for sorts in list(self._sorts.values()) for item in sorts.items()]
                names = {name for name, sort in sorts if sort is choice}
            is_new = not names <= self._off
            self._off |= names
            if is_new:
                self._renew()
        falls_back = self._ran_out_of_memory(error) or not self._may_be_capturing()
        if falls_back:
            self._counters["fell_back"].add()
        if is_new:
            logger.warning(
                "%s is off in this process and the baseline serves in its place: it raised %s: %s",
                *(", ".join(sorted(names)), type(error).__name__, error),
            )
        return falls_back

    def _ran_out_of_memory(self, error: BaseException) -> bool:
        import torch

        return isinstance(error, torch.cuda.OutOfMemoryError)

    def _may_be_capturing(self) -> bool:
        # Another thread may just have uninstalled it.
        wrapped = self._wrapped
        query = self._is_capturing if wrapped is None else wrapped.is_capturing
        try:
            return (query or capture_query())()
        except Exception:
            return True
