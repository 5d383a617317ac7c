"""Samples that depend on each other across the border between two chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from batchjac import coupling
from batchjac.errors import CouplingError
from batchjac.testing import jacobian_in_chunks

F64 = torch.float64
Function = Callable[[Tensor], Tensor]


def by_place(place: int) -> Function:
    """The sample at this place of what comes together reads the next, if there is one."""

    def f(x: Tensor) -> Tensor:
        index = torch.arange(len(x))
        if place + 1 < len(x):
            index[place] += 1
        return x.sin() + x[index]

    return f


def by_mark(x: Tensor) -> Tensor:
    """A sample that begins with more than 100 reads the next, if there is one."""
    index = torch.arange(len(x)) + (x[:, 0] > 100)
    return x.sin() + x[index.clamp(max=len(x) - 1)]


def marked(samples: int, *where: int) -> Tensor:
    x = torch.randn(samples, 3, dtype=F64)
    x[list(where), 0] = 101.0
    return x


def test_a_pair_that_a_border_parts() -> None:
    with pytest.raises(CouplingError, match="depends on which other samples"):
        jacobian_in_chunks(by_place(5), marked(12), 6, 3)


@pytest.mark.parametrize("samples", [2, 7, 20, 50])
def test_the_last_sample_of_the_first_chunk(samples: int) -> None:
    with pytest.raises(CouplingError, match="depends on which other samples"):
        jacobian_in_chunks(by_place(samples - 1), marked(5 * samples + 1), samples, 3)


@pytest.mark.parametrize(
    ("samples", "border"), [(2, 1), (10, 1), (40, 1), (40, 2), (40, 4), (64, 3)]
)
def test_a_pair_in_the_data(samples: int, border: int) -> None:
    last = samples * border - 1
    with pytest.raises(CouplingError, match="depends on which other samples"):
        jacobian_in_chunks(by_mark, marked(5 * samples, last), samples, 3)


@pytest.mark.parametrize("samples", [1, 2, 5, 30])
@pytest.mark.parametrize("create_graph", [False, True])
def test_independent_samples_pass(samples: int, create_graph: bool) -> None:
    x = marked(61)
    found = jacobian_in_chunks(by_mark, x, samples, 2, create_graph=create_graph)
    torch.testing.assert_close(found, torch.diag_embed(x.cos() + 1))


@pytest.mark.parametrize("samples", [1, 3, 16])
def test_a_constant_that_depends_on_the_place_passes(samples: int) -> None:
    """Sample k of what comes together gets one more at entry k: no derivative sees it."""

    def f(x: Tensor) -> Tensor:
        y = x.sin()
        y.diagonal().add_(1)
        return y

    x = marked(61)
    torch.testing.assert_close(jacobian_in_chunks(f, x, samples, 2), torch.diag_embed(x.cos()))


def test_random_layers_pass() -> None:
    assert jacobian_in_chunks(nn.Dropout(0.5), marked(61), 8, 3).shape == (61, 3, 3)


@pytest.mark.parametrize(("samples", "rows"), [(1, 3), (4, 1), (16, 3), (100, 1), (300, 3)])
def test_what_it_costs(samples: int, rows: int) -> None:
    """Samples in forwards, beside those of the job with two for each row of a walk."""
    x, seen = marked(600), Counter[str]()

    def f(x: Tensor) -> Tensor:
        seen["samples"] += len(x)
        return (x[:, :rows]).sin()

    jacobian_in_chunks(f, x, samples, rows)
    half = max(2 if samples == 1 else 1, samples // 2)
    job = 600 * (1 + 2 * rows)
    at_once = 2 * coupling.REACH  # the first border, whatever it costs
    assert seen["samples"] - 600 - half <= job / coupling.SHARE + at_once


def test_a_look_across_takes_no_more_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def f(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x.sin()

    looks, seen = coupling.Values.border, list[int]()

    def border(self: coupling.Values, stop: int, last: int, rows: int, most: int) -> None:
        seen.clear()
        looks(self, stop, last, rows, 3)
        assert sum(seen) in (0, 2, 3)
        sizes.extend(seen)

    sizes: list[int] = []
    monkeypatch.setattr(coupling.Values, "border", border)
    jacobian_in_chunks(f, marked(100), 10, 3)
    assert 3 in sizes
    with pytest.raises(CouplingError):
        jacobian_in_chunks(by_mark, marked(100, 9), 10, 3)


def test_memory_that_does_not_suffice_for_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(coupling.Values, "border", fails)
    assert jacobian_in_chunks(torch.sin, marked(10), 4, 3).shape == (10, 3, 3)
