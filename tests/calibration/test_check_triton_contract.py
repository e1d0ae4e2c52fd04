"""check_triton_contract: a right sort passes, and each way to be wrong is seen and named."""

import itertools
import math
import sys
import time

import pytest
import torch

from adaptive_moe.kernels.contract import SortingInputs, buffer_length
from calibration import check_triton_contract as checks
from calibration.exact_memory import GUARD, POISON, expected, grouped
from calibration.sort_contract import check_contract


def right_sort(ids, weights, experts, dim, dtype, block, mask, rows, policy, *, rounded):
    """By the reference itself, into the memory that torch.empty gives."""
    answer = expected(grouped(ids, weights, experts, mask, rows), block)
    length = buffer_length(*ids.shape, experts, block, rounded=rounded)
    outputs = (
        torch.empty(length, dtype=torch.int32),
        torch.empty(length, dtype=torch.float32),
        torch.empty(-(-length // block), dtype=torch.int32),
        torch.empty(2, dtype=torch.int32),
        torch.empty((len(ids), dim), dtype=dtype),
    )
    for output, words, defined in zip(outputs, answer.words, answer.defined, strict=False):
        mine = output[: len(words)].view(torch.int32)
        mine[defined] = words[defined]
    outputs[4][: len(ids) if rows is None else int(rows)] = 0
    if policy == 2:
        torch.empty(100, dtype=torch.int32).fill_(1)  # a workspace
    return outputs


def change(name, outputs, arguments):
    ids, weights, experts, valid, moe_buf = outputs
    topk = arguments[0].shape[1]
    total = int(valid[0])
    real = (ids[:total] >> 24 < topk).nonzero().flatten()
    beyond = ids.as_strided((len(ids) + GUARD,), (1,))  # the guard, too
    if name == "a padding entry":
        ids[(ids[:total] >> 24 == topk).nonzero()[0]] = POISON
    elif name == "two entries swapped":
        ids[real[0]], ids[real[1]] = ids[real[1]].item(), ids[real[0]].item()
    elif name == "a weight by one bit":
        weights.view(torch.int32)[real[-1]] ^= 1
    elif name == "a block's expert":
        experts[0] += 1
    elif name == "a count":
        valid[1] += 1
    elif name == "moe_buf's last element":
        moe_buf[-1, -1] = 1.0
    elif name == "moe_buf left as it was":
        moe_buf.view(-1)[-1:].view(torch.int16)[:] = POISON & 0x7FFF
    elif name == "behind a buffer's end":
        beyond[len(ids)] = 0
    elif name == "behind moe_buf's end":
        moe_buf.as_strided((moe_buf.numel() + 1,), (1,))[-1] = 0.0
    elif name == "behind the workspace's end":
        buffer = torch.empty(8, dtype=torch.int32)
        buffer.as_strided((9,), (1,))[8] = 0
    elif name == "another place":
        return (ids.clone(), *outputs[1:])
    elif name == "a longer buffer":
        return (torch.cat([ids, ids[:1]]), *outputs[1:])
    return outputs


WRONG = {
    "a padding entry": "sorted_ids",
    "two entries swapped": "sorted_ids",
    "a weight by one bit": "sorted_weights",
    "a block's expert": "sorted_expert_ids",
    "a count": "num_valid_ids",
    "moe_buf's last element": "moe_buf",
    "moe_buf left as it was": "moe_buf",
    "behind a buffer's end": "guard",
    "behind moe_buf's end": "guard",
    "behind the workspace's end": "workspace guard",
    "another place": "length or place",
    "a longer buffer": "length or place",
}


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    """Combinations: an odd number of bytes in moe_buf is among them."""
    monkeypatch.setattr(checks, "ROUTINGS", (("uniform", "none"), ("uniform", "some")))
    monkeypatch.setattr(checks, "BLOCKS", (16,))
    monkeypatch.setattr(checks, "MODEL_DIMS", (7, 7, 7))
    monkeypatch.setattr(checks, "WIDE_DIM", 33)
    monkeypatch.setattr(checks, "A_JOB", 16)


def check(sort, *size):
    return checks.check((*size, math.inf), sort, "cpu")


@pytest.mark.parametrize("size", [(1, 1, 1), (8, 2, 7), (33, 4, 61)])
def test_a_right_sort_is_right(size):
    assert check(right_sort, *size) == {"combinations": 16, "left_out": 0, "failures": []}


@pytest.mark.parametrize("name", WRONG)
def test_one_wrong_sort_is_seen_and_named(name):
    calls = itertools.count()

    def sort(*arguments, rounded):
        outputs = right_sort(*arguments, rounded=rounded)
        # One of the 48, and the same again where it is looked at closer.
        return change(name, outputs, arguments) if next(calls) in (4, 48) else outputs

    failures = check(sort, 33, 4, 61)["failures"]
    assert len(failures) == 1
    assert WRONG[name] in failures[0][-1]
    assert failures[0][-2] == 1  # the policy
    assert failures[0][:3] == [33, 4, 61]


def test_what_is_wrong_once_only_counts():
    calls = itertools.count()

    def sort(*arguments, rounded):
        outputs = right_sort(*arguments, rounded=rounded)
        return change("a count", outputs, arguments) if next(calls) == 4 else outputs

    assert [failure[-1] for failure in check(sort, 33, 4, 61)["failures"]] == [["not again"]]


def test_what_is_undefined_may_be_anything():
    # 708 entries of the shorter buffers, 720 of those rounded up to blocks.
    def sort(*arguments, rounded):
        outputs = right_sort(*arguments, rounded=rounded)
        outputs[0][outputs[3][0] :] = 5
        outputs[2][outputs[3][0] // arguments[5] :] = 5
        outputs[1][outputs[1].view(torch.int32) == POISON] = 5.0
        return outputs

    assert check(sort, 33, 3, 61)["failures"] == []


def test_rows_of_moe_buf_that_are_not_real_may_hold_anything():
    def sort(*arguments, rounded):
        outputs = right_sort(*arguments, rounded=rounded)
        outputs[4][outputs[3][1] :] = 5.0
        return outputs

    assert check(sort, 33, 3, 61)["failures"] == []


def test_inputs_begin_at_every_alignment():
    starts = {
        case[1][0].data_ptr() % 16
        for size in (1, 2, 3, 4)
        for case in checks.cases(33, 4, 61 + size, "cpu")
    }
    assert starts == {0, 4, 8, 12}


def test_the_reference_holds_the_contract():
    for arguments in (case[1] for case in checks.cases(33, 4, 61, "cpu")):
        outputs = right_sort(*arguments, 1, rounded=True)
        assert check_contract(SortingInputs(*arguments), outputs) == []


def test_after_its_deadline_a_job_is_left_out_and_said():
    found = checks.check((33, 4, 61, time.time() - 1), right_sort, "cpu")
    assert found == {"combinations": 0, "left_out": 16, "failures": []}


def test_parts_are_the_whole():
    whole = checks.jobs(1, 1, 0.0)
    split = [checks.jobs(part, 3, 0.0) for part in (1, 2, 3)]
    assert sorted(itertools.chain(*split)) == sorted(whole)
    assert sum(map(len, split)) == len(whole)


def part(failures=(), left_out=0):
    return {
        "combinations": 160 - left_out, "left_out": left_out, "failures": list(failures),
        "replays": 60, "wrong_replays": [],
    }  # fmt: skip


def test_parts_are_merged(tmp_path, monkeypatch, capsys):
    files = []
    for name, found in {"1/3": part(), "3/3": part([[8, 2, "wrong"]], 32)}.items():
        files.append(tmp_path / name.replace("/", "-"))
        files[-1].write_text(checks.record.as_text(checks.summary({name: found})))
    out = tmp_path / "all.json"
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(out), "--merge", *map(str, files)])
    assert checks.main() == 1
    result = checks.json.loads(out.read_text())
    assert (result["combinations"], result["left_out_for_time"]) == (288, 32)
    assert (result["sorts"], result["wrong_sorts"], result["wrong"]) == (864, 1, [[8, 2, "wrong"]])
    assert (result["parts_missing"], result["graph_replays"]) == (["2/3"], 120)
    with pytest.raises(ValueError, match="overlap"):
        checks.summary({"1/2": part(), "1/3": part()})
