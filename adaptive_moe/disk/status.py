"""What each process runs, in one small file of the cache folder.

Written at warm-up, after capture and at exit: no thread, no port, nothing a call. A process that
has ended keeps its file for an hour, so that its counts can be read; the file of one that died
without a word goes at the next look. Nothing here raises: what fails is one line at DEBUG.
"""

import json
import logging
import os
import socket
import stat
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from adaptive_moe.disk.write import remove_stale, replace_file

logger = logging.getLogger("adaptive_moe")

FOLDER = "status"
MAX_FILE_BYTES = 1 << 20
ENDED_IS_KEPT_S = 3600.0
# Files of other hosts, on a shared disk: nobody here can say whether their process is alive.
ELSEWHERE_IS_KEPT_S = 7 * 86400.0


@dataclass(frozen=True)
class TableStatus:
    """One table in use. origin: stored, measured or agreed; decided: such as the log's summary."""

    calls: str
    kernel: str
    device: str
    origin: str
    measured: str
    decided: str
    settled: bool


@dataclass(frozen=True)
class ProcessStatus:
    """One process, when it last wrote.

    engine    name and version, such as `vllm 0.33.0`
    rank      of torch.distributed, and how many there are
    tables    in use; problems: a sentence for each shape without one
    calls     by what became of them, as in adaptive_moe.Counts
    captured  captured calls, by candidate
    moment    `warm-up`, `capture` or `exit`; written: UTC in ISO 8601
    began     the process's start in clock ticks since boot, which tells a process from a later one
              of the same number; 0 where that cannot be known
    """

    engine: str
    pid: int
    host: str
    rank: int
    ranks: int
    mode: str
    moment: str
    written: str
    began: int = 0
    tables: tuple[TableStatus, ...] = ()
    problems: tuple[str, ...] = ()
    calls: tuple[tuple[str, int], ...] = ()
    captured: tuple[tuple[str, int], ...] = ()

    @property
    def ended(self) -> bool:
        return self.moment == "exit"


def here(engine: str, rank: int, ranks: int, mode: str) -> ProcessStatus:
    """This process, with nothing to tell yet."""
    pid = os.getpid()
    return ProcessStatus(
        engine, pid, socket.gethostname(), rank, ranks, mode, "warm-up", "", _began(pid)
    )


def write(folder: Path, status: ProcessStatus, moment: str) -> None:
    """Put the process's file in place of its earlier one, in one step."""
    try:
        place = folder / FOLDER
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        text = json.dumps(asdict(replace(status, moment=moment, written=now)), indent=1) + "\n"
        path = place / f"{status.host}-{status.pid}.json"
        replace_file(path, text.encode("utf-8"), mode=0o600)
        remove_stale(place)
    except (OSError, ValueError) as error:
        logger.debug("the status file was not written: %s", error)


def read_all(folder: Path) -> list[ProcessStatus]:
    """Every process that wrote to this cache folder and is alive, or has ended within the hour, by
    engine, rank and number. Stale files are removed on the way."""
    found = []
    try:
        paths = sorted((folder / FOLDER).glob("*.json"))
    except OSError as error:
        logger.debug("%s cannot be read: %s", folder / FOLDER, error)
        return []
    for path in paths:
        try:
            status, age_s = _read(path)
            if _is_stale(status, age_s):
                path.unlink(missing_ok=True)
            else:
                found.append(status)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            logger.debug("%s is not read: %s", path, error)
    return sorted(found, key=lambda s: (s.engine, s.host, s.rank, s.pid))


def _read(path: Path) -> tuple[ProcessStatus, float]:
    # No link is followed, and a pipe in place of the file cannot make us wait.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid not in (0, os.geteuid()):
            raise ValueError("it is not a regular file of yours")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
    return _from_plain(json.loads(content.decode("utf-8"))), time.time() - facts.st_mtime


def _from_plain(plain: Any) -> ProcessStatus:
    known = {field.name for field in fields(ProcessStatus)}
    if not isinstance(plain, dict) or set(plain) != known:
        raise ValueError("it is of another adaptive_moe")
    plain["tables"] = tuple(TableStatus(**table) for table in plain["tables"])
    plain["problems"] = tuple(str(problem) for problem in plain["problems"])
    for name in ("calls", "captured"):
        plain[name] = tuple((str(what), int(count)) for what, count in plain[name])
    for name in ("pid", "rank", "ranks", "began"):
        plain[name] = int(plain[name])
    return ProcessStatus(**plain)


def _is_stale(status: ProcessStatus, age_s: float) -> bool:
    if status.ended:
        return age_s > ENDED_IS_KEPT_S
    if status.host != socket.gethostname():
        return age_s > ELSEWHERE_IS_KEPT_S
    return not _is_alive(status)


def _is_alive(status: ProcessStatus) -> bool:
    try:
        os.kill(status.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's, so there is one
    return _began(status.pid) == status.began


def _began(pid: int) -> int:
    """When the process began, in clock ticks since boot; 0 where /proc does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        # After the command, which is in brackets and may hold anything.
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
