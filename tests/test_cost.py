"""What the planner counts: multiply-adds, bytes, and which nodes are the same for all samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchjac import cost, jacobian
from batchjac.cost import NOMINAL, Work, joined, seconds
from batchjac.graph import Graph, edge_of, prune

F64 = torch.float64
N = 3


def recorded(f: Callable[[Tensor], Tensor], *shape: int) -> Graph:
    x = torch.randn(N, *shape, dtype=F64, requires_grad=True)
    y = f(x)
    edge = edge_of(x)
    assert y.grad_fn is not None
    return prune([y.grad_fn], [(edge.node, edge.output_nr)])


def work(f: Callable[[Tensor], Tensor], *shape: int) -> Work:
    return cost.work(recorded(f, *shape).steps, N)


def frozen(module: nn.Module) -> nn.Module:
    return module.to(F64).requires_grad_(False)


def test_multiply_adds_of_products() -> None:
    assert work(frozen(nn.Linear(5, 7)), 5).products == 35
    assert work(frozen(nn.Linear(5, 7, bias=False)), 5).products == 35
    assert work(frozen(nn.Linear(5, 7)), 4, 5).products == 4 * 35
    assert work(lambda x: x @ x.transpose(1, 2), 4, 5).products == 2 * 4 * 5 * 4
    w = torch.ones(9, 4, dtype=F64)
    assert work(lambda x: w @ x, 4, 5).products == 9 * 4 * 5
    # scores of 6 positions by 6, their sum of values, and both again toward what was multiplied
    attention = work(lambda x: F.scaled_dot_product_attention(x, x, x), 2, 6, 8)
    assert attention.heads == attention.multiply_adds == 4 * 2 * 6 * 6 * 8


def test_multiply_adds_of_convolutions() -> None:
    def both(f: nn.Module, *shape: int) -> float:
        found = work(frozen(f), *shape)
        return found.convolutions + found.thin

    assert both(nn.Conv2d(4, 6, 3), 4, 8, 8) == pytest.approx(6 * 6 * 6 * 4 * 9)
    assert both(nn.Conv2d(4, 6, 3, groups=2), 4, 8, 8) == pytest.approx(6 * 6 * 6 * 2 * 9)
    assert both(nn.ConvTranspose2d(4, 6, 3, 2), 4, 5, 5) == pytest.approx(5 * 5 * 4 * 6 * 9)
    many = work(frozen(nn.Conv1d(64, 64, 3)), 64, 5)
    assert many.thin == 0 < many.convolutions
    few = work(frozen(nn.Conv1d(1, 8, 3)), 1, 5)
    assert few.convolutions == 0 < few.thin


def test_bytes_and_calls() -> None:
    # read and written, and the cosine that is the factor as well
    assert work(torch.sin, 10) == Work(bytes=2 * 2 * 10 * 8, calls=1)
    assert work(lambda x: x + 1, 10) == Work(bytes=2 * 10 * 8)
    assert work(torch.neg, 10) == Work(bytes=2 * 10 * 8, calls=1)
    assert work(lambda x: x.view(N, 2, 5), 10) == Work(calls=1)


def test_views_move_nothing_unless_they_must() -> None:
    # rows arrive with their axes in another order, which a view of other axes cannot keep
    turned = work(lambda x: x.view(N, 2, 6).transpose(1, 2), 12)
    assert turned == Work(copied=2 * 12 * 8, calls=2)
    kept = work(lambda x: x.view(N, 2, 6), 12)
    assert kept.copied == 0
    # one of three: what it was cut from is zero elsewhere, on the way down
    piece = work(lambda x: x[:, 3:7], 12)
    assert piece.filled == 4 * 8 + 12 * 8
    assert piece.bytes == 0
    assert seconds(piece, 5, N, NOMINAL) > seconds(piece, 5, N, NOMINAL, up=True)


def test_pooling_scatters_and_attention_has_scores() -> None:
    pool = work(lambda x: F.max_pool2d(x, 2), 2, 8, 8)
    assert pool.scattered == 2 * 4 * 4
    assert pool.bytes == 2 * 8 * 8 * 8 + 2 * 4 * 4 * (8 + 8)
    few = work(lambda x: F.scaled_dot_product_attention(x, x, x), 2, 6, 8)
    many = work(lambda x: F.scaled_dot_product_attention(x, x, x), 2, 12, 8)
    assert many.heads == 4 * few.heads
    assert many.bytes - 2 * few.bytes == 6 * 8 * (2 * 12 * 12 - 2 * 2 * 6 * 6)
    assert many.copied == 2 * few.copied


@pytest.mark.parametrize(
    "kind", ["products", "convolutions", "thin", "bytes", "calls", "heads", "filled", "copied",
             "scattered"],
)  # fmt: skip
def test_every_kind_of_work_takes_time(kind: str) -> None:
    some = Work(**{kind: 10**9})  # type: ignore[arg-type]
    assert seconds(some, 1, 1, NOMINAL) > 9e-3
    twice = some + some
    assert getattr(twice, kind) == 2 * 10**9
    assert seconds(twice, 1, 1, NOMINAL) == pytest.approx(2 * seconds(some, 1, 1, NOMINAL), rel=0.3)


def test_large_blocks_and_results_take_longer_for_each_byte() -> None:
    one = Work(bytes=2e3, calls=1)
    rates = replace(NOMINAL, call=0.0)
    small, large = seconds(one, 10, 10, rates), seconds(one, 100, 100, rates)
    assert 1.5 * 100 * small < large
    assert cost.written(64 << 20, rates) > 3 * 2 * cost.written(32 << 20, rates)
    assert cost.asked(0, NOMINAL) < cost.asked(100, NOMINAL)


CONSTANT: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "linear": (frozen(nn.Linear(4, 3)), (4,)),
    "a product": (lambda x: x @ torch.ones(4, 2, dtype=F64), (4,)),
    "sums": (lambda x: (x + x.sum(1, keepdim=True) - x.mean(1, keepdim=True)).neg(), (4,)),
    "joined": (lambda x: torch.cat([x, torch.stack([x, x], 1).flatten(1)], 1).clone(), (4,)),
    "padded": (lambda x: F.pad(x, (1, 2)), (4,)),
    "averages": (lambda x: F.adaptive_avg_pool2d(F.avg_pool2d(x, 2), 1), (2, 4, 4)),
    "convolution": (frozen(nn.Conv2d(2, 3, 3)), (2, 4, 4)),
    "casts": (lambda x: x.float().repeat(1, 2), (4,)),
}  # fmt: skip
CHANGING: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "sine": (torch.sin, (4,)),
    "a square": (lambda x: x * x, (4,)),
    "maxima": (lambda x: F.max_pool1d(x, 2), (2, 4)),
    "attention": (lambda x: x @ x.transpose(1, 2), (3, 4)),
    "a factor of its own": (lambda x: x @ x.detach().transpose(1, 2), (3, 4)),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_what_is_said_to_be_constant_is(name: str) -> None:
    f, shape = CONSTANT[name]
    assert all(cost.constant(s) for s in recorded(f, *shape).steps if any(s.edges))
    j = jacobian(f, torch.randn(N, *shape, dtype=F64), mode="reverse")
    assert torch.equal(j, j[:1].expand_as(j))


@pytest.mark.parametrize("name", CHANGING)
def test_what_depends_on_the_sample_is_not(name: str) -> None:
    f, shape = CHANGING[name]
    assert not all(cost.constant(s) for s in recorded(f, *shape).steps if any(s.edges))


def test_seconds_grow_with_rows_and_samples_and_are_never_none() -> None:
    one = Work(products=1e6, bytes=1e4, calls=2)
    assert seconds(Work(calls=3), 1, 1, NOMINAL) == pytest.approx(3 * NOMINAL.call)
    assert seconds(one, 10, 4, NOMINAL) == pytest.approx(seconds(one, 4, 10, NOMINAL))
    assert seconds(one, 20, 4, NOMINAL) > seconds(one, 10, 4, NOMINAL)
    assert joined(9, 9, 9, 99, 2, 4, NOMINAL) < joined(9, 9, 9, 99, 0, 4, NOMINAL)


def test_rates_are_measured_and_plausible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cost.rates.cache_clear()
    found = cost.rates(torch.get_num_threads(), True)
    for name in ("product", "batched", "heads", "convolution", "transposed", "thin"):
        assert 1e5 < getattr(found, name) < 1e15, name
        assert getattr(found, name) != getattr(NOMINAL, name), name
    for name in ("cached", "copied", "scattered", "fresh"):
        assert 1e5 < getattr(found, name) < 1e15, name
        assert getattr(found, name) != getattr(NOMINAL, name), name
    assert found.cached > found.fresh / 10
    assert 0 < found.call < 0.1
    assert math.isfinite(found.call)
    assert cost.rates(torch.get_num_threads(), True) is found
