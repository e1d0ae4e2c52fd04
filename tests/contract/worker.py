"""A vLLM worker's start, with vLLM's own code and config on the CPU: plugins, profile run, warm-up.

    worker.py                       one start in a forked child, and one in its own process
    worker.py tensor:a tensor:b,a,c-    two starts of an engine: of one rank, which keeps its tables
                                    in folder a, then of three; the one of c- has no MoE layer
    worker.py data:a,b              the same with data-parallel ranks

It prints what came of each rank, after RESULT and as JSON.
"""

import functools
import hashlib
import json
import os
import sys
import types
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from processes import STANDIN, free_port, in_child

# Warm-ups of single NVIDIA models, whose kernels cannot even be imported without that GPU.
NVIDIA_ONLY = ("step5_dsa_warmup", "minimax_m3_msa_warmup")
MAX_TOKENS = 2048
CAPTURE_SIZES = [1, 2, 4, 8, 16, 32, 64]


def import_worker() -> Any:
    """`vllm.v1.worker.gpu_worker`, importable without a GPU."""
    if "vllm.v1.worker.gpu_worker" in sys.modules:
        return sys.modules["vllm.v1.worker.gpu_worker"]
    from absent import make_importable

    make_importable("torchvision")
    for name in NVIDIA_ONLY:
        module = types.ModuleType(name)
        setattr(module, name, lambda worker: None)
        sys.modules[f"vllm.model_executor.warmup.{name}"] = module
    import vllm.v1.worker.gpu_worker

    return vllm.v1.worker.gpu_worker


def make_worker(gpu_worker: Any) -> Any:
    """vLLM's Worker with a real config, around a model runner that has nothing to warm up."""
    import torch
    from vllm.config import CompilationConfig, DeviceConfig, VllmConfig

    config = VllmConfig(
        device_config=DeviceConfig(device="cpu"),
        compilation_config=CompilationConfig(cudagraph_capture_sizes=list(CAPTURE_SIZES)),
    )
    config.scheduler_config.max_num_batched_tokens = MAX_TOKENS
    described = SimpleNamespace(model_type="mixtral", architectures=["MixtralForCausalLM"])
    config.model_config = SimpleNamespace(
        hf_text_config=described, hf_config=described, is_moe=True
    )
    worker = gpu_worker.Worker.__new__(gpu_worker.Worker)
    worker.vllm_config = config
    worker.scheduler_config = config.scheduler_config
    worker.model_config = config.model_config
    worker.use_v2_model_runner = True
    worker.model_runner = MagicMock(attn_groups=[], is_pooling_model=True)
    worker.model_runner.get_model.return_value = torch.nn.Linear(1, 1)
    worker.get_model = worker.model_runner.get_model
    return worker


def forward(num_tokens: int) -> Any:
    """One MoE layer of DeepSeek-V3's shape; what arrived at the sort."""
    run_layer(num_tokens, experts=256, topk=8, dim=7168)
    import aiter.sort

    return aiter.sort.calls[-1]


def run_layer(num_tokens: int, *, experts: int, topk: int, dim: int) -> Any:
    """One MoE layer through vLLM's own implementation; its result and its routing's weights."""
    import torch
    import vllm._aiter_ops as ops
    from aiter import QuantType

    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand((num_tokens, experts), generator=generator).argsort(1)[:, :topk]
    policy = read_policy(ops.rocm_aiter_ops)
    passed = {} if policy is None else {"moe_sorting_dispatch_policy": policy}
    weights = torch.rand((num_tokens, topk), generator=generator)
    zero = torch.zeros((), dtype=torch.bfloat16)
    result = ops._rocm_aiter_fused_moe_impl(
        zero.expand(num_tokens, dim),
        zero.expand(experts, 32, dim),
        zero.expand(experts, dim, 16),
        weights,
        ids.int().contiguous(),
        quant_method=QuantType.per_1x128.value,
        **passed,
    )
    return result, weights


def read_policy(rocm_aiter_ops: Any) -> Any:
    """vLLM's get_moe_dispatch_policy() as on ROCm; None where this vLLM has none."""
    getter = getattr(rocm_aiter_ops, "get_moe_dispatch_policy", None)
    if getter is None:
        return None
    # Elsewhere its decorator returns None before it looks; the function below it is what we want.
    return getter.__func__.__wrapped__(rocm_aiter_ops)


