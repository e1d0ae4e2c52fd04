"""What lies below the seam, by content: a source checkout keeps its version over pulls."""

import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from adaptive_moe.kernels.aiter import IMPLEMENTATION

# Of AITER's own sources, those that sort: from the package, and from where csrc is.
_IN_PACKAGE = ("ops/moe_sorting*.py", "ops/flydsl/moe_sorting*.py", "ops/flydsl/kernels/moe_sort*")
_IN_CSRC = ("include/moe_sorting*", "py_itfs_*/moe_sorting*")


# What AITER calls the modules that it builds of its sorts: module_moe_sorting, ..._opus.
_BUILT = "module_moe_sorting"


def content(module: ModuleType, seam: Callable[..., Any]) -> str:
    """A digest of everything below the seam that decides how a call is sorted: AITER's fused_moe.py
    and the sources of its sorts, its built sorts, and the functions in place of the seam or of what
    it calls."""
    functions = [seam, getattr(module, IMPLEMENTATION, None)]
    files = {file for function in functions for file in _files(function)}
    if getattr(module, "__file__", None):
        files |= {Path(str(module.__file__)), *_sources(Path(str(module.__file__)).parent)}
    # Where there is no file, the code itself.
    code = [
        f.__code__.co_code
        for function in functions
        for f in _layers(function)
        if hasattr(f, "__code__") and not Path(f.__code__.co_filename).is_file()
    ]
    return digest(sorted(files), [*code, *_built_sorts(module)])


def replacements(module: ModuleType, seam: Callable[..., Any]) -> list[str]:
    """The functions that stand in for AITER's below the seam, such as `sglang.x.small_sort`."""
    own = getattr(module, "__file__", None)
    found = []
    for function in (seam, getattr(module, IMPLEMENTATION, None)):
        for layer in _layers(function):
            code = getattr(layer, "__code__", None)
            if code is None or (own is not None and code.co_filename != own):
                where = getattr(layer, "__globals__", {}).get("__name__", type(layer).__module__)
                found.append(f"{where}.{code.co_name if code else type(layer).__name__}")
    return found


@functools.lru_cache(maxsize=8)
def _built_sorts(module: ModuleType) -> tuple[bytes, ...]:
    """Digests of the built sorts that are loaded, by name.

    AITER does not rebuild a module when its sources change, so sources alone do not tell which
    binary runs. Looked at once in a process: what is built or loaded while measuring must not
    change the identity that measuring began with.
    """
    files = {}
    for name, built in list(sys.modules.items()):
        word, file = name.rpartition(".")[2], getattr(built, "__file__", None)
        if word.startswith(_BUILT) and file is not None and Path(file).is_file():
            files[word] = Path(file)
    return tuple(
        word.encode() + _file_digest(file, file.stat().st_mtime_ns)
        for word, file in sorted(files.items())
    )


def digest(files: Iterable[Path], more: Iterable[bytes] = ()) -> str:
    """Twelve hex digits over the content of these files and bytes; names and times do not count."""
    parts = [_file_digest(file, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(b"".join([*parts, *more])).hexdigest()[:12]


@functools.lru_cache(maxsize=256)
def _file_digest(file: Path, changed: int) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest()


def _layers(function: Any) -> Iterator[Any]:
    """The function, and those it wraps as far as they can be seen."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _files(function: Any) -> Iterator[Path]:
    for layer in _layers(function):
        code = getattr(layer, "__code__", None)
        if code is not None and Path(code.co_filename).is_file():
            yield Path(code.co_filename)


def _sources(package: Path) -> Iterator[Path]:
    for pattern in _IN_PACKAGE:
        yield from (file for file in package.glob(pattern) if file.is_file())
    for root in (package.parent / "aiter_meta" / "csrc", package.parent / "csrc"):
        for pattern in _IN_CSRC:
            yield from (file for file in root.glob(pattern) if file.is_file())
