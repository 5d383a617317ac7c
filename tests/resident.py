"""How far the memory of a process rises in a call, and each call in a process of its own.

A module that names calls ends with ``main``, so that ``python -m tests.peak conv 64 128`` prints
one line of JSON for each budget in MiB; a test reads those lines by ``measured``. The parent
imports torch and builds nothing; a child is forked for every budget.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchjac.errors import BatchjacError

ROOT = Path(__file__).parent.parent
MIB = 1 << 20
PLENTY = 16 << 10  # MiB: as if there were no limit
linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)
Measure = Callable[[str, int], dict[str, Any]]
"""Of a call's name and a budget in bytes; what it returns is printed."""


def status(key: str) -> int:
    """Bytes from ``/proc/self/status``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def level(key: str = "VmRSS") -> int:
    """Bytes held now, freed pages given back; the high-water mark starts again from here."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status(key)


class Watched:
    """The most anonymous memory while a block runs: pages of a mapped file can be dropped.

    So can those of torch's libraries, of which a first call touches 17 MiB for the first time.
    """

    def __enter__(self) -> Watched:
        self.peak, self.stop = status("RssAnon"), threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.stop.wait(0.001):
            self.peak = max(self.peak, status("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def in_child(measure: Measure, name: str, budget: int) -> dict[str, Any]:
    """``measure`` in a process that did nothing before; how it ended, if it said nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = measure(name, budget)
        except BatchjacError as error:
            said = {"error": str(error)}
        os.write(writer, json.dumps(said).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    _, code = os.waitpid(child, 0)
    return json.loads(text) if text else {"error": f"the process ended with {code}"}


def main(measure: Measure) -> None:
    """One call under each budget, as the command line names them."""
    torch.set_num_threads(1)
    name, *budgets = sys.argv[1:]
    for mebibytes in budgets:
        print(json.dumps(in_child(measure, name, int(mebibytes) << 20)), flush=True)


def measured(module: str, name: str, *budgets: int) -> list[dict[str, Any]]:
    """What ``module`` measures of one call under each budget in MiB; none may fail."""
    command = [sys.executable, "-m", module, name, *map(str, budgets)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert run.returncode == 0, run.stderr
    peaks = [json.loads(line) for line in run.stdout.splitlines()]
    assert [peak.get("error") for peak in peaks] == [None] * len(budgets), peaks
    return peaks


def assert_kept(name: str, budgets: tuple[int, ...], peaks: list[dict[str, Any]]) -> None:
    """No peak beyond its budget in MiB."""
    for budget, peak in zip(budgets, peaks, strict=True):
        said = f"{name}: {peak['peak'] / MIB:.1f} MiB, allowed {budget}"
        assert peak["peak"] <= budget * MIB, said