def start() -> dict[str, Any]:
    """Run the model once, warm up, run it again; what came of it."""
    import torch

    torch.set_num_threads(1)  # as vLLM's workers have it
    gpu_worker = import_worker()
    worker = make_worker(gpu_worker)
    set_up_logging(worker.vllm_config)
    gpu_worker.kernel_warmup(worker)  # as in a model without a single sort
    forward(MAX_TOKENS)
    gpu_worker.kernel_warmup(worker)
    from adaptive_moe.engines import process

    tables = {t.evidence.coverage.shape.block_size: t for t in process.current().tables.values()}
    calls = [forward(count) for count in (1, 8, 32, 33, 512, MAX_TOKENS)]
    return {
        "blocks": sorted(tables),
        "policies": [int(call.policy) for call in calls],
        "expected": [chosen(tables[call.block_size], call.num_tokens) for call in calls],
        "answered": process.counts().chosen + process.counts().baseline,
    }


def chosen(table: Any, num_tokens: int) -> int:
    """The policy that the table has for that many tokens."""
    return int(table.candidate(num_tokens).removeprefix("policy "))


def start_rank(how: str, rank: int, size: int, method: str, folder: str) -> dict[str, Any]:
    """One rank of a starting engine: join the others as vLLM does, run the model once, warm up."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["VLLM_CACHE_ROOT"] = folder.removesuffix("-")
    gpu_worker = import_worker()
    worker = make_worker(gpu_worker)
    set_up_logging(worker.vllm_config)
    join(gpu_worker, worker.vllm_config, how, rank, size, method)
    if not folder.endswith("-"):
        forward(MAX_TOKENS)
    import aiter.sort

    from adaptive_moe.engines import process
    from adaptive_moe.store.key import Request
    from adaptive_moe.store.text import to_text

    before = len(aiter.sort.calls)
    gpu_worker.kernel_warmup(worker)
    texts = {
        table.evidence.coverage.shape.block_size: to_text(Request("vllm"), table)
        for table in process.current().tables.values()
    }
    result = {
        "world": dist.get_process_group_ranks(dist.group.WORLD),
        "sorts": len(aiter.sort.calls) - before,
        "tables": {b: hashlib.sha256(t.encode()).hexdigest() for b, t in texts.items()},
        "policies": [int(forward(count).policy) for count in (1, 32, 33, MAX_TOKENS)],
    }
    dist.barrier()  # rank 0 holds the others' store
    return result


def join(gpu_worker: Any, config: Any, how: str, rank: int, size: int, method: str) -> None:
    """vLLM's own way into torch.distributed, over gloo."""
    from vllm.config import set_current_vllm_config

    parallel = config.parallel_config
    if how == "data":
        _, address, port = method.replace("//", "").split(":")
        parallel.data_parallel_size, parallel.data_parallel_rank = size, rank
        parallel.data_parallel_master_ip, parallel.data_parallel_master_port = address, int(port)
        parallel._data_parallel_master_port_list = [int(port)]
        rank = 0
    else:
        parallel.tensor_parallel_size = parallel.world_size = size
    with set_current_vllm_config(config):
        gpu_worker.init_worker_distributed_environment(config, rank, method, rank, "gloo")


def rendezvous(how: str) -> str:
    """Where the ranks meet: as vLLM's executors choose it, newer ones a file for ranks of one
    host."""
    from vllm.utils import network_utils

    choose = getattr(network_utils, "get_file_store_init_method", None)
    if how == "data" or choose is None:
        return f"tcp://127.0.0.1:{free_port()}"
    return str(choose())


def set_up_logging(config: Any) -> None:
    """As vLLM's processes do once they have their config; earlier versions do it at import."""
    import vllm.logger

    if hasattr(vllm.logger, "configure_logging"):
        vllm.logger.configure_logging(config.logging_config)


def start_engine(how: str, folders: str) -> list[dict[str, Any]]:
    """All ranks of one engine at the same time; what came of each."""
    folders = folders.split(",")
    size, method = len(folders), rendezvous(how)
    ranks = [
        in_child(functools.partial(start_rank, how, rank, size, method, folder), f"Worker_{rank}")
        for rank, folder in enumerate(folders)
    ]
    return [result() for result in ranks]


def main() -> None:
    sys.path.insert(0, str(STANDIN))
    import_worker()  # before the plugin: it has kernel_warmup by name by then
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    found = [start_engine(*words.split(":")) for words in sys.argv[1:]]
    found = found or {"forked": in_child(start, "forked worker")(), "here": start()}
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main()
