"""Calls that the wrapper at the seam does not answer by itself: the first of a key, the largest so
far, and those that cannot be read.

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

from adaptive_moe.engines.counters import Counters
from adaptive_moe.engines.entries import Entries, Entry, grown, left_alone
from adaptive_moe.engines.key import Key, OddCallError, read_key
from adaptive_moe.engines.seam import Layer
from adaptive_moe.engines.seen import SeenCall
from adaptive_moe.kernels.aiter import LEADING
from adaptive_moe.kernels.call import is_rounded

logger = logging.getLogger("adaptive_moe")

# Far more shapes than a model has; a caller that varies without end must not fill the memory.
MAX_SEEN = 256
MAX_FAILURES = 16


class RareCalls:
    """Notes what is seen, and makes entries for what has no table.

    lock: held while a layer's entries change. engine_policy: as in AiterHook.
    """

    def __init__(self, lock: threading.RLock, counters: Counters, engine_policy: int) -> None:
        self.seen: dict[Key, SeenCall] = {}
        self.asked = threading.local()
        self.warmed_up = False
        self._lock = lock
        self._counters = counters
        self._engine_policy = engine_policy
        self._failures = 0

    def answer(self, layer: Layer, values: tuple[Any, ...], call: Any = None) -> Any:
        """Make the call, once. `values` are those of layer.names; `call` is how it was made, args
        and kwargs, where that is not by the values alone."""
        noted, again = None, False
        if layer.active:
            try:
                named = dict(zip(layer.names, values, strict=False))
                noted, again = self._look(layer, named, call)
            except OddCallError:
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

    def forgive(self) -> None:
        """Count failures anew."""
        self._failures = 0

    def _look(
        self, layer: Layer, named: Mapping[str, Any], call: Any
    ) -> tuple[tuple[Key, int] | None, bool]:
        """The key and token count to look at the outputs of, if any; and whether the wrapper now
        answers the call. Raises OddCallError, and whatever failed in the wrapper."""
        key, num_tokens, passed = read_key(named, layer.device)
        if passed:
            self._counters.passed.add()
            return None, False
        with self._lock:
            entry = layer.entries.get(key)
            if entry is not None and num_tokens < len(entry.array):
                # Only this question can have failed; or another thread made the entry just now.
                layer.is_capturing()
                self._counters.unknown.add()
                return None, False
            is_baseline = self._is_baseline(named["dispatch_policy"])
            interests = is_baseline and self._note(layer, key, num_tokens, named, call)
            if entry is not None and entry.grows:
                _set(layer, key, grown(entry, num_tokens))
                return None, True
            count = (self._counters.unknown if is_baseline else self._counters.own).add
            count()
            if key in self.seen or (not is_baseline and len(layer.entries) < 2 * MAX_SEEN):
                _set(layer, key, left_alone(count, num_tokens, grows=not is_baseline))
            return (key, num_tokens) if interests else None, False

    def _is_baseline(self, asked: Any) -> bool:
        engines = self._engine_policy
        # A schema of bool has made True of the engine's own, whatever it was.
        return asked in (0, engines) or (asked is True and engines > 0)

    def _note(
        self, layer: Layer, key: Key, num_tokens: int, named: Mapping[str, Any], call: Any
    ) -> bool:
        """Remember the call, or that a larger batch came; True where its outputs are of interest.
        Engines account for memory when they first run the model, which is when this happens."""
        known = self.seen.get(key)
        if known is not None:
            if known.num_tokens < num_tokens:
                self.seen[key] = replace(known, num_tokens=num_tokens)
            return known.rounded is None
        if len(self.seen) >= MAX_SEEN or key in layer.entries:
            return False
        asked = getattr(self.asked, "last", None)
        self.seen[key] = SeenCall.now(key, num_tokens, named, _passed(layer, named, call), asked)
        if self.warmed_up:
            logger.warning(
                "sorting %d tokens of %s was first seen after warm-up: the baseline, %s, serves it "
                "until the next warm_up()",
                *(num_tokens, key.describe(), key.baseline_name),
            )
        return True

    def _note_outputs(self, key: Key, num_tokens: int, outputs: Any) -> None:
        if isinstance(outputs, tuple | list) and outputs:
            rounded = is_rounded(outputs, num_tokens, key.topk, key.num_experts, key.block_size)
            with self._lock:
                known = self.seen[key]
                self.seen[key] = replace(known, rounded=rounded, num_outputs=len(outputs))

    def _fail(self, layer: Layer, error: Exception) -> None:
        self._counters.failed.add()
        with self._lock:
            self._failures += 1
            first, last = self._failures == 1, self._failures == MAX_FAILURES
            if last:
                layer.active, layer.entries = False, Entries({})
        if first or last:
            logger.warning(
                "%s: choosing who sorts raised %s: %s",
                "stepping aside in this process, everything runs as it came"
                if last
                else "a call ran as it came",
                *(type(error).__name__, error),
            )


def _passed(layer: Layer, named: Mapping[str, Any], call: Any) -> dict[str, Any]:
    """The arguments after the ninth that reach the seam."""
    after = list(named)[len(LEADING) :]
    if call is None:
        return {name: named[name] for name in after}
    args, kwargs = call[:2]
    given = {*kwargs, *layer.names[: len(args)]}
    return {name: named[name] for name in after if name in given}


def _set(layer: Layer, key: Key, entry: Entry) -> None:
    if layer.active:
        layer.entries = Entries({**layer.entries, key: entry})
