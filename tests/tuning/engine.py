"""The process that a calibration runs in is an engine's."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def engine_defaults() -> Iterator[None]:
    """As an engine may set them for its whole process; a tensor made by them is on no CPU."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
