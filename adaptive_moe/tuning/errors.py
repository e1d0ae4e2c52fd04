"""What ends a calibration without a table."""


class CalibrationRefusedError(RuntimeError):
    """Calibrating is not possible now; the text says why. Nothing was run."""


class CalibrationFailedError(RuntimeError):
    """The baseline itself could not be measured, for a reason of the moment (out of memory, a
    device error), which the text gives. There is no table; the next start tries again."""


class BudgetError(ValueError):
    """The budget did not cover one round of any bucket."""
