"""What the tests of the hook share: calls of the stand-in, and what arrives at its sort."""

import inspect
from types import ModuleType

import torch

from adaptive_moe.hook.hook import AiterHook
from adaptive_moe.kernels.call import CallKey
from adaptive_moe.settings import Mode, Settings

AUTO = Settings(mode=Mode.AUTO)
# Token count -> policy: different neighbours, so that an index that is off by one shows.
POLICIES = {1: 1, 2: 2, 3: 0, 4: 1, 64: 2, 128: 1}
# Of `batch` with no arguments, called as AITER of August 2026 does.
KEY = CallKey(16, 4, 64, torch.bfloat16, 32, False, False, True, False, (), 0, -1)
TWO = ("policy 2", "policy 0", "policy 1")


def batch(num_tokens, *, experts=16, topk=4, dim=64, seed=0):
    """What fused_moe is called with: hidden_states, w1, w2, topk_weight, topk_ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand((num_tokens, experts), generator=generator).argsort(1)[:, :topk]
    return (
        torch.zeros((num_tokens, dim), dtype=torch.bfloat16),
        torch.zeros((experts, 32, dim), dtype=torch.bfloat16),
        torch.zeros((experts, dim, 16), dtype=torch.bfloat16),
        torch.rand((num_tokens, topk), generator=generator),
        ids.int().contiguous(),
    )


def sort_arguments(num_tokens, **shape):
    """The leading arguments of moe_sorting, as fused_moe passes them."""
    hidden, _, w2, weights, ids = batch(num_tokens, **shape)
    return [ids, weights, w2.shape[0], hidden.shape[1], hidden.dtype, 32, None, None, 0]


def arrived(number=1):
    """The latest calls that arrived at the sort itself."""
    import aiter.sort

    return list(aiter.sort.calls)[-number:]


def policy_that_arrived():
    return arrived()[0].policy


def number_of_sorts():
    import aiter.sort

    return len(aiter.sort.calls)


def installed(module, settings=AUTO, tables=None, **options):
    hook = AiterHook(settings, **options)
    assert hook.install(module)
    hook.set_tables(tables or {})
    return hook


def nine(
    topk_ids,
    topk_weights,
    num_experts,
    model_dim,
    moebuf_dtype,
    block_size=32,
    expert_mask=None,
    num_local_tokens=None,
    dispatch_policy=0,
):
    """The parameters that every AITER's seam begins with."""


def seam_of(answer, **later):
    """A module whose seam has the nine parameters and these later ones, with their defaults; it
    returns answer(all its arguments by name, in order)."""
    parameters = list(inspect.signature(nine).parameters.values())
    for name, default in later.items():
        parameters.append(inspect.Parameter(name, parameters[0].kind, default=default))
    signature = inspect.Signature(parameters)

    def moe_sorting(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return answer(bound.arguments)

    moe_sorting.__signature__ = signature
    module = ModuleType("aiter.fused_moe")
    module.moe_sorting = moe_sorting
    return module


def policy_of(given):
    """An answer of seam_of: the policy that arrives."""
    return given["dispatch_policy"]
