"""``max_memory`` is kept, measured in fresh processes; when memory runs out, chunks are halved."""

from __future__ import annotations

import functools
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import batchjac.job
from batchjac import jacobian, memory
from batchjac.errors import BudgetError
from batchjac.memory import Chunk, Need
from batchjac.testing import jacobian_in_chunks
from tests import resident
from tests.peak import CALLS
from tests.resident import MIB, PLENTY, ROOT, assert_kept, linux
from tests.routes import walk_by

BUDGETS: dict[str, tuple[int, ...]] = dict.fromkeys(CALLS, (64,)) | {
    "conv": (64, 128, 256),
    "mapped": (24, 64),
    "many outputs": (32, 64, 128, 256),
    "many outputs at the first call": (32, 64),
    "transformer": (64, 128, 256),
    "parameters": (64, 128, 256),
    "forward": (32, 64, 128),
    "mixed": (32, 64, 128),
    "mixed past wide cuts": (32, 64, 128),
    "trained": (64, 96, 128),
    "conv, trained": (32, 64, 128),
    "transformer, trained": (64, 128),
}
measured = functools.partial(resident.measured, "tests.peak")


@linux
@pytest.mark.parametrize("name", CALLS)
def test_a_budget_is_kept(name: str) -> None:
    peaks = measured(name, *BUDGETS[name])
    assert_kept(name, BUDGETS[name], peaks)
    for peak in peaks:
        # a call that takes next to nothing would show nothing
        assert peak["peak"] > min(peak["result"], 4 * MIB)


@linux
@pytest.mark.parametrize("name", ["conv", "mapped"])
def test_a_budget_is_what_limits(name: str) -> None:
    """The measurement can fail: with plenty of memory the same call takes more."""
    (free,) = measured(name, PLENTY)
    assert free["peak"] > 2 * min(BUDGETS[name]) * MIB


def test_the_mapped_result_is_larger_than_its_budget() -> None:
    shape = CALLS["mapped"].mapped
    assert shape is not None
    assert np.prod(shape) * 4 > max(BUDGETS["mapped"]) * MIB


