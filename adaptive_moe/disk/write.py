"""Files that are there whole or not at all: written beside their place, flushed, and renamed."""

import logging
import os
import secrets
import time
from pathlib import Path

logger = logging.getLogger("adaptive_moe")

# A write takes milliseconds: a temporary file this old belongs to nobody any more.
STALE_AFTER_S = 3600.0
TEMPORARY_PREFIX, TEMPORARY_SUFFIX = ".adaptive-moe-", ".tmp"


def replace_file(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Put `content` in `path`'s place in one step, flushed to disk; the mode is cut by the umask.

    OSError where that fails; what was there before then still is, and nothing else.
    """
    temporary = path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, mode)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    # Without this the rename itself may not survive a power cut.
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def temporary_files(folder: Path) -> list[Path]:
    """What killed processes left behind, or others are writing right now."""
    return sorted(folder.glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}"))


def remove_stale(folder: Path) -> None:
    """Remove what killed processes left there long ago."""
    oldest = time.time() - STALE_AFTER_S
    for path in temporary_files(folder):
        try:
            if path.lstat().st_mtime < oldest:
                path.unlink()
        except OSError as error:
            logger.debug("%s stays behind: %s", path, error)


def remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        logger.debug("%s stays behind: %s", path, error)
