"""Files that are whole or absent: written under a temporary name, flushed, and renamed."""

import contextlib
import logging
import os
import secrets
import time
from pathlib import Path

logger = logging.getLogger("adaptive_moe")

# A write takes milliseconds: a process that left a temporary file this old is gone.
STALE_AFTER_S = 3600.0
TEMPORARY_PREFIX, TEMPORARY_SUFFIX = ".adaptive-moe-", ".tmp"


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` in `path`'s place in one step, flushed to disk, with the mode of the umask.

    OSError where that fails; what was there before then still is, and nothing else.
    """
    temporary = path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise
    # Without this the rename itself may not survive a power cut. Some network mounts refuse it.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def temporary_files(folder: Path) -> list[Path]:
    """Files that killed processes left behind, or that others are writing right now."""
    return sorted(folder.glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}"))


def remove_stale(folder: Path) -> None:
    """Remove temporary files that killed processes left there."""
    oldest = time.time() - STALE_AFTER_S
    for path in temporary_files(folder):
        try:
            if path.lstat().st_mtime < oldest:
                path.unlink()
        except OSError as error:
            logger.debug("%s stays behind: %s", path, error)


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        logger.debug("%s stays behind: %s", path, error)
