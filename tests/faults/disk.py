"""Disks and folders that fail: serving goes on with the table in memory, after one warning. And
folders as clusters mount them: the second start measures nothing."""

import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaptive_moe.store.folder import Folder, stored_files
from adaptive_moe.store.shared import SharedStore
from adaptive_moe.store.tables import Stores, table_for
from adaptive_moe.store.write import temporary_files
from tests.store.making import another, key_for_table

from .damaged import listening
from .processes import finish, start

STRANGER = 12345
TABLES = {key_for_table(table): table for table in (another(), another(kernel="other"))}


def run() -> dict[str, Any]:
    """Each fault that can be made here, and how; `how` says where it could only be imitated."""
    results: dict[str, Any] = {}
    for name, fault in (*FAULTS, *MOUNTS):
        answer = finish(start(fault))
        results[name] = answer.get("result", answer)
    failures = {n: r for n, r in results.items() if not ("skipped" in r or r.get("as_expected"))}
    return {"faults": results, "failures": failures}


def start_on(folder: Path) -> dict[str, Any]:
    """One start of a rank on that folder, with two shapes."""
    with listening() as lines, SharedStore(lambda: None) as shared:
        stores = Stores(Folder(folder), shared)
        served = [
            table_for(key, stores, lambda earlier, table=table: table, 1.5)
            for key, table in TABLES.items()
        ]
    return {
        "origins": [one.origin for one in served],
        "kept": sum(one.is_kept for one in served),
        "log": [line.replace(str(folder), "CACHE") for line in lines],
    }


def fails(folder: Path) -> dict[str, Any]:
    """A start on a folder that takes nothing: one warning for all, and no file left behind."""
    answer = start_on(folder)
    left = folder.is_dir() and [*temporary_files(folder), *stored_files(folder)]
    one_line = len(answer["log"]) == 1 and answer["log"][0].startswith("CACHE/")
    served = answer["origins"] == ["measured", "measured"] and not answer["kept"]
    return {**answer, "as_expected": one_line and served and not left}


def full_disk() -> dict[str, Any]:
    """No byte free, then a few: the first write fails at once, or half way."""
    if os.geteuid() != 0:
        return {"skipped": "mounting needs root; see the size limit below"}
    answers = []
    for free in (0, 4096):
        with mounted("size=64k") as folder:
            (folder / "cache").mkdir()
            (folder / "filler").write_bytes(bytes(_free(folder) - free))
            answers.append(fails(folder / "cache"))
    worst = min(answers, key=lambda answer: answer["as_expected"])
    return {**worst, "how": "tmpfs of 64 KiB"}


def size_limit() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        answer = fails(Path(name) / "cache")
    return {**answer, "how": "RLIMIT_FSIZE, so that a write stops half way (EFBIG)"}


def failing_flush() -> dict[str, Any]:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with tempfile.TemporaryDirectory() as name:
        os.fsync = fail
        return {**fails(Path(name) / "cache"), "how": "os.fsync raises EIO (injected)"}


def empty_read_only_disk() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {"skipped": "mounting needs root; see the read-only folder below"}
    with mounted("size=64k") as folder:
        (folder / "cache").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        return {**fails(folder / "cache"), "how": "tmpfs remounted read-only"}


def empty_read_only_folder() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cache"
        folder.mkdir(mode=0o500)
        _become_user(Path(name), folder)
        return {**fails(folder), "how": "mode 0500, as a user who is not root"}


def unreachable_folder() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "file").write_text("")
        return {**fails(Path(name) / "file" / "cache"), "how": "a file on the way"}


FAULTS: tuple[tuple[str, Callable[[], dict[str, Any]]], ...] = (
    ("full disk", full_disk),
    ("size limit", size_limit),
    ("failing flush", failing_flush),
    ("empty read-only disk", empty_read_only_disk),
    ("empty read-only folder", empty_read_only_folder),
    ("folder that cannot be made", unreachable_folder),
)


def _second_start(change: Callable[[Path], Path | None]) -> Callable[[], dict[str, Any]]:
    """A start, then a change to its folder, then a start on that folder or the one returned."""

    def both() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            os.chmod(name, 0o755)
            folder = Path(name) / "cache"
            first = start_on(folder)
            assert first["kept"] == len(TABLES)
            is_root = os.geteuid() == 0
            try:
                second = start_on(change(folder) or folder)
            except PermissionError:
                return {"skipped": "giving files away needs root"}
            finally:
                if is_root:
                    os.setresuid(0, 0, 0)
        good = second["origins"] == ["stored"] * len(TABLES) and second["log"] == []
        return {**second, "as_expected": good}

    return both


def _modes(of_files: int, of_folder: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in stored_files(folder):
            path.chmod(of_files)
        folder.chmod(of_folder)

    return change


def _of_another(folder: Path) -> None:
    for path in (folder, *stored_files(folder)):
        os.chown(path, STRANGER, STRANGER)


def _read_by_another(folder: Path) -> None:
    """Written by root, as an init container does, and read by a user of its own."""
    _become_user()


def _config_map(folder: Path) -> Path:
    mounted_at = folder.parent / "mounted"
    day = mounted_at / "..2026_01_01"
    shutil.copytree(folder, day)
    (mounted_at / "..data").symlink_to(day.name)
    for path in stored_files(day):
        (mounted_at / path.name).symlink_to(f"..data/{path.name}")
    return mounted_at


def _read_only(folder: Path) -> None:
    folder.chmod(0o555)
    _become_user()


MOUNTS: tuple[tuple[str, Callable[[], dict[str, Any]]], ...] = (
    ("files of mode 0660 in a folder of 0777", _second_start(_modes(0o660, 0o777))),
    ("files of mode 0666", _second_start(_modes(0o666, 0o755))),
    ("files and folder of another user", _second_start(_of_another)),
    ("read by another user", _second_start(_read_by_another)),
    ("links, as a ConfigMap has them", _second_start(_config_map)),
    ("read-only folder", _second_start(_read_only)),
)


@contextmanager
def mounted(options: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", name], check=True)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", name], check=True)


def _free(folder: Path) -> int:
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize


def _become_user(*folders: Path) -> None:
    """Root may write anywhere: continue as a user who may not."""
    if os.geteuid() == 0:
        for folder in folders:
            os.chown(folder, STRANGER, STRANGER)
        os.setresuid(STRANGER, STRANGER, 0)  # root takes it back to remove the folder
