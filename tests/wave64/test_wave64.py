"""The gfx942 and gfx950 code that Triton compiles is executed instruction by instruction on 64-lane
waves, and meets the contract. `python -m calibration.wave64` does so for thousands of sorts."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from tests.wave64 import cdna
from tests.wave64.cases import Case, problems_of

CASES = {
    "few entries, one wave": Case(8, 2, 1, 1, padded="none"),
    "few entries": Case(72, 6, 4, 1),
    "one tile": Case(72, 6, 20, 1, routing="skewed"),
    "a larger tile": Case(160, 8, 29, 1),
    "several tiles": Case(72, 6, 120, 1, padded="none"),
    "two launches": Case(33, 4, 70, 2, routing="skewed", model_dim=200),
    "three launches": Case(72, 6, 60, 2, many_counts=1),
    "three launches, larger chunks": Case(72, 6, 100, 2, many_counts=1, most_entries=0),
}


@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
@pytest.mark.parametrize("options", [False, True], ids=["", "with mask and local rows"])
@pytest.mark.parametrize("name", CASES)
def test_sort_is_right_on_waves_of_64(name: str, options: bool, target: str) -> None:
    case = replace(CASES[name], seed=len(name) + options)
    if options:
        case = replace(case, masked=True, rows=case.tokens * 3 // 4, rounded=False)
    assert problems_of(case, target) == []


@pytest.mark.parametrize("text", ["v_frob_b32 v0, v1", "s_frob_b64 s[0:1], s2", "ds_frob_b32 v0"])
def test_an_unknown_instruction_is_named(text: str) -> None:
    with pytest.raises(cdna.Fault, match=f"unknown instruction: {text[:10]}"):
        cdna.decode(text)
