"""The live AITER as a kernel to measure: its seam under every policy, and the sorts beside it."""

import functools
import hashlib
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from adaptive_moe.kernels import POLICIES, Candidate, SortKernel, policy_name
from adaptive_moe.kernels.aiter import installed_version
from adaptive_moe.kernels.aiter_padding import kernels_for, one_shot_rows, refusal, unguarded
from adaptive_moe.policy.coverage import Coverage

if TYPE_CHECKING:
    import torch

    from adaptive_moe.kernels import Call
    from adaptive_moe.kernels.contract import SortingInputs
