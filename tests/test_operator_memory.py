"""An operator keeps its budget, measured in fresh processes, and never holds the rows."""

from __future__ import annotations

import functools

import pytest

from tests import resident
from tests.peak_operator import CALLS
from tests.resident import MIB, PLENTY, assert_kept, linux

BUDGETS: dict[str, tuple[int, ...]] = {
    "across": (32, 64), "within": (32, 64), "norm": (144,), "wide": (112,), "inputs": (32, 64),
    "products": (32, 64),
}  # fmt: skip
measured = functools.partial(resident.measured, "tests.peak_operator")


@linux
@pytest.mark.parametrize("name", CALLS)
def test_a_budget_is_kept(name: str) -> None:
    peaks = measured(name, *BUDGETS[name])
    assert_kept(name, BUDGETS[name], peaks)
    for peak in peaks:
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
