"""Calibrations on disk: one JSON file for each environment and shape, shared by any processes.

What a file holds, and when it is believed, is in file.py; here is which folder, which files are
ours to believe (regular ones, of this user or root, of a sane size), and which tables are kept.
Anything else is a miss with one log line that names the file and why: measuring again is always
safe, so nothing here raises into a warm-up.

There are no locks. A reader sees the old file or the new one, never half of one (write.py).
Processes that measured the same thing overwrite each other with tables that are equally good, and
the last one wins. A process that is killed leaves at most a `.tmp` file that nobody reads; a later
write removes it.
"""

import errno
import logging
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adaptive_moe.disk.file import Key, Stored, differences, key_for
from adaptive_moe.disk.write import remove_stale, replace_file
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.settings import Settings

__all__ = ["Key", "Store", "cache_folder", "key_for", "open_store", "read_file", "write_file"]

logger = logging.getLogger("adaptive_moe")

# A table of a hundred buckets has 0.2 MiB; what is larger is not read, let alone parsed.
MAX_FILE_BYTES = 4 << 20
FILE_NAME = re.compile(r"[a-z0-9_.-]{1,120}-[0-9a-f]{16}\.json")


@dataclass(frozen=True)
class Loaded:
    """A stored table. unfinished: it left something unsettled that the budget asked for now, larger
    than its own, may settle: measure with `earlier=table.evidence` to go on from there."""

    table: PolicyTable
    unfinished: bool


@dataclass(frozen=True)
class Store:
    """The folder of one warm-up. usable: False where it cannot be trusted; every load is then a
    miss and nothing is written, which was said once when it was opened. quiet: what went well is
    said at DEBUG, for all ranks but the one that speaks."""

    folder: Path
    usable: bool = True
    recalibrate: bool = False
    quiet: bool = False

    def load(self, key: Key, budget_s: float = 0.0) -> Loaded | None:
        """The table for exactly this key, or None (a miss), with a line in the log. budget_s: what
        measuring it now might take, in seconds."""
        path = self.folder / key.file_name()
        if not self.usable:
            return None
        if self.recalibrate:
            self._say("%s is not read: ADAPTIVE_MOE_RECALIBRATE asks to measure again", path)
            return None
        try:
            stored = read_file(path)
            if not stored.table.sound:
                raise ValueError("a candidate failed or was wrong in it")
        except FileNotFoundError:
            logger.debug("nothing stored in %s yet", path)
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s is not used, measuring again: %s", path, error)
            return None
        if stored.key != key:
            fields = ", ".join(differences(stored.key, key))
            logger.warning("%s is not used, measuring again: it is for another %s", path, fields)
            return None
        found = stored.table.evidence
        unfinished = budget_s > found.budget_s and not stored.table.settled
        self._say(
            "%s: table from %s, measured %s on %s (%s, torch %s)%s",
            *(found.coverage.describe(), path, found.created),
            *(found.environment.device, found.environment.runtime or "CPU"),
            found.environment.torch,
            f"; going on from its {found.budget_s:g} s with {budget_s:g} s" if unfinished else "",
        )
        return Loaded(stored.table, unfinished)

    def publish(self, tables: Mapping[Key, PolicyTable]) -> int:
        """Keep those of these tables that are sound; how many are on disk now. The first failure is
        warned about and the last thing tried: a disk that is full or read-only stays so."""
        kept = 0
        for key, table in tables.items() if self.usable else ():
            path, stored = self.folder / key.file_name(), Stored(key.request, table)
            if not table.sound:
                logger.debug("%s is not written: a candidate failed or was wrong", path)
                continue
            if stored.key != key:
                fields = ", ".join(differences(stored.key, key))
                self._say("%s is not written: the ranks' table has another %s", path, fields)
                continue
            try:
                write_file(path, stored)
            except OSError as error:
                logger.warning(
                    "%s cannot be written (%s): the tables serve this process, and the next start "
                    "measures again; free the disk, or give a writable ADAPTIVE_MOE_CACHE_DIR",
                    *(path, error.strerror or error),
                )
                break
            kept += 1
        return kept

    def _say(self, text: str, *values: object) -> None:
        logger.log(logging.DEBUG if self.quiet else logging.INFO, text, *values)


def cache_folder(settings: Settings, environ: Mapping[str, str] = os.environ) -> Path:
    """ADAPTIVE_MOE_CACHE_DIR, else $VLLM_CACHE_ROOT/adaptive_moe, else the user's cache folder."""
    if settings.cache_dir:
        return Path(settings.cache_dir).expanduser()
    root = environ.get("VLLM_CACHE_ROOT") or environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(root)) / "adaptive_moe"


def open_store(settings: Settings, environ: Mapping[str, str] = os.environ) -> Store:
    """The store the settings name; unusable, with one warning, where it is not ours to trust."""
    folder = cache_folder(settings, environ)
    problem = None
    try:
        facts = folder.stat()
        if not stat.S_ISDIR(facts.st_mode):
            problem = "it is not a folder"
        elif not _ours(facts):
            problem = f"it belongs to user {facts.st_uid}, not to you or root"
    except FileNotFoundError:
        pass  # made when there is something to write
    except OSError as error:
        problem = error.strerror or str(error)
    if problem is not None:
        logger.warning(
            "the cache folder %s is not used, every start measures: %s; give another "
            "ADAPTIVE_MOE_CACHE_DIR",
            *(folder, problem),
        )
    return Store(folder, usable=problem is None, recalibrate=settings.recalibrate)


def read_file(path: Path) -> Stored:
    """One file, checked whole. OSError or ValueError saying what is wrong with it."""
    return Stored.from_text(_believed(path).decode("utf-8"))


def write_file(path: Path, stored: Stored) -> None:
    """Put `stored` in `path`'s place in one step, flushed to disk; nothing where it already is.

    OSError where that fails; what was there before then still is.
    """
    content = stored.to_text().encode("utf-8")
    if _holds(path, content):
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    remove_stale(path.parent)
    replace_file(path, content, mode=0o600)


def stored_files(folder: Path) -> list[Path]:
    """Files in the folder that are named as ours, whatever they hold, by name."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if FILE_NAME.fullmatch(p.name))


def _believed(path: Path) -> bytes:
    # No link is followed, and a pipe in place of the file cannot make us wait.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("it is a link") from None
        raise
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("it is not a regular file")
        if not _ours(facts):
            raise ValueError(f"it belongs to user {facts.st_uid}, not to you or root")
        if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError("others may write to it: chmod 600 it if you trust it")
        with open(descriptor, "rb", closefd=False) as file:
            # Not st_size: the file may grow while it is read.
            content = file.read(MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
    return content


def _holds(path: Path, content: bytes) -> bool:
    try:
        return _believed(path) == content
    except (OSError, ValueError):
        return False


def _ours(facts: os.stat_result) -> bool:
    return facts.st_uid in (0, os.geteuid())
