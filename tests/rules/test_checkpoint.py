"""Reentrant checkpoints: what they hide is run again once and walked through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchjac
from batchjac.block import Block
from batchjac.engines.checkpoint import is_reentrant
from batchjac.engines.sweep import Kernels, walk
from batchjac.errors import UnsupportedError
from batchjac.graph import edge_of, prune
from tests.rules.common import Case

F64 = torch.float64
CASES: list[Case] = []  # the walk does this itself: no rule, no law of a rule


class Block3(nn.Module):
    """Three layers, of which the middle one counts its runs."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Dropout(dropout), nn.Tanh(), nn.Linear(4, 3))
        self.runs: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(len(x))
        return self.body(x)


def walked(y: Tensor, x: Tensor, cotangents: Tensor, kernels: Kernels) -> Tensor:
    edge = edge_of(x)
    slot = (edge.node, edge.output_nr)
    assert y.grad_fn is not None
    seeds = {(y.grad_fn, y.output_nr): Block(cotangents, tuple(y.shape))}
    return walk(prune([y.grad_fn], [slot]), seeds, kernels)[slot].full()


def rows(y: Tensor, x: Tensor, count: int = 4) -> tuple[Tensor, Tensor, Kernels]:
    """Random rows through the walk, and the same rows by ``backward`` into the leaf."""
    cotangents = torch.randn(count, *y.shape, dtype=y.dtype)
    kernels = Kernels()
    found = walked(y, x, cotangents, kernels)
    want = []
    for c in cotangents:
        x.grad = None
        y.backward(c, retain_graph=True)
        assert x.grad is not None
        want.append(x.grad)
    return found, torch.stack(want), kernels


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=True)


def reentrant(function: Any, *args: Any, **options: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=True, **options)


def test_all_rows_run_the_function_again_once():
    block, x = Block3().double(), leaf(5, 3)
    y = reentrant(block, x * 2).sin()
    block.runs.clear()
    found, want, kernels = rows(y, x)
    assert block.runs == [5] * 5  # once for the walk, once for each of four backwards
    assert kernels.ways["CheckpointFunctionBackward"] == "rule"
    torch.testing.assert_close(found, want)


def test_the_same_dropout_mask_and_the_random_state_left_as_found():
    block, x = Block3(dropout=0.5).double(), leaf(5, 3)
    y = reentrant(block, x * 2)
    torch.rand(3)  # the state moves on between forward and walk
    found, want, _ = rows(y, x)
    torch.testing.assert_close(found, want)
    torch.rand(3)
    before = torch.get_rng_state()
    walked(y, x, torch.ones(1, 5, 3, dtype=F64), Kernels())
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_as_in_the_forward():
    layer, dtypes = nn.Linear(3, 3), []

    def function(h: Tensor) -> Tensor:
        h = layer(h)
        dtypes.append(h.dtype)
        return h

    x = torch.randn(5, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = reentrant(function, x * 2)
    found, want, _ = rows(y, x)
    torch.testing.assert_close(found, want, rtol=0.05, atol=0.05)
    assert set(dtypes) == {torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        y = reentrant(function, x * 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        walked(y, x, torch.ones(1, 5, 3), Kernels())
    assert dtypes[-1] == torch.float32


def test_several_inputs_and_outputs():
    def function(a: Tensor, power: int, b: Tensor, c: Tensor) -> tuple[Tensor, Any, Tensor, Tensor]:
        y = a**power * b
        return y, "a word", b.sin() + c, y

    x, constant = leaf(4, 3), torch.randn(4, 3, dtype=F64)
    first, _, second, third = reentrant(function, x * 2, 3, x.cos(), constant)
    for y in (first + second * third, second.sin(), first * 1):
        found, want, _ = rows(y, x)
        torch.testing.assert_close(found, want)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_checkpoint_in_a_checkpoint():
    inner, outer, x = Block3().double(), Block3().double(), leaf(4, 3)
    y = reentrant(lambda h: outer(reentrant(inner, h.sin())), x * 2)
    inner.runs.clear()
    found, want, _ = rows(y, x)
    torch.testing.assert_close(found, want)
    assert len(inner.runs) == 2 + 4 * 2


def test_an_input_handed_on_unchanged():
    x = leaf(4, 3)
    y = reentrant(lambda h, k: (h, h * k), x * 2, x + 1)
    found, want, _ = rows(y[0] * y[1], x)
    torch.testing.assert_close(found, want)


def test_the_jacobian_through_a_checkpoint():
    block, head = Block3().double(), nn.Linear(3, 2).double()
    x = torch.randn(5, 3, dtype=F64)
    kept = batchjac.jacobian(lambda z: head(block(z * 2)), x)
    torch.testing.assert_close(batchjac.jacobian(lambda z: head(reentrant(block, z * 2)), x), kept)


def test_differentiating_twice_names_the_remedy():
    block, x = Block3().double(), torch.randn(5, 3, dtype=F64)
    with pytest.raises(UnsupportedError, match=r"create_graph=True.*use_reentrant=False"):
        batchjac.jacobian(lambda z: reentrant(block, z * 2), x, create_graph=True)


def test_a_target_inside_names_the_remedy():
    x = leaf(4, 3)
    y = reentrant(lambda h: h * x, x * 2)  # x is an argument and in the closure
    edge = edge_of(x)
    graph = prune([y.grad_fn], [(edge.node, edge.output_nr)])
    seed = {(y.grad_fn, 0): Block(torch.randn(2, 4, 3, dtype=F64), (4, 3))}
    with pytest.raises(UnsupportedError, match="inside a reentrant checkpoint"):
        walk(graph, seed, Kernels())


def test_only_pytorchs_own_checkpoint_is_taken_for_one():
    class CheckpointFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> Tensor:
            return g[0] * 2

    x = leaf(4, 3)
    y = CheckpointFunction.apply(x)
    edge = edge_of(x)
    (step, _) = prune([y.grad_fn], [(edge.node, edge.output_nr)]).steps
    assert step.name == "CheckpointFunctionBackward"
    assert not is_reentrant(step)
    found, want, _ = rows(y, x)
    torch.testing.assert_close(found, want)
