"""Picks the sort of an MoE layer for each batch from what was measured at warm-up.

In a process that serves with AITER:

    install()                      wrap AITER's sort; from now on its calls are seen
    warm_up(max_tokens)            after a first forward: measure, and choose from then on
    counts()                       what became of the calls so far
    uninstall()                    AITER as it was

By hand:

    kernel = load_kernel("cpu")    or "triton"; a SortKernel of your own: CONTRIBUTING.md
    coverage = Coverage.up_to(SortingShape(256, 8, 7168), max_tokens=4096)
    table = calibrate(kernel, coverage, Plan(budget_s=10.0))
    table.candidate(24)            the sort for a batch of 24 tokens

docs/api.md has all of it. The names are imported on first use, so that importing the package costs
a serving process neither torch nor numpy.
"""

import sys

TYPE_CHECKING = False  # what type checkers take for true; importing typing would cost milliseconds
if TYPE_CHECKING:  # the names of _NAMES once more, as type checkers read no mapping
    from adaptive_moe.engines.process import counts as counts
    from adaptive_moe.engines.process import install as install
    from adaptive_moe.engines.process import uninstall as uninstall
    from adaptive_moe.engines.process import warm_up as warm_up
    from adaptive_moe.engines.warm_up import WarmUp as WarmUp
    from adaptive_moe.hook.counters import Counts as Counts
    from adaptive_moe.kernels import Candidate as Candidate
    from adaptive_moe.kernels import KernelUnavailableError as KernelUnavailableError
    from adaptive_moe.kernels import SortKernel as SortKernel
    from adaptive_moe.kernels import load_kernel as load_kernel
    from adaptive_moe.kernels.call import CallKey as CallKey
    from adaptive_moe.policy.coverage import Coverage as Coverage
    from adaptive_moe.policy.coverage import Situation as Situation
    from adaptive_moe.policy.evidence import Bucket as Bucket
    from adaptive_moe.policy.evidence import Environment as Environment
    from adaptive_moe.policy.evidence import Evidence as Evidence
    from adaptive_moe.policy.evidence import Result as Result
    from adaptive_moe.policy.evidence import Rule as Rule
    from adaptive_moe.policy.table import PolicyTable as PolicyTable
    from adaptive_moe.policy.verdict import Choice as Choice
    from adaptive_moe.policy.verdict import Judgement as Judgement
    from adaptive_moe.policy.verdict import Standing as Standing
    from adaptive_moe.policy.verdict import Verdict as Verdict
    from adaptive_moe.settings import LogDetail as LogDetail
    from adaptive_moe.settings import Mode as Mode
    from adaptive_moe.settings import Settings as Settings
    from adaptive_moe.settings import SettingsError as SettingsError
    from adaptive_moe.settings import read_settings as read_settings
    from adaptive_moe.shape import SortingShape as SortingShape
    from adaptive_moe.tuning.calibrate import BudgetError as BudgetError
    from adaptive_moe.tuning.calibrate import CalibrationFailedError as CalibrationFailedError
    from adaptive_moe.tuning.calibrate import CalibrationRefusedError as CalibrationRefusedError
    from adaptive_moe.tuning.calibrate import Plan as Plan
    from adaptive_moe.tuning.calibrate import calibrate as calibrate
    from adaptive_moe.tuning.clocks import Clock as Clock

__version__ = "0.1.0"

if sys.version_info < (3, 10):  # noqa: UP036  run from a checkout
    raise ImportError("adaptive_moe needs Python 3.10 or newer, not " + sys.version.split()[0])

# The variables that turn the plugins on: vLLM's own, and all that begin with the second. They stand
# here because the plugins look for them in every process, before they import anything else.
VLLM_VARIABLE = "VLLM_ROCM_AITER_MOE_DISPATCH_POLICY"
PREFIX = "ADAPTIVE_MOE_"

# Every public name, by the module that has it.
_NAMES: dict[str, str] = {
    "engines.process": "counts install uninstall warm_up",
    "engines.warm_up": "WarmUp",
    "hook.counters": "Counts",
    "kernels": "Candidate KernelUnavailableError SortKernel load_kernel",
    "kernels.call": "CallKey",
    "policy.coverage": "Coverage Situation",
    "policy.evidence": "Bucket Environment Evidence Result Rule",
    "policy.table": "PolicyTable",
    "policy.verdict": "Choice Judgement Standing Verdict",
    "settings": "LogDetail Mode Settings SettingsError read_settings",
    "shape": "SortingShape",
    "tuning.calibrate": "BudgetError CalibrationFailedError CalibrationRefusedError Plan calibrate",
    "tuning.clocks": "Clock",
}
_HOME = {name: f"adaptive_moe.{home}" for home, names in _NAMES.items() for name in names.split()}

__all__ = [*sorted(_HOME), "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'adaptive_moe' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, "__doc__", "__file__", "__name__", "__path__"})
