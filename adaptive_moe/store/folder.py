"""The cache folder: tables for later starts, one file each.

The folder belongs to the operator who mounted it: a file is accepted from any owner and with any
mode, also through links, if its size, hash, schema and key fit. So tables survive on Kubernetes
volumes (files of mode 0660, folders of 0777, root mapped to another user, ConfigMaps made of
links), and shipping tables is copying the folder. The hash shows damage, not origin. What a forged
file can do is in SECURITY.md.

There are no locks. A reader sees the old file or the new one, never half of one (write.py).
Processes that measured the same thing replace each other's files with tables that are equally good.
What serves uses `get` and `replace`, which never raise: what cannot be read is a miss, and what
cannot be written is not kept, with one line each.
"""

import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.settings import Settings
from adaptive_moe.store.key import TableKey, differing_fields
from adaptive_moe.store.text import MAX_BYTES, StoredTable, from_text, to_text
from adaptive_moe.store.write import remove_stale, replace_file

logger = logging.getLogger("adaptive_moe")

FILE_NAME = re.compile(r"[a-z0-9_.-]{1,120}-[0-9a-f]{16}\.json")
# On a miss, so many files of the same shape are read to say what differs.
MAX_COMPARED = 64


@dataclass(frozen=True)
class Folder:
    """A cache folder. It need not exist before something is written. level: of lines about what
    went well, so that one rank can speak for all."""

    path: Path
    level: int = logging.INFO

    def get(self, key: TableKey) -> PolicyTable | None:
        """The table with exactly this key. None is a miss; a line says why unless there is simply
        nothing for that shape."""
        path = self.file(key)
        try:
            stored = read_file(path)
            if stored.key != key:
                raise ValueError(
                    f"it is for another {', '.join(differing_fields(key, stored.key))}"
                )
            return stored.table
        except (FileNotFoundError, NotADirectoryError):
            self._say_nearest(key)
        # Whatever a file holds, it must not end the process that reads it.
        except Exception as error:
            logger.warning("%s is not used, measuring again: %s", path, _why(error))
        return None

    def replace(self, key: TableKey, table: PolicyTable) -> bool:
        """As `write`, for a process that serves: False, with one line, where that fails."""
        try:
            self.write(key, table)
        except Exception as error:
            logger.warning(
                "%s cannot be written (%s), and the next start will not find it: free the disk, or "
                "give a writable ADAPTIVE_MOE_CACHE_DIR",
                *(self.file(key), _why(error)),
            )
            return False
        return True

    def write(self, key: TableKey, table: PolicyTable) -> None:
        """Put the table in the place of what is stored under that key, in one step; nothing where
        it already is. OSError, or ValueError where it is too large to be read again; what was
        stored before then still is."""
        path, content = self.file(key), to_text(key.request, table).encode("utf-8")
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        if not _holds(path, content):
            self.path.mkdir(parents=True, exist_ok=True)
            remove_stale(self.path)
            replace_file(path, content)

    def file(self, key: TableKey) -> Path:
        """Where the table of that key is, or would be."""
        return self.path / f"{key.name}.json"

    @property
    def is_writable(self) -> bool:
        """Can files be put into it? Also False where it does not exist."""
        return os.access(self.path, os.W_OK | os.X_OK)

    def _say_nearest(self, key: TableKey) -> None:
        """One line: which stored table of that shape fits best, and what differs in it."""
        nearest: tuple[list[str], Path] | None = None
        try:
            for path, other in self._keys_of_shape(key):
                fields = differing_fields(key, other)
                if nearest is None or len(fields) < len(nearest[0]):
                    nearest = fields, path
        except Exception as error:
            logger.debug("what is stored in %s is not known: %s", self.path, _why(error))
        if nearest is None:
            logger.debug("nothing is stored for %s", self.file(key))
            return
        fields, path = nearest
        logger.log(
            self.level,
            "no stored table fits %s, measuring: the nearest, %s, is for another %s",
            *(key.coverage.describe(), path, "; ".join(fields)),
        )

    def _keys_of_shape(self, key: TableKey) -> Iterator[tuple[Path, TableKey]]:
        paths = [path for path in stored_files(self.path) if path.name.startswith(key.shape_name)]
        for path in paths[:MAX_COMPARED]:
            try:
                yield path, read_file(path).key
            except Exception as error:
                logger.debug("%s is not compared: %s", path, _why(error))


def cache_folder(settings: Settings, environ: Mapping[str, str] = os.environ) -> Path:
    """ADAPTIVE_MOE_CACHE_DIR, else $VLLM_CACHE_ROOT/adaptive_moe, else the user's cache folder."""
    if settings.cache_dir:
        # Unlike Path.expanduser, this leaves a ~user that does not exist as it is.
        return Path(os.path.expanduser(settings.cache_dir))
    root = environ.get("VLLM_CACHE_ROOT") or environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(root)) / "adaptive_moe"


def stored_files(folder: Path) -> list[Path]:
    """Files in the folder that are named as stored tables, whatever they hold, by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if FILE_NAME.fullmatch(path.name))


def read_file(path: Path) -> StoredTable:
    """One stored table, its evidence not yet judged. OSError, or ValueError saying what is wrong
    with the file."""
    return from_text(_read(path).decode("utf-8"))


def _read(path: Path) -> bytes:
    # O_NONBLOCK: a pipe in place of the file must not make us wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        # Tested on what was opened: the path may name something else by now.
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            # Not st_size: the file may grow while it is read.
            content = file.read(MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    return content


def _holds(path: Path, content: bytes) -> bool:
    try:
        return _read(path) == content
    except (OSError, ValueError):
        return False


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
