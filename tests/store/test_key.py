"""What a table is valid for: every field that can change the answer, and no unstable one."""

from dataclasses import replace

import pytest
import torch

from adaptive_moe.kernels import load_kernel
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.evidence import Rule
from adaptive_moe.store.key import differing_fields, key_for
from adaptive_moe.tuning.calibrate import Plan, calibrate
from tests.store.making import COVERAGE, HERE, KEY, REQUEST, SHAPE, key_for_table, made_table


@pytest.mark.parametrize(
    "other",
    [
        {"kernel": "aiter 0.1.23 opus"},
        {"coverage": Coverage.up_to(SHAPE, 64, (1, 8))},
        {"rule": Rule(margin=0.02)},
        *(
            {"environment": replace(HERE, **field)}
            for field in (
                {"arch": "gfx950"},
                {"compute_units": 302},
                {"memory_gib": 256},
                {"runtime": "ROCm 7.1"},
                {"torch": "2.9.0"},
                {"host": "AMD EPYC 9554"},
            )
        ),
    ],
)
def test_what_can_change_the_answer_makes_another_key(other):
    key = key_for_table(made_table(**other))
    assert key != KEY
    assert key.name != KEY.name
    assert len(differing_fields(KEY, key)) >= 1


@pytest.mark.parametrize(
    "request_", [replace(REQUEST, engine="vllm 0.34.0"), replace(REQUEST, first=(1, 64))]
)
def test_the_engine_and_the_first_buckets_make_another_key(request_):
    assert key_for_table(made_table(), request_).name != KEY.name


@pytest.mark.parametrize(
    "other",
    [
        {"environment": replace(HERE, device="AMD Instinct MI300X OAM", python="3.11.8")},
        {"budget_s": 9.0},
        {"starts": 3},
    ],
)
def test_what_is_unstable_or_only_says_how_much_was_settled_does_not(other):
    assert key_for_table(made_table(**other)) == KEY


def test_differences_name_the_fields():
    table = made_table(environment=replace(HERE, torch="2.9.0", compute_units=302))
    assert differing_fields(KEY, key_for_table(table)) == [
        "compute_units: 302, here 304",
        "torch: 2.9.0, here 2.13.0",
    ]


def test_the_key_made_before_measuring_is_the_one_of_what_was_measured():
    kernel, coverage = load_kernel("cpu"), Coverage.up_to(SHAPE, 4)
    plan = Plan(first=(1, 4), budget_s=0.05, rule=Rule(min_rounds=2, max_rounds=4))
    key = key_for(kernel, coverage, plan.rule, engine="plain", first=plan.first)
    table = calibrate(kernel, coverage, plan)
    assert key_for_table(table, replace(REQUEST, engine="plain", first=(1, 4))) == key
    assert key.torch == torch.__version__


def test_a_file_name_says_shape_engine_and_device():
    assert KEY.name.startswith("16x4-64-bfloat16-b32-vllm-0.33.0-gfx942-")
    assert KEY.coverage == COVERAGE
