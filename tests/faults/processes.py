"""Forked children with a result, and kills."""

import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Child:
    pid: int
    output: int


def start(work: Callable[[], Any]) -> Child:
    """Run work() in a forked child; what it returns must be JSON."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return Child(pid, reader)
    status = 1
    try:
        os.close(reader)
        torch.set_num_threads(1)  # a forked process lacks its parent's thread pool, and would wait
        answer = {"result": work()}
        status = 0
    except BaseException:
        answer = {"error": traceback.format_exc()}
    with open(writer, "w", encoding="utf-8") as pipe:
        json.dump(answer, pipe)
    # Not sys.exit: the parent's own cleanup must not run twice.
    os._exit(status)


def kill(child: Child, number: int = signal.SIGKILL) -> None:
    os.kill(child.pid, number)


def finish(child: Child, seconds: float = 120.0) -> dict[str, Any]:
    """{"result": ...}, {"error": ...}, or {"signal": n}; a child past its time is killed: {"hung":
    seconds}."""
    deadline, text = time.monotonic() + seconds, b""
    while True:
        ready, _, _ = select.select([child.output], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            kill(child)
            os.waitpid(child.pid, 0)
            os.close(child.output)
            return {"hung": seconds}
        part = os.read(child.output, 1 << 16)
        if not part:
            break
        text += part
    os.close(child.output)
    _, status = os.waitpid(child.pid, 0)
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    return dict(json.loads(text))


def finish_all(children: Sequence[Child], seconds: float = 120.0) -> list[dict[str, Any]]:
    return [finish(child, seconds) for child in children]
