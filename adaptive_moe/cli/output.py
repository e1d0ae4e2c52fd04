"""Where a command's results go: standard output, or a file that is whole or not there at all."""

import argparse
import errno
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive_moe.store.write import replace_file

STDOUT = "-"


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def add_output(parser: argparse.ArgumentParser, what: str, *, required: bool = False) -> None:
    parser.add_argument(
        "--output", metavar="FILE", required=required, help=f"{what}; - is standard output"
    )


def report(args: argparse.Namespace, lines: Sequence[str], plain: Any) -> None:
    """Print the lines, or with --json the same as JSON."""
    print(json.dumps(plain, indent=1) if args.json else "\n".join(lines))


def check_place(path: str) -> None:
    """ValueError where a file could not be put there: before measuring, not after it."""
    if path == STDOUT or _is_special(path):
        return
    folder = Path(path).parent
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}): give another place"
        ) from None


def write(path: str, content: bytes) -> None:
    """Put the content there in one step: beside its place, then renamed. `-` is standard output.

    OSError naming the path where that fails; what was there before then still is.
    """
    if path == STDOUT:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    if _is_special(path):  # a device or a pipe is written to, not replaced
        Path(path).write_bytes(content)
        return
    place = Path(os.path.realpath(path))  # a link keeps pointing at what it points at
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, content)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), path) from error


def _is_special(path: str) -> bool:
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
