"""In place of AITER's compiled module of this name: its two enums."""

import enum


class ActivationType(enum.Enum):
    """Members: as pybind11 begins the text of an enum, by which AITER tells one from a function."""

    No = -1
    Silu = 0
    Gelu = 1
    Swiglu = 2


class QuantType(enum.Enum):
    """Members: see above."""

    No = 0
    per_Tensor = 1  # noqa: N815
    per_Token = 2  # noqa: N815
    per_1x32 = 3
    per_1x128 = 4
    per_128x128 = 5
