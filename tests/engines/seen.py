"""Calls as the hook would have seen them, and a hook that only holds them."""

import contextvars
from types import ModuleType, SimpleNamespace

import torch

from adaptive_moe.kernels.aiter import ConfigCall
from adaptive_moe.kernels.call import CallKey, SortCall

ASKED = ConfigCall((), ())


class OnAGpu(SortCall):
    """As seen on a GPU that this machine does not have."""

    def as_called(self, function, *args, **kwargs):
        return function(*args, **kwargs)


def seen_call(num_tokens=8, config=ASKED, **parts):
    """One of 16 experts, topk 4. parts: of the key, of the call, or `expert_mask`."""
    only_of_call = set(SortCall.__dataclass_fields__) - set(CallKey._fields)
    of_call = {n: parts.pop(n) for n in list(parts) if n in only_of_call}
    mask = parts.pop("expert_mask", None)
    key = CallKey(
        **{
            "num_experts": 16,
            "topk": 4,
            "model_dim": 64,
            "dtype": torch.bfloat16,
            "block_size": 32,
            "has_expert_mask": mask is not None,
            "has_num_local_tokens": False,
            "accumulate": True,
            "local_ids": False,
            "more": (),
            "baseline": 0,
            "device": -1,
            **parts,
        }
    )
    on_gpu = key.device >= 0
    facts = {
        "key": key,
        "num_tokens": num_tokens,
        "device": torch.device("cuda", key.device) if on_gpu else torch.device("cpu"),
        "baseline": key.baseline,
        "mask": None if mask is None else lambda: mask,
        "module": ModuleType("aiter.fused_moe"),
        "seam": lambda *arguments: (),
        "extras": {},
        "config": config,
        "context": contextvars.copy_context(),
        "grad": False,
        "inference": False,
        "stream": None,
    }
    return (OnAGpu if on_gpu else SortCall)(**{**facts, **of_call})


def hook_with(*seen, module=None, tables=None):
    """What wanted.py reads of a hook. module: AITER's, whose chooser is asked."""
    wrapped = None
    if module is not None:
        wrapped = SimpleNamespace(module=module, chooser=module.get_2stage_cfgs)
    hook = SimpleNamespace(seen={s.key: s for s in seen}, tables=tables or {}, wrapped=wrapped)
    hook.wanted_by = lambda owner: list(hook.seen.values())
    hook.end_warm_up = lambda tables, owner: None
    return hook


def aiter_module(block_at, pad=None, log=None, **found):
    """A module whose chooser picks block_at(padded count); found: what else it answers."""

    def get_2stage_cfgs(padded, *rest, **keywords):
        if log is not None:
            log.append(padded)
        answer = {"block_m": block_at(padded), "stage2": None, "flat": False, "output_aux": False}
        return SimpleNamespace(**{**answer, **found})

    pad = pad or (lambda count: max(16, 1 << (count - 1).bit_length()))
    return SimpleNamespace(get_2stage_cfgs=get_2stage_cfgs, get_padded_M=pad)