def test_a_history_that_does_not_fit_is_refused_before_it_is_made() -> None:
    call = CALLS["with a history"]
    model, x = call.function(), call.inputs()
    options = {**call.options, "coupling": "sum"}  # samples that stay together
    with pytest.raises(BudgetError, match=r"with create_graph=True all .* stays") as caught:
        jacobian(model, x, max_memory="4MiB", **options)
    least = int(re.findall(r"max_memory=(\d+)", str(caught.value))[0])
    with pytest.raises(BudgetError, match=f"max_memory={least}"):
        jacobian(model, x, max_memory=least - 1, **options)
    (peak,) = measured("with a history", -(-least // MIB))
    assert least / 8 < peak["peak"] <= least


def test_a_history_of_one_sample_that_does_not_fit_is_refused() -> None:
    call = CALLS["with a history"]
    model, x = call.function(), call.inputs()
    with pytest.raises(BudgetError, match=r"with create_graph=True all .* of one sample") as caught:
        jacobian(model, x, max_memory="4MiB", **call.options)
    least = int(re.findall(r"max_memory=(\d+)", str(caught.value))[0])
    with pytest.raises(BudgetError, match=f"max_memory={least}"):
        jacobian(model, x, max_memory=least - 16, **call.options)
    assert jacobian(model, x, max_memory=least, **call.options).requires_grad


def test_a_value_that_does_not_fit_is_refused_where_it_is_asked_for() -> None:
    """Kept from chunk to chunk, then joined: twice its size."""
    f, x = nn.Linear(16, 2_000), torch.randn(100, 16)
    jacobian(f, x, outputs=[0], max_memory="1MiB")
    with pytest.raises(BudgetError, match=r"what is kept takes 1\.5 MiB"):
        batchjac.value_and_jacobian(f, x, outputs=[0], max_memory="1MiB")


# The arithmetic of chunks.

needs = st.builds(Need, saved=st.integers(0, 10**9), live=st.integers(1, 10**9))


@given(
    need=needs,
    samples=st.integers(1, 10**6),
    rows=st.integers(1, 10**5),
    allowed=st.integers(1, 10**13),
    result=st.integers(0, 10**12),
    whole=st.booleans(),
)
@settings(max_examples=300)
def test_a_chunk_fits_or_the_least_is_said(
    need: Need, samples: int, rows: int, allowed: int, result: int, whole: bool
) -> None:
    try:
        chunk = memory.chunk(need, samples, rows, allowed, result, whole)
    except BudgetError as error:
        least = int(re.findall(r"max_memory=(\d+)", str(error))[0])
        assert least > allowed
        chunk = memory.chunk(need, samples, rows, least, result, whole)
        with pytest.raises(BudgetError, match="the least"):
            memory.chunk(need, samples, rows, least - 16, result, whole)
        allowed = least
    assert 1 <= chunk.rows <= rows
    assert chunk.samples == samples if whole else 1 <= chunk.samples <= samples
    assert result + chunk.samples * (need.saved + chunk.rows * need.live) <= allowed


def test_rows_are_cut_for_the_cache_before_samples() -> None:
    plenty = 1 << 50
    small = Need(saved=1000, live=1, widest=memory.BLOCK // 100)
    assert memory.chunk(small, 10, 1000, plenty, 0, False) == Chunk(10, 10)
    large = Need(saved=0, live=1, widest=memory.BLOCK // 8)
    assert memory.chunk(large, 10, 2, plenty, 0, False) == Chunk(4, 2)
    assert memory.chunk(large, 10, 2, plenty, 0, True) == Chunk(10, 1)
    assert memory.chunk(large, 10, 1000, plenty, 0, False) == Chunk(1, 8)


def test_the_first_forward_takes_what_is_likely_to_fit() -> None:
    wide, x = nn.Linear(100, 1000), torch.randn(50, 100)
    first = functools.partial(memory.first, [x], wide, 50)
    assert first(1 << 40, True) == 50
    assert first(1 << 20, True) == 2
    assert 2 < first(10 << 20, True) < 50
    assert memory.first([x], None, 50, 1 << 40, True) == 2  # nothing to guess from
    assert memory.first([x], None, 50, 1 << 40, False) == 50
    assert memory.first([x[:1]], wide, 1, 1, True) == 1
    tokens = torch.zeros(50, 100, dtype=torch.int64)
    assert memory.first([tokens], None, 50, 1 << 30, False) < memory.first(
        [x], None, 50, 1 << 30, False
    )


def test_the_first_forward_of_a_large_batch_stays_in_the_cache() -> None:
    plenty = 1 << 40
    narrow, wide = nn.Linear(2, 2), nn.Linear(2, 1024)
    large, small = torch.zeros(4096, 1024), torch.zeros(1 << 16, 2)
    assert memory.first([large], narrow, 4096, plenty, False) == memory.FIRST // 4096
    assert memory.first([small], wide, 1 << 16, plenty, False) == memory.BLOCK // 4096
    assert memory.first([small], narrow, 1 << 16, plenty, False) == 1 << 16
    tokens = torch.zeros(4096, 16, dtype=torch.long)
    assert memory.first([tokens], narrow, 4096, plenty, False) == memory.FIRST_OF_INDEX // 128


def test_free_memory_is_plausible() -> None:
    free = memory.free(torch.device("cpu"))
    assert 0 < free < 1 << 50
    assert memory.budget(None, torch.device("cpu")) == pytest.approx(free / 2, rel=0.2)
    assert memory.budget("1.5 KiB", torch.device("cpu")) == 1536
    assert memory.budget(1e6, torch.device("cpu")) == 10**6


# Running out.


def cpu_allocator() -> Exception:
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 1000000000000 bytes. Error code 12 (Cannot allocate memory)"
    )


FAILURES: dict[str, Callable[[], Exception]] = {
    "python": MemoryError,
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory."),
    "the CPU allocator": cpu_allocator,
}


class Limited(nn.Module):
    """Runs out of memory with more than ``most`` samples, and notes how many came."""

    def __init__(self, most: int, failure: Callable[[], Exception]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.most, self.failure = most, failure
        self.norm = nn.BatchNorm1d(2)
        self.norm.eval()
        Limited.came = []

    came: ClassVar[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        Limited.came.append(len(x))
        if len(x) > self.most:
            raise self.failure()
        y: Tensor = self.norm(self.layers(x))
        return y


@pytest.mark.parametrize("failure", FAILURES)
def test_out_of_memory_halves_the_samples(failure: str, caplog: pytest.LogCaptureFixture) -> None:
    model, x = Limited(5, FAILURES[failure]), torch.randn(16, 3)
    expected = jacobian(model.layers, x)
    scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    with caplog.at_level(logging.WARNING, logger="batchjac"):
        y, j = batchjac.value_and_jacobian(model, x)
    torch.testing.assert_close(j, scale[:, None] * expected)
    model.most = 16
    torch.testing.assert_close(y, model(x).detach())
    # two are tried alone, to see that a sample's value does not depend on how many there are
    assert [n for n in Limited.came[:-1] if n != 2] == [16, 8, 4, 4, 4, 4]
    said = [r.getMessage() for r in caplog.records]
    assert said[0] == "out of memory with 16 samples at a time; trying half"


@pytest.mark.parametrize("wrt", ["inputs", "parameters", "layers.0"])
def test_out_of_memory_keeps_every_kind_of_answer(wrt: str) -> None:
    model, x = Limited(3, MemoryError), torch.randn(10, 3)
    found = jacobian(model, x, wrt=wrt)
    model.most = 10
    torch.testing.assert_close(found, jacobian(model, x, wrt=wrt))


def test_out_of_memory_with_one_sample_says_so() -> None:
    with pytest.raises(BudgetError, match="out of memory with one sample") as caught:
        jacobian(Limited(0, MemoryError), torch.randn(4, 3))
    assert isinstance(caught.value.__cause__, MemoryError)
    assert Limited.came == [4, 2, 1]


def test_the_users_own_runtime_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match=r"^no memory of this$"):
        jacobian(Limited(0, lambda: RuntimeError("no memory of this")), torch.randn(4, 3))
    assert Limited.came == [4]


@pytest.mark.parametrize("coupling", ["error", "full", "frozen", "sum"])
def test_out_of_memory_in_the_walk_halves_samples_or_rows(
    coupling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 8)), torch.randn(6, 3)
    if coupling == "error":
        model.eval()
    expected = jacobian(model, x, coupling=coupling)
    walk, sizes = batchjac.job.walk, []

    def limited(graph: Any, seeds: Any, *rest: Any, **more: Any) -> Any:
        (block,) = seeds.values()
        sizes.append((block.shape[0], block.rows))
        if block.shape[0] * block.rows > 20:
            raise MemoryError
        return walk(graph, seeds, *rest, **more)

    walk_by(monkeypatch, limited)
    found = jacobian(model, x, coupling=coupling)
    torch.testing.assert_close(found, expected)
    samples = {n for n, _ in sizes}
    assert max(n * rows for n, rows in sizes) > 20
    assert (samples == {6}) == (coupling != "error")


FOREVER = 30  # more attempts than halving can make of what is asked here


def spent(fits: int) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    """So many forwards fit; later ones never do, however small. And the samples that each had."""
    came: list[int] = []

    def f(x: Tensor) -> Tensor:
        came.append(len(x))
        if len(came) > FOREVER:
            pytest.fail("the same attempt is made again and again")
        if len(came) > fits:
            raise MemoryError
        return x.repeat(1, 3).sin()

    return f, came


def test_a_later_sample_whose_forward_never_fits_ends_it() -> None:
    """The rows of the walk before say nothing about a forward; fewer of them would not help it."""
    f, came = spent(fits=3)
    with pytest.raises(BudgetError, match="out of memory with one sample"):
        jacobian_in_chunks(f, torch.randn(4, 3), 1, 9)
    # two are taken together once by the probe, and once to see that the first one's value stays
    assert came == [1, 2, 2, 1]


def test_a_whole_batch_whose_second_forward_never_fits_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walk = batchjac.job.walk

    def limited(graph: Any, seeds: Any, *rest: Any, **more: Any) -> Any:
        (block,) = seeds.values()
        if block.rows > 2:
            raise MemoryError
        return walk(graph, seeds, *rest, **more)

    walk_by(monkeypatch, limited)
    f, came = spent(fits=1)
    with pytest.raises(BudgetError, match="out of memory with the whole batch"):
        jacobian(f, torch.randn(4, 3), coupling="sum")
    assert came == [4, 4]


def test_halving_that_makes_nothing_smaller_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should what ran out ever be chosen again, that is an error and no endless loop."""
    walks = []

    def full(graph: Any, *rest: Any, **more: Any) -> Any:
        walks.append(graph)
        if len(walks) > FOREVER:
            pytest.fail("the same attempt is made again and again")
        raise MemoryError

    walk_by(monkeypatch, full)
    # where the next attempt is bounded by the last, the bound is lost
    monkeypatch.setattr(batchjac.solve, "min", lambda chosen, bound: chosen, raising=False)
    with pytest.raises(AssertionError, match="no smaller than the last"):
        jacobian(nn.Linear(3, 8), torch.randn(4, 3), coupling="sum")


LIMIT = """
import resource, sys
import torch
from torch import nn
import batchjac
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 160, 3, padding=1), nn.Tanh(), nn.Conv2d(160, 32, 1),
                      nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 4))
x = torch.randn(256, 3, 32, 32)
expected = batchjac.jacobian(model, x[-4:])
used = int(open("/proc/self/statm").read().split()[0]) * 4096
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (80 << 20), before[1]))
j = batchjac.jacobian(model, x, max_memory="8GiB")  # more than there is
resource.setrlimit(resource.RLIMIT_AS, before)
torch.testing.assert_close(j[-4:], expected)
print(tuple(j.shape))
"""


@linux
def test_a_process_that_may_have_no_more_gets_its_answer() -> None:
    """The allocator itself fails here, as it does when a machine is full."""
    command = [sys.executable, "-c", LIMIT]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "(256, 4, 3, 32, 32)\n"
    assert "out of memory with 85 samples at a time; trying half" in run.stderr
