"""Every kind of defect is seen by the contract's checker and by the comparison with a baseline;
poisoned memory is cleaned up after."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from adaptive_moe.kernels import cpu_sort
from adaptive_moe.kernels.contract import (
    SortingInputs,
    compare,
    differences,
    expected,
    poisoned_memory,
)
from calibration.sort_contract import check_contract

Outputs = list[torch.Tensor]
ROWS, TOPK, EXPERTS, BLOCK, DIM = 6, 2, 4, 4, 8
PADDING = TOPK << 24

# Six tokens of two experts each; expert 3 has a single entry, every group has padding.
IDS = [[0, 1], [0, 2], [1, 2], [0, 1], [2, 1], [3, 0]]


def differences_of(right, outputs, inputs):
    (found,) = differences([compare(right, outputs, inputs)])
    return found


def plain() -> SortingInputs:
    return SortingInputs(
        torch.tensor(IDS, dtype=torch.int32),
        torch.arange(1, 1 + ROWS * TOPK, dtype=torch.float32).view(ROWS, TOPK),
        EXPERTS,
        DIM,
        torch.bfloat16,
        BLOCK,
    )


def masked() -> SortingInputs:
    """Experts 0 and 2 are on another rank: here, 1 is expert 0 and 3 is expert 1."""
    return replace(plain(), expert_mask=torch.tensor([0, 1, 0, 1], dtype=torch.int32))


def padded() -> SortingInputs:
    return replace(plain(), num_local_tokens=torch.tensor([4], dtype=torch.int32))


INPUTS = {"plain": plain, "masked": masked, "padded": padded}


def right(inputs: SortingInputs) -> Outputs:
    return list(cpu_sort.moe_sorting(*inputs.arguments(1)))


def problems_of(inputs: SortingInputs, outputs: Outputs) -> tuple[list[str], list[str]]:
    """By the checker, and by the comparison with right outputs."""
    return (
        check_contract(inputs, tuple(outputs)),
        differences_of(expected(right(inputs)), outputs, inputs),
    )


NONE: tuple[list[str], list[str]] = ([], [])


@pytest.fixture(params=INPUTS)
def inputs(request: pytest.FixtureRequest) -> Iterator[SortingInputs]:
    return INPUTS[request.param]()


def test_right_outputs_have_no_problem(inputs: SortingInputs) -> None:
    assert problems_of(inputs, right(inputs)) == NONE


def test_what_is_undefined_does_not_matter(inputs: SortingInputs) -> None:
    outputs = right(inputs)
    total, real = outputs[3].tolist()
    outputs[1][:total][outputs[0][:total] >> 24 == TOPK] = float("nan")
    outputs[0][total:] = 12345
    outputs[1][total:] = float("nan")
    outputs[2][total // BLOCK :] = 99
    outputs[4][real:] = float("nan")
    assert problems_of(inputs, outputs) == NONE


def test_padding_may_name_any_token_that_is_not_real(inputs: SortingInputs) -> None:
    outputs = right(inputs)
    outputs[0][outputs[0] >> 24 == TOPK] = PADDING | ROWS
    assert problems_of(inputs, outputs) == NONE


def test_buffers_may_be_longer(inputs: SortingInputs) -> None:
    outputs = right(inputs)
    for place in range(3):
        outputs[place] = torch.cat([outputs[place], outputs[place][:BLOCK]])
    assert problems_of(inputs, outputs) == NONE


def is_entry(outputs: Outputs) -> torch.Tensor:
    """Places of entries that are not padding, of the defined ones."""
    return torch.nonzero(outputs[0][: int(outputs[3][0])] >> 24 < TOPK).view(-1)


def swap(outputs: Outputs, one: int, other: int) -> None:
    """Two of the real entries, weights and all."""
    first, second = is_entry(outputs)[[one, other]].tolist()
    for tensor in outputs[:2]:
        tensor[[first, second]] = tensor[[second, first]]


def wrong_expert(outputs: Outputs) -> None:
    swap(outputs, 0, -1)


def duplicate(outputs: Outputs) -> None:
    for tensor in outputs[:2]:
        tensor[is_entry(outputs)[1]] = tensor[is_entry(outputs)[0]]


def missing(outputs: Outputs) -> None:
    outputs[0][is_entry(outputs)[-1]] = PADDING | ROWS


def wrong_order(outputs: Outputs) -> None:
    swap(outputs, 0, 1)


def token_beyond_the_batch(outputs: Outputs) -> None:
    outputs[0][is_entry(outputs)[0]] = ROWS


def slot_beyond_topk(outputs: Outputs) -> None:
    outputs[0][is_entry(outputs)[0]] = (TOPK + 1) << 24


def negative_entry(outputs: Outputs) -> None:
    outputs[0][is_entry(outputs)[0]] = -1


def padding_place(outputs: Outputs) -> int:
    return int(torch.nonzero(outputs[0][: int(outputs[3][0])] >> 24 == TOPK)[-1])


def entry_for_padding(outputs: Outputs) -> None:
    outputs[0][padding_place(outputs)] = 0


def padding_with_a_real_token(outputs: Outputs) -> None:
    outputs[0][padding_place(outputs)] = PADDING | 0


def padding_with_another_slot(outputs: Outputs) -> None:
    outputs[0][padding_place(outputs)] = (TOPK + 1) << 24 | ROWS


def wrong_weight(outputs: Outputs) -> None:
    outputs[1][is_entry(outputs)[0]] += 1


def unwritten_weight(outputs: Outputs) -> None:
    outputs[1][is_entry(outputs)[0]] = float("nan")


def wrong_block_expert(outputs: Outputs) -> None:
    outputs[2][0] += 1


def unzeroed(outputs: Outputs) -> None:
    outputs[4][int(outputs[3][1]) - 1, -1] = 1e-3


def unwritten_buffer(outputs: Outputs) -> None:
    outputs[4][0, 0] = float("nan")


def too_many_valid(outputs: Outputs) -> None:
    outputs[3][0] += BLOCK


def too_few_valid(outputs: Outputs) -> None:
    outputs[3][0] -= BLOCK


def wrong_tokens(outputs: Outputs) -> None:
    outputs[3][1] += 1


DEFECTS: dict[Callable[[Outputs], None], str] = {
    wrong_expert: "not routed to",
    duplicate: "twice",
    missing: "no token of the batch",
    wrong_order: "token-ascending",
    token_beyond_the_batch: "no token of the batch",
    slot_beyond_topk: "no token of the batch",
    negative_entry: "no token of the batch",
    entry_for_padding: "padding",
    padding_with_a_real_token: "padding",
    padding_with_another_slot: "padding",
    wrong_weight: "weight",
    unwritten_weight: "weight",
    wrong_block_expert: "sorted_expert_ids",
    unzeroed: "moe_buf is not zeroed",
    unwritten_buffer: "moe_buf is not zeroed",
    too_many_valid: "num_valid_ids",
    too_few_valid: "num_valid_ids",
    wrong_tokens: "num_valid_ids",
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_planted_defect_is_named(
    inputs: SortingInputs, defect: Callable[[Outputs], None]
) -> None:
    outputs = right(inputs)
    defect(outputs)
    problems, found = problems_of(inputs, outputs)
    assert any(DEFECTS[defect] in problem for problem in problems), problems
    part = next(
        (name for name in ("moe_buf", "num_valid_ids", "weight") if name in DEFECTS[defect]),
        "sorted",
    )
    assert any(part in difference for difference in found), found


@pytest.mark.parametrize("place", range(5))
def test_an_output_that_is_not_contiguous_is_another(inputs: SortingInputs, place: int) -> None:
    outputs = right(inputs)
    outputs[place] = torch.stack([outputs[place]] * 2, -1)[..., 0]
    found = differences_of(expected(right(inputs)), outputs, inputs)
    assert found == [f"output {place + 1} is not contiguous"]


@pytest.mark.parametrize(("row", "seen"), [(0, True), (3, True), (4, False), (5, False)])
def test_local_ids_are_compared_in_real_rows(row: int, seen: bool) -> None:
    inputs = padded()
    ids = torch.tensor(IDS, dtype=torch.int32)
    baseline = expected([*right(inputs), ids])
    assert differences_of(baseline, [*right(inputs), ids.clone()], inputs) == []
    changed = ids.clone()
    changed[row, 1] += 1
    found = differences_of(baseline, [*right(inputs), changed], inputs)
    assert found == (["output 6 has other content"] if seen else [])
    assert differences_of(baseline, right(inputs), inputs) == [
        "returned list of 5, where the baseline returns 6 outputs"
    ]
    (shape,) = differences_of(baseline, [*right(inputs), ids[:4]], inputs)
    assert "output 6 is torch.int32 [4, 2]" in shape


def test_the_comparison_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = padded()
    baseline, outputs = expected([*right(inputs), inputs.topk_ids]), right(inputs)
    waits = []
    for name in ("item", "tolist", "__bool__", "__int__", "cpu", "nonzero"):
        kept = getattr(torch.Tensor, name)

        def waiting(tensor: torch.Tensor, *args: object, kept=kept, name=name) -> object:
            waits.append(name)
            return kept(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, waiting)
    assert differences_of(baseline, [*outputs, inputs.topk_ids], inputs) == []
    assert waits == ["tolist"]


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("how", ["too short", "wrong dtype", "unwritten"])
def test_an_output_of_the_wrong_size_or_type_or_left_unwritten_is_named(
    inputs: SortingInputs, place: int, how: str
) -> None:
    outputs = right(inputs)
    tensor = outputs[place]
    with poisoned_memory():
        outputs[place] = {
            "too short": tensor[:-BLOCK],
            "wrong dtype": tensor.to(torch.float64),
            "unwritten": torch.empty_like(tensor),
        }[how]
    names = ("sorted_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids", "moe_buf")
    problems = check_contract(inputs, tuple(outputs))
    # An unwritten sorted_ids is first seen as padding, or entries, that are none.
    wanted = names[place] if (place, how) != (0, "unwritten") else "padding"
    assert any(wanted in problem for problem in problems), problems


def test_an_expert_another_rank_has_must_not_be_sorted() -> None:
    unmasked = right(plain())
    problems = check_contract(masked(), tuple(unmasked))
    assert any("num_valid_ids" in problem for problem in problems)


def test_experts_are_named_by_their_local_index_under_a_mask() -> None:
    outputs = right(masked())
    blocks = int(outputs[3][0]) // BLOCK
    assert outputs[2][:blocks].tolist() == [0, 1]
    outputs[2][:blocks] = torch.tensor([1, 3], dtype=torch.int32)
    assert any("sorted_expert_ids" in p for p in check_contract(masked(), tuple(outputs)))


def test_rows_that_are_not_real_must_not_be_sorted() -> None:
    problems = check_contract(padded(), tuple(right(plain())))
    assert any("num_valid_ids" in problem for problem in problems)


def test_a_placeholder_is_right_only_where_the_caller_reduces_itself_and_has_all_experts() -> None:
    placeholder = [*right(plain())[:4], torch.empty(0, 0, dtype=torch.bfloat16)]
    assert check_contract(plain(), tuple(placeholder), accumulate=False) == []
    assert check_contract(plain(), tuple(placeholder)) != []
    assert check_contract(plain(), tuple(right(plain())), accumulate=False) != []
    under_mask = [*right(masked())[:4], placeholder[4]]
    assert check_contract(masked(), tuple(under_mask), accumulate=False) != []


@pytest.mark.parametrize("outputs", [(), (torch.empty(0),), None, torch.empty(0), "text"])
def test_what_is_not_five_outputs_is_said_so(outputs: object) -> None:
    (problem,) = check_contract(plain(), outputs)  # type: ignore[arg-type]
    assert "not the five outputs" in problem


# poisoned_memory


def torch_settings() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.fixture
def restored() -> Iterator[None]:
    enabled, warn_only, fill = torch_settings()
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("warn_only", [True, False])
@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.usefixtures("restored")
def test_poisoned_memory_leaves_torch_as_it_was_also_after_an_error(
    enabled: bool, warn_only: bool, fill: bool
) -> None:
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    before = torch_settings()
    with poisoned_memory():
        assert torch.empty(64).isnan().all()
        assert (torch.empty(64, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert torch_settings() == before
    with pytest.raises(RuntimeError, match="kernel failed"), poisoned_memory():
        raise RuntimeError("kernel failed")
    assert torch_settings() == before
