"""An operator keeps its budget, measured in fresh processes, and never holds the rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.peak_operator import CALLS

ROOT = Path(__file__).parent.parent
MIB = 1 << 20
PLENTY = 16 << 10
BUDGETS: dict[str, tuple[int, ...]] = {
    "across": (32, 64), "within": (32, 64), "norm": (144,), "wide": (112,), "inputs": (32, 64),
    "products": (32, 64),
}  # fmt: skip
linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)


def measured(name: str, *budgets: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.peak_operator", name, *map(str, budgets)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert run.returncode == 0, run.stderr
    peaks = [json.loads(line) for line in run.stdout.splitlines()]
    assert [peak.get("error") for peak in peaks] == [None] * len(budgets)
    return peaks


@linux
@pytest.mark.parametrize("name", CALLS)
def test_a_budget_is_kept(name: str) -> None:
    budgets = BUDGETS[name]
    for budget, peak in zip(budgets, measured(name, *budgets), strict=True):
        assert peak["peak"] <= budget * MIB, f"{peak['peak'] / MIB:.1f} MiB, allowed {budget}"
        assert peak["peak"] > 4 * MIB  # a call that takes next to nothing would show nothing


@linux
@pytest.mark.parametrize("name", ["within", "inputs"])
def test_a_budget_is_what_limits(name: str) -> None:
    """The measurement can fail: with plenty of memory the same call takes more."""
    (free,) = measured(name, PLENTY)
    assert free["peak"] > 2 * min(BUDGETS[name]) * MIB


@linux
def test_rows_of_five_million_parameters_are_never_there() -> None:
    """2560 rows of them would be 45 GiB."""
    (free,) = measured("norm", PLENTY)
    assert free["rows"] > 200 * free["peak"]
