"""The stand-in imitates the AITER of September 2026 where this package meets it."""

import pytest
import torch

from tests.aiter_standin.load import load_aiter

EXPERTS, TOPK, DIM, BLOCK = 16, 4, 64, 32


@pytest.fixture
def aiter(monkeypatch):
    monkeypatch.delenv("AITER_STANDIN_SLOW", raising=False)
    module = load_aiter("september")
    import aiter.failures

    aiter.failures.reset()
    return module


def batch(num_tokens, num_experts=EXPERTS):
    ids = torch.rand((num_tokens, num_experts)).argsort(1)[:, :TOPK].int().contiguous()
    return ids, torch.rand((num_tokens, TOPK)), num_experts, DIM, torch.bfloat16, BLOCK


def last():
    import aiter.sort

    return aiter.sort.calls[-1]


@pytest.mark.parametrize("num_tokens", [1, 7, 100])
def test_sorted_buffers_are_whole_blocks(aiter, num_tokens):
    ids, weights, experts, *_ = outputs = aiter.moe_sorting(*batch(num_tokens))
    entries = num_tokens * TOPK + EXPERTS * BLOCK - TOPK
    assert entries <= len(ids) == len(weights) == len(experts) * BLOCK < entries + BLOCK
    before = load_aiter("main").moe_sorting(*batch(num_tokens))
    assert len(before[0]) == entries
    assert len(outputs) == len(before) == 5


def test_the_callers_buffer_is_zeroed_and_returned(aiter):
    output = torch.full((8, DIM), 7.0, dtype=torch.bfloat16)
    assert aiter.moe_sorting(*batch(8), output=output)[4] is output
    assert not output.any()
    output.fill_(7.0)
    reduced = aiter.moe_sorting(*batch(8), output=output, accumulate=False)[4]
    assert reduced.numel() == 0
    assert output.eq(7).all()
    with pytest.raises(AssertionError):
        aiter.moe_sorting(*batch(8), output=output, flat=True)


def test_a_layers_result_is_in_the_callers_buffer(aiter):
    ids, weights, *_ = batch(8)
    hidden = torch.zeros((8, DIM), dtype=torch.bfloat16)
    w1, w2 = torch.zeros((EXPERTS, 32, DIM)), torch.zeros((EXPERTS, DIM, 16))
    output = torch.empty_like(hidden)
    assert aiter.fused_moe(hidden, w1, w2, weights, ids, output=output) is output
    assert torch.equal(output, aiter.fused_moe(hidden, w1, w2, weights, ids))
    assert output.any()


def test_rows_of_padding_are_skipped(aiter):
    ids, weights, *rest = batch(6)
    ids[4:] = -1
    sorted_ids, _, _, num_valid, _ = aiter.moe_sorting(ids, weights, *rest)
    tokens = sorted_ids[: num_valid[0]] & 0xFFFFFF
    assert sorted(tokens[tokens < 6].tolist()) == sorted([0, 1, 2, 3] * TOPK)


def test_which_backend_runs(aiter, monkeypatch):
    def backend(**passed):
        aiter.moe_sorting(*batch(8), **passed)
        return last().backend

    assert backend() == "opus"
    monkeypatch.setattr(aiter, "_USE_FLYDSL_MOE_SORTING", True)
    assert backend() == "flydsl"
    assert backend(dispatch_policy=2) == "opus"  # FlyDSL has no policies
    assert backend(return_local_topk_ids=True) == "opus"
    assert backend(output_aux=aiter.AUX_SORT_NONE) == "flydsl"
    assert backend(output_aux=aiter.AUX_SORT_OPUS) == "opus"
    monkeypatch.setattr(aiter, "_USE_CK_MOE_SORTING", True)
    assert backend() == "ck"
    assert backend(return_local_topk_ids=True) == "opus"
    arguments = (*batch(8), None, None)
    aiter._moe_sorting_impl(*arguments, 2, True)
    assert (last().backend, last().policy) == ("opus", 2)
    aiter._flydsl_moe_sorting(*arguments)
    assert last().backend == "flydsl"


@pytest.mark.parametrize(
    ("kind", "error"), [("oom", torch.OutOfMemoryError), ("raise", RuntimeError)]
)
def test_chosen_sorts_fail_as_often_as_asked(aiter, monkeypatch, kind, error):
    monkeypatch.setenv("AITER_STANDIN_FAIL", f"policy=1,kind={kind},times=2,after=1")
    outcomes = []
    for policy in (1, 0, 1, 2, 1, 1):
        try:
            aiter.moe_sorting(*batch(8), dispatch_policy=policy)
            outcomes.append(None)
        except RuntimeError as raised:
            outcomes.append(type(raised))
    assert outcomes == [None, None, error, None, error, None]


def test_a_wrong_sort_is_wrong_and_the_next_is_not(aiter, monkeypatch):
    arguments = batch(8)
    right = aiter.moe_sorting(*arguments)
    valid = int(right[3][0])
    monkeypatch.setenv("AITER_STANDIN_FAIL", "kind=wrong,times=1")
    assert not torch.equal(aiter.moe_sorting(*arguments)[0][:valid], right[0][:valid])
    assert torch.equal(aiter.moe_sorting(*arguments)[0][:valid], right[0][:valid])


def test_a_misspelt_failure_is_said(aiter, monkeypatch):
    monkeypatch.setenv("AITER_STANDIN_FAIL", "policy=1,kind=slow")
    with pytest.raises(ValueError, match="kind=slow"):
        aiter.moe_sorting(*batch(8))


@pytest.mark.parametrize(
    ("version", "num_tokens", "experts", "policy", "hazard"),
    [
        ("september", 8, 819, 1, "hangs"),
        ("september", 8, 818, 1, None),
        ("september", 4096, 16, 2, None),
        ("main", 4096, 16, 2, "mesh"),
        ("main", 2047, 16, 2, None),
        ("main", 904, 8, 1, None),
        ("main", 905, 8, 1, "in turns"),
        ("main", 905, 8, 0, None),
    ],
)
def test_what_the_real_kernels_would_not_survive_is_noted(
    version, num_tokens, experts, policy, hazard
):
    module = load_aiter(version)
    import aiter.sort

    ids, *rest = batch(num_tokens, experts)
    ids[-1] = -1
    module.moe_sorting(ids, *rest, dispatch_policy=policy)
    noted = [text for _, text in aiter.sort.hazardous]
    assert len(noted) == (hazard is not None)
    assert all(hazard in text for text in noted)
