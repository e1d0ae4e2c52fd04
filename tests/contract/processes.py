"""Forked ranks for the contract tests."""

import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

STANDIN = Path(__file__).resolve().parents[1] / "aiter_standin"


def in_child(work: Callable[[], Any], name: str) -> Callable[[], Any]:
    """Run work in a forked process, as with VLLM_WORKER_MULTIPROC_METHOD=fork; how to get its
    result."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=lambda: writer.send(work()), name=name)
    child.start()
    writer.close()  # so that a child that dies is the end of the file, not of our patience

    def result() -> Any:
        answer = reader.recv()
        child.join()
        return answer

    return result


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
