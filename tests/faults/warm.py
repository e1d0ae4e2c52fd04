"""Warm start of one shape: how long after imports, in a fresh process that never imports torch."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from adaptive_moe.disk.folder import Store

from .made_up import key_of, made_up_table

CHILD = """
import json, sys, time
from pathlib import Path
from adaptive_moe.policy.plain import from_plain
from adaptive_moe.disk.folder import Key, Store
key = from_plain(Key, json.loads(sys.argv[2]), "key")
begun = time.perf_counter()
found = Store(Path(sys.argv[1])).load(key, 0.75)
seconds = time.perf_counter() - begun
again = time.perf_counter()
Store(Path(sys.argv[1])).load(key)
print(json.dumps({"hit": found is not None, "first_ms": 1e3 * seconds,
                  "second_ms": 1e3 * (time.perf_counter() - again),
                  "torch": "torch" in sys.modules}))
"""


def run(starts: int) -> dict[str, Any]:
    """Without torch in the process, no kernel can have been launched."""
    from adaptive_moe.policy.plain import to_plain

    table = made_up_table(7)
    key = json.dumps(to_plain(key_of(table)))
    answers = []
    with tempfile.TemporaryDirectory() as name:
        Store(Path(name)).publish({key_of(table): table})
        size = (Path(name) / key_of(table).file_name()).stat().st_size
        for _ in range(starts):
            command = [sys.executable, "-c", CHILD, name, key]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            answers.append(json.loads(done.stdout))
    failures = {}
    if not all(a["hit"] for a in answers):
        failures["missed"] = sum(not a["hit"] for a in answers)
    if any(a["torch"] for a in answers):
        failures["imported torch"] = sum(a["torch"] for a in answers)
    return {
        "starts": starts,
        "buckets": len(table.evidence.buckets),
        "file_bytes": size,
        "first_load_ms_median": round(median(a["first_ms"] for a in answers), 2),
        "first_load_ms_worst": round(max(a["first_ms"] for a in answers), 2),
        "second_load_ms_median": round(median(a["second_ms"] for a in answers), 2),
        "kernel_launches": 0 if not failures else None,
        "failures": failures,
    }
