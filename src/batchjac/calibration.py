"""What this machine was measured to do, kept from process to process.

One small JSON file for each question, machine, torch and number of threads, in the user's cache
folder. It holds numbers alone; one that cannot be read or written is as good as none.
"""

import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

# Other programs, cooling and updates change what a machine does.
FRESH = 24 * 3600.0  # seconds


def remembered(name: str, measure: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """The figures called ``name``: from the last day, else measured now and kept.

    Of an old figure and a new one the larger is taken, since interference only slows what is
    measured; so figures must be rates, and not durations.
    """
    key = f"{name}; {_machine()}"
    path = _folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    found, when = _read(path, key)
    if found and 0 <= time.time() - when < FRESH:
        return found
    measured = measure()
    figures = {k: max(v, found.get(k, v)) for k, v in measured.items()}
    _write(path, {"key": key, "when": time.time(), "figures": figures})
    return figures


def _machine() -> str:
    return (
        f"{platform.node()}, {_processor()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")


def _folder() -> Path:
    """Where the system keeps what can be made again."""
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given) / "batchjac"
    usual = {"darwin": "Library/Caches", "win32": "AppData/Local"}
    try:
        return Path.home() / usual.get(sys.platform, ".cache") / "batchjac"
    except RuntimeError:  # a user without a home
        return Path(os.devnull)


def _read(path: Path, key: str) -> tuple[dict[str, float], float]:
    """The figures of a file and when they were measured; none where it is not such a file."""
    try:
        held = json.loads(path.read_text())
        figures = {str(k): float(v) for k, v in held["figures"].items()}
        usable = held["key"] == key and all(0 < v < math.inf for v in figures.values())
        return (figures, float(held["when"])) if usable else ({}, 0.0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, 0.0


def _write(path: Path, held: Mapping[str, object]) -> None:
    """In one step, so that a process that reads meanwhile finds the old or the new."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(held, indent=1) + "\n")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True) if part.parent.is_dir() else None
