"""Who sorts in a step, switched through the hook: the table, or one candidate at every count.

Every variant goes through the hook that serves, as a table does: a candidate alone is a table that
names it everywhere. So all of them cost the host the same, and what is judged is what serves.
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType

from adaptive_moe.engines.hook import AiterHook
from adaptive_moe.engines.key import Key
from adaptive_moe.engines.warm_up import warm_up
from adaptive_moe.policy.decision import Standing
from adaptive_moe.policy.evidence import Bucket
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.settings import Mode, Settings

# The variant that sorts by the table; the others are candidates, by name.
TABLE = "table"


class Variants:
    """While entered, the hook is installed at the seam of `module`, with tables of its own.

    step(num_tokens) runs what calls the seam once or more. It is run at each of `counts`, the
    shapes seen are calibrated up to the largest, and `tables` has what that gave.

    Raises RuntimeError where a shape got no table.
    """

    def __init__(
        self,
        module: object,
        step: Callable[[int], object],
        counts: Sequence[int],
        captured: Sequence[int],
        settings: Settings,
        baseline: int,
    ) -> None:
        self.counts, self.captured = sorted(set(counts)), tuple(captured)
        self._module, self._step, self._settings = module, step, settings
        self._baseline = baseline
        self._stack = ExitStack()

    def __enter__(self) -> "Variants":
        with self._stack as stack:
            # Nothing is read from the user's store, and nothing left there.
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="adaptive-moe-bench-"))
            settings = replace(self._settings, mode=Mode.AUTO, cache_dir=folder, recalibrate=True)
            self.hook = AiterHook(settings, engine_policy=self._baseline)
            if not self.hook.install(self._module):  # type: ignore[arg-type]
                raise RuntimeError("the hook was not installed: the log says why")
            stack.callback(self.hook.uninstall)
            self._key_at: dict[int, Key] = {}
            for count in self.counts:
                self._step(count)
                # Counts rise, so the key whose largest batch this is serves it.
                largest = [k for k, seen in self.hook.seen.items() if seen.num_tokens == count]
                self._key_at[count] = largest[-1]
            done = warm_up(self.hook, self.counts[-1], self.captured)
            missing = [key for key in self._key_at.values() if key not in self.hook.tables]
            if missing:
                raise RuntimeError(f"no table for {missing[0].describe()}: {done.problems}")
            self.tables = dict(self.hook.tables)
            self._tables = {TABLE: self.tables}
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def table_at(self, num_tokens: int) -> PolicyTable:
        """The table that serves one of the counts."""
        return self.tables[self._key_at[num_tokens]]

    def at(self, num_tokens: int) -> list[str]:
        """The variants at that count, the baseline first, the table last. What was wrong or failed
        somewhere in the calibration is none."""
        table = self.table_at(num_tokens)
        evidence = table.evidence
        out = {
            result.candidate
            for bucket in evidence.buckets
            for verdict in bucket.verdicts
            for result in verdict.results
            if result.standing in (Standing.WRONG, Standing.FAILED)
        }
        out -= {table.candidate(num_tokens, captured=captured) for captured in (False, True)}
        return [*(name for name in evidence.candidates if name not in out), TABLE]

    def choice(self, num_tokens: int, *, captured: bool) -> str:
        return self.table_at(num_tokens).candidate(num_tokens, captured=captured)

    def use(self, variant: str) -> None:
        """From now on calls of the seam are sorted so."""
        if variant not in self._tables:
            self._tables[variant] = {key: only(t, variant) for key, t in self.tables.items()}
        self.hook.set_tables(self._tables[variant])


def only(table: PolicyTable, candidate: str) -> PolicyTable:
    """The table that names one candidate at every count; the baseline where it is not offered."""
    found = table.evidence
    name = candidate if candidate in found.candidates else found.candidates[0]
    coverage = replace(found.coverage, captured=(), busy_from=1)
    everywhere = (Bucket(1, name, "asked for", ()),)
    return PolicyTable(replace(found, coverage=coverage, graph=(), busy=everywhere, idle=()))
