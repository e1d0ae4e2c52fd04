"""SGLang's own code around its first graph capture, on the CPU: plugins, runner, graph backends.

As a script, `sglang_worker.py a b`, it starts two tensor-parallel ranks that keep their tables in
the folders a and b, twice, and prints what came of each rank, after RESULT and as JSON.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from absent import make_importable, without_image_processors
from processes import STANDIN, free_port, in_child

LARGEST_CAPTURE = 64
PREFILL = 2048


@contextlib.contextmanager
def sglang_with_plugin():
    """SGLang's modules under test, with the plugin executed by SGLang's own loader."""
    sys.path.insert(0, str(STANDIN))
    # For a busy machine: a gain is either large, or surely not worth it.
    os.environ["ADAPTIVE_MOE_BUDGET_S"] = "30"
    os.environ["ADAPTIVE_MOE_MARGIN"] = "0.3"
    os.environ["AITER_STANDIN_SLOW"] = "0,2"  # all that an SGLang may pass by itself
    make_importable("torchvision")
    import sglang  # noqa: F401 - it imports transformers anew

    without_image_processors()
    torch.set_num_threads(1)
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.layers.moe.moe_runner import aiter as runner
    from sglang.srt.model_executor.runner_backend import (
        breakable_cuda_graph_backend,
        full_cuda_graph_backend,
        tc_piecewise_cuda_graph_backend,
    )
    from sglang.srt.runtime_context import get_exec, publish
    from sglang.srt.server_args import ServerArgs

    publish(
        ServerArgs(model_path="dummy", device="cpu", chunked_prefill_size=PREFILL),
        role="scheduler",
    )
    sizes = CudaGraphConfig(decode=PhaseConfig(backend="full", bs=[1, 8, LARGEST_CAPTURE]))
    with get_exec().graph.override(cuda_graph_config=sizes):
        yield SimpleNamespace(
            runner=runner,
            backends=(
                full_cuda_graph_backend.FullCudaGraphBackend,
                breakable_cuda_graph_backend.BreakableCudaGraphBackend,
                tc_piecewise_cuda_graph_backend.TcPiecewiseCudaGraphBackend,
            ),
        )


def forward(runner, num_tokens, **layer):
    """One MoE layer; what arrived at the sort."""
    run_layer(runner, num_tokens, **layer)
    import aiter.sort

    return aiter.sort.calls[-1]


def run_layer(runner, num_tokens, *, experts=16, topk=4, dim=64, mxfp8=False):
    """One MoE layer through SGLang's own runner; its result and its routing's weights."""
    kind = runner.AiterQuantType.PER_1X32 if mxfp8 else runner.AiterQuantType.NONE
    weights = torch.float8_e4m3fnuz if mxfp8 else torch.bfloat16
    core = runner.AiterRunnerCore(runner.MoeRunnerConfig())
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand((num_tokens, experts), generator=generator).argsort(1)[:, :topk]
    weight = torch.rand((num_tokens, topk), generator=generator)
    result = core.run(
        runner.AiterRunnerInput(
            hidden_states=torch.zeros((num_tokens, dim), dtype=torch.bfloat16),
            topk_ids=ids.int().contiguous(),
            topk_weights=weight,
            quant_type=kind,
        ),
        runner.AiterMoeQuantInfo(
            w13_weight=torch.zeros((experts, 32, dim), dtype=weights),
            w2_weight=torch.zeros((experts, dim, 16), dtype=weights),
        ),
        {},
    )
    return result.hidden_states, weight


class CaptureBeginsError(Exception):
    """Raised in place of making a CUDAGraph, which the CPU cannot."""


def capture_one(backend_class, forward_fn, tp_group=None):
    """SGLang's real capture_one, up to the moment where it would begin to capture."""

    def begin(*args, **kwargs):
        raise CaptureBeginsError

    backend = backend_class.__new__(backend_class)
    backend._cuda_graph_runner = SimpleNamespace(captured_req_width=1)
    backend._device_module = SimpleNamespace(synchronize=lambda: None)
    backend._tp_group = tp_group or SimpleNamespace(barrier=lambda: None)
    backend._precarve = SimpleNamespace(measure=contextlib.nullcontext)
    backend._reuse_output_buffer = False
    backend.deduped_cuda_graph = False
    module = sys.modules[backend_class.__module__]
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(torch.cuda, "CUDAGraph", begin))
        if hasattr(module, "BreakableCUDAGraph"):
            stack.enter_context(patch.object(module, "BreakableCUDAGraph", begin))
        stack.enter_context(contextlib.suppress(CaptureBeginsError))
        backend.capture_one(SimpleNamespace(size=LARGEST_CAPTURE), forward_fn)


def start_rank(sglang, rank, size, port, folder):
    """One tensor-parallel rank: SGLang's own groups over gloo, a dense capture, one with MoE."""
    os.environ["XDG_CACHE_HOME"] = folder
    from sglang.srt.distributed import parallel_state

    from adaptive_moe.engines import process
    from adaptive_moe.store.key import Request
    from adaptive_moe.store.text import to_text

    parallel_state.init_distributed_environment(
        size, rank, f"tcp://127.0.0.1:{port}", rank, backend="gloo"
    )
    ranks = [list(range(size))]
    group = parallel_state.init_model_parallel_group(ranks, rank, "gloo", group_name="tp")
    full, *_ = sglang.backends
    capture_one(full, lambda: None, group)
    capture_one(full, lambda: forward(sglang.runner, LARGEST_CAPTURE), group)
    texts = [to_text(Request("sglang"), one) for one in process.current().tables.values()]
    result = {
        "group": group.ranks,
        "tables": [hashlib.sha256(text.encode()).hexdigest() for text in texts],
        "policy": int(forward(sglang.runner, 8).policy),
    }
    dist.barrier()  # rank 0 holds the others' store
    return result


def main():
    folders = sys.argv[1:]
    found = []
    with sglang_with_plugin() as sglang:
        for _ in range(2):
            port = free_port()
            ranks = [
                in_child(
                    functools.partial(start_rank, sglang, rank, len(folders), port, folder),
                    f"rank {rank}",
                )
                for rank, folder in enumerate(folders)
            ]
            found.append([result() for result in ranks])
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main()
