"""How far a calibration is: one line on a terminal that fits it, a few plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any

# Where no terminal shows a line move, one is printed this often.
PLAIN_EVERY_S = 10.0


class ProgressBar:
    """Shows what is measured, how long that has taken, and the budget, on standard error.

    Called with (the number of the step, of how many known by now, what it measures). The budget is
    what runs out, so it is what the bar is of. Nothing is shown where `quiet`.
    """

    def __init__(self, budget_s: float, *, quiet: bool = False) -> None:
        self.budget_s = budget_s
        self.quiet = quiet
        self.begun = self.said = -PLAIN_EVERY_S
        self.done = sys.maxsize
        self.bar: Any = None

    def __enter__(self) -> "ProgressBar":
        if not self.quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.budget_s,
                bar_format="{n:.1f} of {total:.1f} s |{bar}| {desc}",
                dynamic_ncols=True,
                leave=False,
                file=sys.stderr,
            )
        return self

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if done < self.done:  # the next table begins, with a budget of its own
            self.begun = now
        self.done = done
        elapsed = now - self.begun
        if self.bar is not None:
            self.bar.n = min(elapsed, self.budget_s)
            self.bar.set_description_str(f"step {done}, {what}")
        elif not self.quiet and now - self.said >= PLAIN_EVERY_S:
            self.said = now
            line = f"{elapsed:.1f} of {self.budget_s:.1f} s: step {done}, {what}"
            print(line, file=sys.stderr, flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
