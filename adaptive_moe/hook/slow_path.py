"""Calls that the wrapper does not answer by itself: the first of a key, the largest so far, and
those that cannot be read.

What goes wrong here costs no serving call. One whose arguments we cannot read (symbolic sizes,
something unhashable, a fake or meta tensor, ids of one or three dimensions) costs itself alone: it
goes through as it came and is counted, however many there are. A failure of our own, such as a
driver that does not say whether it captures, also costs that call only its choice, and the first is
logged; after MAX_FAILURES the hook stands aside for the process, because what fails so often will
go on failing, and each time costs microseconds.
"""

import logging
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adaptive_moe.hook.calls import UnreadableCallError, is_rounded, read_key, sort_call
from adaptive_moe.hook.counters import Counters
from adaptive_moe.hook.entries import Entries, Entry, grown, left_alone
from adaptive_moe.hook.wrapped_module import WrappedModule
from adaptive_moe.kernels.call import CallKey, SortCall

logger = logging.getLogger("adaptive_moe")

# Far more shapes than a model has; a caller that varies without end must not fill the memory.
MAX_SEEN = 256
MAX_FAILURES = 16


class SlowPath:
    """Notes what is seen, and makes entries for what has no table.

    lock: held while the wrapped module's entries change. engine_policy: as in AiterHook.
    """

    def __init__(self, lock: threading.RLock, counters: Counters, engine_policy: int) -> None:
        self.lock = lock
        self.seen: dict[CallKey, SortCall] = {}
        self.warmed_up = False
        self._counters = counters
        self._engine_policy = engine_policy
        self._failures = 0

    def answer(self, wrapped: WrappedModule, values: tuple[Any, ...], made: Any = None) -> Any:
        """Make the call, once. `values` are those of wrapped.names; `made` is how it was made, args
        and kwargs, where that is not by the values alone."""
        noted, again = None, False
        if wrapped.active:
            try:
                named = dict(zip(wrapped.names, values, strict=False))
                noted, again = self._look(wrapped, named, made)
            except UnreadableCallError:
                self._counters["unreadable"].add()
            except Exception as error:
                self._fail(wrapped, error)
        args, kwargs = (values, {}) if made is None else made[:2]
        if again:
            return wrapped.wrapper(*args, **kwargs)
        outputs = wrapped.seam(*args, **kwargs)
        if noted is not None:
            try:
                self._note_outputs(*noted, outputs)
            except Exception as error:
                self._fail(wrapped, error)
        return outputs

    def forgive(self) -> None:
        """Count failures anew."""
        self._failures = 0

    def _look(
        self, wrapped: WrappedModule, named: Mapping[str, Any], made: Any
    ) -> tuple[tuple[CallKey, int] | None, bool]:
        """The key and token count to look at the outputs of, if any; and whether the wrapper now
        answers the call. Raises UnreadableCallError, and whatever failed in the wrapper."""
        key, num_tokens, passed = read_key(named, wrapped.device)
        if passed:
            wrapped.passed()
            return None, False
        with self.lock:
            entry = wrapped.entries.get(key)
            if entry is not None and num_tokens < len(entry.array):
                # Only this question can have failed; or another thread made the entry just now.
                wrapped.is_capturing()
                self._counters["unknown"].add()
                return None, False
            is_baseline = self._is_baseline(named["dispatch_policy"])
            interests = is_baseline and self._note(wrapped, key, num_tokens, named, made)
            if entry is not None and entry.grows:
                _set(wrapped, key, grown(entry, num_tokens))
                return None, True
            count = self._counters["unknown" if is_baseline else "callers_policy"].add
            count()
            if key in self.seen or (not is_baseline and len(wrapped.entries) < 2 * MAX_SEEN):
                _set(wrapped, key, left_alone(count, num_tokens, grows=not is_baseline))
            return (key, num_tokens) if interests else None, False

    def _is_baseline(self, policy: Any) -> bool:
        engines = self._engine_policy
        # A schema of bool has made True of the engine's own, whatever it was.
        return policy in (0, engines) or (policy is True and engines > 0)

    def _note(
        self,
        wrapped: WrappedModule,
        key: CallKey,
        num_tokens: int,
        named: Mapping[str, Any],
        made: Any,
    ) -> bool:
        """Remember the call, or that a larger batch came; True where its outputs are of interest.
        Engines account for memory when they first run the model, which is when this happens."""
        known = self.seen.get(key)
        if known is not None and not known.is_gone:
            if known.num_tokens < num_tokens:
                self.seen[key] = replace(known, num_tokens=num_tokens)
            return known.rounded is None
        if known is None and (len(self.seen) >= MAX_SEEN or key in wrapped.entries):
            return False
        self.seen[key] = sort_call(wrapped, key, num_tokens, named, made)
        if self.warmed_up and known is None:
            logger.warning(
                "sorting %d tokens of %s was first seen after warm-up: the baseline, %s, serves it "
                "until the next warm_up()",
                *(num_tokens, key.describe(), key.baseline_name),
            )
        return True

    def _note_outputs(self, key: CallKey, num_tokens: int, outputs: Any) -> None:
        if isinstance(outputs, tuple | list) and outputs:
            rounded = is_rounded(outputs, num_tokens, key)
            with self.lock:
                known = self.seen.get(key)
                if known is not None:
                    self.seen[key] = replace(known, rounded=rounded, num_outputs=len(outputs))

    def _fail(self, wrapped: WrappedModule, error: Exception) -> None:
        self._counters["failed"].add()
        with self.lock:
            self._failures += 1
            first, last = self._failures == 1, self._failures == MAX_FAILURES
            if last:
                wrapped.set_active(False)
        if first or last:
            logger.warning(
                "%s: choosing a sort raised %s: %s",
                "stepping aside in this process, everything runs as it came"
                if last
                else "a call ran as it came",
                *(type(error).__name__, error),
            )


def _set(wrapped: WrappedModule, key: CallKey, entry: Entry) -> None:
    if wrapped.active:
        wrapped.entries = Entries({**wrapped.entries, key: entry})
