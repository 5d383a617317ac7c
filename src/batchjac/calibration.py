"""What this machine was measured to do, kept from process to process.

Small JSON files for each machine, torch and number of threads, in the user's cache folder: one for
each set of rates, and one for the names of the kernels that won. They hold numbers and names
alone; one that cannot be read or written is as good as none.
"""

import contextlib
import functools
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

FORMAT = 3  # of a file; another number where figures get another meaning
# Other programs, cooling and updates change what a machine does.
FRESH = 24 * 3600.0  # seconds


# A first measurement is good for a minute, each further one for ten times as long: one that other
# programs disturbed, which may be off by a hundred where threads wait for each other, is soon
# outdone. Source: two threads on two cores beside another program on both.
FIRST, LONGER = 60.0, 10  # seconds, times
# Choices in the file; the oldest go first. A network has some tens of different layers.
MOST = 500


def remembered(name: str, measure: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """The figures called ``name``: measured lately, from a minute to a day, else now and kept.

    Of an old figure and a new one the larger is taken, since interference only slows what is
    measured; so figures must be rates, and not durations.
    """
    key, path = _place(name)
    found, when, runs = _read(path, key)
    if found and _is_fresh(when, min(FRESH, FIRST * LONGER ** (runs - 1))):
        return found
    measured = measure()
    figures = {k: max(v, found.get(k, v)) for k, v in measured.items()}
    _write(path, {"key": key, "when": time.time(), "runs": runs + 1, "figures": figures})
    return figures


def recalled(question: str) -> str | None:
    """What was chosen for this question on the last day, by this process or another."""
    key, path = _place("choices")
    answer, when = _choices(key, path).get(question, ("", 0.0))
    return answer if _is_fresh(when) else None


def choices(start: str) -> dict[str, str]:
    """All questions of the last day that start so, and their answers."""
    held = _choices(*_place("choices")).items()
    return {q: answer for q, (answer, when) in held if q.startswith(start) and _is_fresh(when)}


def _is_fresh(when: float, good_for: float = FRESH) -> bool:
    return 0 <= time.time() - when < good_for


def note(question: str, answer: str) -> None:
    """Keep a choice for this process and the next; also what others have kept meanwhile."""
    key, path = _place("choices")
    held = _choices(key, path)
    for asked, other in _read_choices(path, key).items():  # the later one, whoever made it
        held[asked] = max(held.get(asked, other), other, key=lambda choice: choice[1])
    held[question] = (answer, time.time())
    for old in sorted(held, key=lambda q: held[q][1])[:-MOST]:
        del held[old]
    _write(path, {"key": key, "choices": held})


@functools.lru_cache(maxsize=8)  # a few numbers of threads
def _choices(key: str, path: Path) -> dict[str, tuple[str, float]]:
    """The choices of a file, read once in a process, and what this one adds to them."""
    return _read_choices(path, key)


def _place(name: str) -> tuple[str, Path]:
    """What a file is about, and where it is."""
    key = f"{name} {FORMAT}; {_machine()}"
    return key, folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _machine() -> str:
    return (
        f"{platform.node()}, {_processor()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")


def folder() -> Path:
    """Where the system keeps what can be made again."""
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given) / "batchjac"
    usual = {"darwin": "Library/Caches", "win32": "AppData/Local"}
    try:
        return Path.home() / usual.get(sys.platform, ".cache") / "batchjac"
    except RuntimeError:  # a user without a home
        return Path(os.devnull)


# What a file that is missing, or is something else, may lead to.
_NO_SUCH_FILE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError,
)  # fmt: skip


def _read(path: Path, key: str) -> tuple[dict[str, float], float, int]:
    """The figures of a file, when they were measured and how often; none where it is no such."""
    try:
        held = json.loads(path.read_text())
        figures = {str(k): float(v) for k, v in held["figures"].items()}
        runs = min(max(int(held.get("runs", 1)), 1), 9)
        usable = held["key"] == key and all(0 < v < math.inf for v in figures.values())
        return (figures, float(held["when"]), runs) if usable else ({}, 0.0, 0)
    except _NO_SUCH_FILE:
        return {}, 0.0, 0


def _read_choices(path: Path, key: str) -> dict[str, tuple[str, float]]:
    """The choices of a file and when they were made; none where it is not such a file."""
    try:
        held = json.loads(path.read_text())
        found = {str(q): (answer, float(when)) for q, (answer, when) in held["choices"].items()}
        usable = held["key"] == key and all(type(answer) is str for answer, _ in found.values())
        return found if usable else {}
    except _NO_SUCH_FILE:
        return {}


def _write(path: Path, held: Mapping[str, object]) -> None:
    """In one step, so that a process that reads meanwhile finds the old or the new."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(held, indent=1) + "\n")
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
