"""Who is right: against the baseline, at every count and filling, and what is said of it."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from adaptive_moe.kernels import SortKernel, cpu_sort, policy_candidates
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Samples, Standing
from adaptive_moe.policy.situation import Situation
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.errors import CalibrationFailedError
from adaptive_moe.tuning.inputs import Inputs
from adaptive_moe.tuning.rightness import Exclusion, Rightness

CPU = torch.device("cpu")
SHAPE = SortingShape(8, 2, 4, block_size=4)
Outputs = list[torch.Tensor]


class Checked:
    """Sorts right, but for what `spoil(policy, rows, outputs)` does. Each sort takes a second.
    checked: the policy, rows and real rows of each. warned: the log."""

    def __init__(
        self,
        caplog: pytest.LogCaptureFixture,
        spoil: Callable[[int, int, Outputs], None] = lambda policy, rows, outputs: None,
        shape: SortingShape = SHAPE,
        captured: tuple[int, ...] = (),
    ) -> None:
        self.spoil, self.caplog, self.seconds = spoil, caplog, 100.0
        self.checked: list[tuple[int, int, int]] = []
        self.accumulate = shape.accumulate
        coverage = Coverage.up_to(shape, 16, captured, padding_rows=True)
        kernel = SortKernel("made up", CPU, policy_candidates(self.sort))
        self.rightness = Rightness(
            kernel, coverage, Inputs(coverage, None, CPU), lambda: self.seconds
        )

    def sort(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        ids, policy = arguments[0], arguments[8]
        real = int((ids >= 0).all(dim=1).sum())
        self.checked.append((policy, len(ids), real))
        self.seconds += 1.0
        outputs = list(cpu_sort.moe_sorting(*arguments, accumulate=self.accumulate))
        self.spoil(policy, len(ids), outputs)
        return tuple(outputs)

    def check(self, *counts: int, situation: Situation = Situation.BUSY) -> dict[str, Exclusion]:
        with self.caplog.at_level(logging.WARNING, "adaptive_moe"):
            for num_tokens in counts:
                self.rightness.check(situation, num_tokens)
        return self.rightness.excluded

    @property
    def warned(self) -> list[str]:
        return [record.getMessage() for record in self.caplog.records]


def test_each_count_is_checked_once_for_each_filling_and_on_nobody_s_budget(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = Checked(caplog, captured=(4, 8))
    assert one.check(8, 4, 8) == {}
    one.check(8, situation=Situation.IDLE)
    assert one.checked == [(p, n, n) for n in (8, 4) for p in (0, 1, 2)]
    assert one.rightness.seconds == 6.0
    # A captured size of 8 serves 5 to 8 tokens, 6.5 on average; 6 of its rows are real.
    one.check(8, 8, situation=Situation.GRAPH)
    assert one.checked[6:] == [(p, 8, 6) for p in (0, 1, 2)]
    assert one.rightness.seconds == 9.0
    assert one.warned == []


def test_who_is_wrong_is_out_with_all_that_is_wrong_and_checked_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def spoil(policy: int, rows: int, outputs: Outputs) -> None:
        if policy == 1 and rows == 8:
            outputs[0][0] += 1
            outputs[1][0] += 1.0
        if policy == 2 and rows == 2:
            raise MemoryError("no room")

    one = Checked(caplog, spoil)
    wrong = "sorted_ids has other entries; sorted_weights has other entries"
    assert one.check(4, 8, 2, 16) == {
        "policy 1": Exclusion(Standing.WRONG, wrong),
        "policy 2": Exclusion(Standing.FAILED, "raised MemoryError: no room"),
    }
    assert [(policy, rows) for policy, rows, _ in one.checked] == [
        *((policy, rows) for rows in (4, 8) for policy in (0, 1, 2)),
        *((0, 2), (2, 2), (0, 16)),
    ]
    assert one.warned == [
        f"policy 1 is out for {SHAPE.describe()}: at 8 tokens it {wrong}",
        f"policy 2 is out for {SHAPE.describe()}: at 2 tokens it raised MemoryError: no room",
    ]
    # Also in what was measured before, whatever that says.
    before = [Samples(f"policy {p}", (9.0, 9.0)) for p in (0, 1, 2)]
    assert one.rightness.without_excluded(before) == [
        before[0],
        Samples("policy 1", (9.0, 9.0), Standing.WRONG, wrong),
        Samples("policy 2", (9.0, 9.0), Standing.FAILED, "raised MemoryError: no room"),
    ]


def test_one_that_raises_keeps_nobody_from_being_checked(caplog: pytest.LogCaptureFixture) -> None:
    def spoil(policy: int, rows: int, outputs: Outputs) -> None:
        if policy == 1:
            raise RuntimeError("no kernel")
        outputs[0][0] += policy

    found = Checked(caplog, spoil).check(4)
    assert {name: why.standing for name, why in found.items()} == {
        "policy 1": Standing.FAILED,
        "policy 2": Standing.WRONG,
    }


def test_the_first_reason_stays_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    one = Checked(caplog)
    first, later = (Exclusion(Standing.FAILED, why) for why in ("raised A", "raised B"))
    with caplog.at_level(logging.WARNING, "adaptive_moe"):
        one.rightness.exclude("policy 1", first, 8)
        one.rightness.exclude("policy 1", later, 4)
    assert one.rightness.excluded == {"policy 1": first}
    assert one.warned == [f"policy 1 is out for {SHAPE.describe()}: at 8 tokens it raised A"]
    with pytest.raises(CalibrationFailedError) as raised:
        one.rightness.exclude("policy 0", later, 2)
    assert str(raised.value) == "at 2 tokens policy 0 raised B"


def test_without_the_baseline_nothing_can_be_said(caplog: pytest.LogCaptureFixture) -> None:
    def spoil(policy: int, rows: int, outputs: Outputs) -> None:
        raise RuntimeError("no kernel")

    with pytest.raises(CalibrationFailedError) as raised:
        Checked(caplog, spoil).check(4)
    assert str(raised.value) == "at 4 tokens policy 0 raised RuntimeError: no kernel"


@pytest.mark.parametrize("accumulate", [True, False])
def test_a_baseline_that_breaks_our_reading_still_defines_what_is_right(
    caplog: pytest.LogCaptureFixture, accumulate: bool
) -> None:
    """All policies sort in another order than the contract of our own kernels says."""

    def spoil(policy: int, rows: int, outputs: Outputs) -> None:
        total = int(outputs[3][0])
        outputs[1][:total] = 7.0
        outputs[4] = torch.zeros((1,), dtype=torch.bfloat16)

    shape = SortingShape(8, 2, 4, block_size=4, accumulate=accumulate)
    one = Checked(caplog, spoil, shape)
    assert one.check(4, 8, 16) == {}
    assert one.warned == []
