"""Picks the MoE sorting dispatch policy for each batch from what was measured at warm-up.

The names below are imported on first use, so that importing the package costs a serving process
neither torch nor numpy.
"""

import sys

TYPE_CHECKING = False  # what type checkers take for true; importing typing would cost milliseconds
if TYPE_CHECKING:
    from adaptive_moe.engines.process import counts as counts
    from adaptive_moe.engines.process import install as install
    from adaptive_moe.engines.process import uninstall as uninstall
    from adaptive_moe.engines.process import warm_up as warm_up
    from adaptive_moe.policy.table import PolicyTable as PolicyTable
    from adaptive_moe.settings import Settings as Settings
    from adaptive_moe.settings import read_settings as read_settings
    from adaptive_moe.shape import SortingShape as SortingShape
    from adaptive_moe.tuning.calibrator import calibrate as calibrate

__version__ = "0.1.0"

_HOME = {
    "PolicyTable": "adaptive_moe.policy.table",
    "Settings": "adaptive_moe.settings",
    "SortingShape": "adaptive_moe.shape",
    "calibrate": "adaptive_moe.tuning.calibrator",
    "counts": "adaptive_moe.engines.process",
    "install": "adaptive_moe.engines.process",
    "read_settings": "adaptive_moe.settings",
    "uninstall": "adaptive_moe.engines.process",
    "warm_up": "adaptive_moe.engines.process",
}

__all__ = [
    "PolicyTable",
    "Settings",
    "SortingShape",
    "__version__",
    "calibrate",
    "counts",
    "install",
    "read_settings",
    "uninstall",
    "warm_up",
]


if sys.version_info < (3, 10):  # noqa: UP036  run from a checkout
    raise ImportError("adaptive_moe needs Python 3.10 or newer, not " + sys.version.split()[0])


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'adaptive_moe' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, "__doc__", "__file__", "__name__", "__path__"})
