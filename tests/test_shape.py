"""What one MoE layer asks of the sort: which shapes there are, and a shape in words."""

from dataclasses import replace

import pytest

from adaptive_moe.shape import SortingShape

SHAPE = SortingShape(256, 8, 7168)
LARGEST = SortingShape(1024, 32, 1048576, "float32", 1024, local_experts=1024)
SMALLEST = SortingShape(1, 1, 1, "float16", 1, local_experts=1)


@pytest.mark.parametrize("at_the_edge", [LARGEST, SMALLEST])
def test_shapes_go_up_to_what_is_said(at_the_edge):
    assert at_the_edge.has_expert_mask
    assert not replace(at_the_edge, local_experts=None).has_expert_mask


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_experts": 0}, "num_experts=0 is not accepted: give an integer from 1 to 1024"),
        ({"num_experts": 1025}, "num_experts=1025 is not accepted: give an integer from 1 to 1024"),
        ({"topk": 0}, "topk=0 is not accepted: give an integer from 1 to 32"),
        ({"topk": True}, "topk=True is not accepted: give an integer from 1 to 32"),
        ({"topk": 33}, "topk=33 is not accepted: give an integer from 1 to 32"),
        ({"model_dim": 0}, "model_dim=0 is not accepted: give an integer from 1 to 1048576"),
        (
            {"model_dim": 1048577},
            "model_dim=1048577 is not accepted: give an integer from 1 to 1048576",
        ),
        (
            {"model_dim": 7168.0},
            "model_dim=7168.0 is not accepted: give an integer from 1 to 1048576",
        ),
        ({"block_size": 0}, "block_size=0 is not accepted: give an integer from 1 to 1024"),
        ({"block_size": 1025}, "block_size=1025 is not accepted: give an integer from 1 to 1024"),
        (
            {"dtype": "int8"},
            "dtype='int8' is not accepted: give bfloat16, float16, float32",
        ),
        ({"local_experts": 0}, "local_experts=0 is not accepted: give an integer from 1 to 256"),
        (
            {"local_experts": 257},
            "local_experts=257 is not accepted: give an integer from 1 to 256",
        ),
        (
            {"num_experts": 4},
            "topk=8 is more than num_experts=4: a token goes to topk different experts, so give "
            "topk <= num_experts",
        ),
    ],
)
def test_what_is_no_shape_is_refused_by_field_value_and_what_is_accepted(changed, says):
    with pytest.raises(ValueError, match=r"^") as refused:
        replace(SHAPE, **changed)
    assert str(refused.value) == says


def test_a_shape_in_words_names_what_is_unusual():
    plain = "256 experts, topk 8, dim 7168, bfloat16, block 32"
    unusual = replace(SHAPE, local_experts=32, num_local_tokens=True, accumulate=False)
    assert SHAPE.describe() == plain
    assert unusual.describe() == f"{plain}, 32 local experts, padded rows, no moe_buf"
