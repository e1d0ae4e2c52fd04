"""What AITER expects of a function that pybind11 made."""

import inspect
from collections.abc import Callable


def like_pybind(function: Callable[..., None]) -> Callable[..., None]:
    """Let the function's text begin with its signature: AITER checks each argument against that."""
    function.__doc__ = f"{function.__name__}{inspect.signature(function)}"
    return function
