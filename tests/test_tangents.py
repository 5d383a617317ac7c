"""The walk forwards: whole models against the specification, and what it keeps and refuses."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchjac.block import Block
from batchjac.engines import forward, reference
from batchjac.engines.forward import NoForwardRule, forward_ready, tangents
from batchjac.engines.sweep import Kernels, walk
from batchjac.graph import Graph, Slot, edge_of, prune

F64 = torch.float64


class Residual(nn.Module):
    """Convolutions with batch norm, a shortcut, and global pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.shortcut = nn.Conv2d(2, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x).relu_()) + self.shortcut(x)
        return self.head(h.relu().mean((2, 3)))


class Recurrent(nn.Module):
    """The last state of a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0][:, -1]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 4))


def lenet5() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.Softmax(1),
    )  # fmt: skip


def signals() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(3, 4, 3), nn.ReLU(),
        nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def decoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(2, 8), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 3, 3, stride=2),
        nn.GroupNorm(1, 3), nn.SiLU(), nn.Upsample(scale_factor=2, mode="bilinear"),
    )  # fmt: skip


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (3, 5)),
    "lenet5": (lenet5, (2, 1, 12, 12)),
    "signals": (signals, (3, 1, 12)),
    "residual": (Residual, (2, 2, 5, 5)),
    "decoder": (decoder, (2, 2)),
    "encoder": (encoder, (2, 4, 6)),
    "recurrent": (Recurrent, (3, 4, 3)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build().double().train(name == "encoder")  # in evaluation it has a fused path
    return model, torch.randn(shape, dtype=F64)


def recorded(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Graph, Slot, Slot]:
    """The output, the graph, and the slots of input and output."""
    x = x.detach().requires_grad_()
    y = f(x)
    assert y.grad_fn is not None
    edge = edge_of(x)
    slot = (edge.node, edge.output_nr)
    return y, prune([y.grad_fn], [slot]), slot, (y.grad_fn, y.output_nr)


def identity(shape: tuple[int, ...], dtype: torch.dtype = F64) -> Block:
    """One row for each entry of a sample, the same for all samples."""
    size = math.prod(shape[1:])
    return Block(torch.eye(size, dtype=dtype).reshape(size, 1, *shape[1:]), shape)


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor, create_graph: bool = False) -> Tensor:
    y, graph, slot, root = recorded(f, x)
    assert forward_ready(graph) is None
    seeds = {slot: identity(tuple(x.shape), x.dtype)}
    found = tangents(graph, seeds, root, create_graph=create_graph)
    assert found is not None
    assert found.data.dtype == y.dtype
    return found.full().movedim(0, -1).reshape(*y.shape, *x.shape[1:])


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_specification(name: str):
    model, x = made(name)
    torch.testing.assert_close(
        jacobian(model, x), reference.jacobian(model, x), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("name", MODELS)
def test_transposes_the_walk(name: str):
    """``<u, J t> = <J^T u, t>`` for a few random rows of both."""
    model, x = made(name)
    y, graph, slot, root = recorded(model, x)
    t, u = (Block(torch.randn(3, *z.shape, dtype=F64), tuple(z.shape)) for z in (x, y))
    pushed = tangents(graph, {slot: t}, root)
    pulled = walk(graph, {root: u}, Kernels())[slot]
    assert pushed is not None
    left = torch.einsum("an,bn->ab", u.data.flatten(1), pushed.full().flatten(1))
    right = torch.einsum("an,bn->ab", pulled.full().flatten(1), t.data.flatten(1))
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "lenet5", "residual", "decoder", "recurrent"])
def test_a_gradient_of_the_tangents_is_that_of_the_specification(name: str):
    model, x = made(name)
    found = jacobian(model, x, create_graph=True)
    want = reference.jacobian(model, x, create_graph=True)
    weight = torch.randn_like(want)
    parameters = list(model.parameters())
    first, second = (
        torch.autograd.grad(j, parameters, weight, allow_unused=True) for j in (found, want)
    )
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_without_create_graph_nothing_is_recorded():
    model, x = made("mlp")
    assert not jacobian(model, x).requires_grad


def test_an_inner_tensor_counts_as_independent_of_what_it_came_from():
    """Both the input and an inner tensor are targets of one graph; each is seeded by itself."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    h = (x * 2).sin()
    y = (h * x).exp() + x
    edges = [edge_of(x), edge_of(h)]
    assert y.grad_fn is not None
    graph = prune([y.grad_fn], [(e.node, e.output_nr) for e in edges])
    for tensor, edge in zip((x, h), edges, strict=True):
        seed = identity(tuple(tensor.shape))
        found = tangents(graph, {(edge.node, edge.output_nr): seed}, (y.grad_fn, y.output_nr))
        assert found is not None
        (want,) = torch.autograd.grad(y.sum(), tensor, retain_graph=True)
        slope = found.full().movedim(0, -1).diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(slope, want)


def test_an_output_may_be_the_seed_or_not_depend_on_it():
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    z = torch.randn(2, 3, dtype=F64, requires_grad=True)
    h, other = x.sin(), z.cos()
    edges = [edge_of(t) for t in (x, z)]
    assert h.grad_fn is not None
    assert other.grad_fn is not None
    graph = prune([h.grad_fn, other.grad_fn], [(e.node, e.output_nr) for e in edges])
    seed = identity((2, 3))
    root = (h.grad_fn, h.output_nr)
    assert tangents(graph, {root: seed}, root) is seed
    assert tangents(graph, {(edges[1].node, edges[1].output_nr): seed}, root) is None


def test_one_seed_at_a_time():
    model, x = made("mlp")
    _, graph, slot, root = recorded(model, x)
    seed = identity(tuple(x.shape))
    with pytest.raises(ValueError, match="expected 1"):
        tangents(graph, {slot: seed, root: seed}, root)
    with pytest.raises(ValueError, match="expected 1"):
        tangents(graph, {}, root)


def test_tangents_that_no_later_step_reads_are_freed(monkeypatch: pytest.MonkeyPatch):
    def chain(x: Tensor) -> Tensor:
        for _ in range(6):
            x = x.sin()
        return x

    made_here: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    usual = forward.through

    def watched(step: Any, blocks: Any) -> Any:
        gc.collect()
        alive.append(sum(r() is not None for r in made_here))
        found = usual(step, blocks)
        made_here.extend(weakref.ref(b.data) for b in found)
        return found

    monkeypatch.setattr(forward, "through", watched)
    jacobian(chain, torch.randn(2, 3, dtype=F64))
    assert alive == [0, 1, 1, 1, 1, 1]


def test_only_what_leads_to_the_root_is_computed(monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    y, other = x.sin(), x.cos().cumprod(1)
    edge = edge_of(x)
    assert y.grad_fn is not None
    assert other.grad_fn is not None
    graph = prune([y.grad_fn, other.grad_fn], [(edge.node, edge.output_nr)])
    assert forward_ready(graph) == "CumprodBackward0"
    seeds = {(edge.node, edge.output_nr): identity((2, 3))}
    assert tangents(graph, seeds, (y.grad_fn, y.output_nr)) is not None
    with pytest.raises(NoForwardRule, match="CumprodBackward0"):
        tangents(graph, seeds, (other.grad_fn, other.output_nr))


class Cube(torch.autograd.Function):
    """A user's own function: nothing is known of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * g * x**2


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda x: Cube.apply(x.sin()), "CubeBackward"),
        (lambda x: torch.fft.fft(x).abs(), "AbsBackward0"),
        (lambda x: x.cumprod(1).sum(1, keepdim=True), "CumprodBackward0"),
    ],
)
def test_names_the_first_node_without_a_rule(f: Callable[[Tensor], Tensor], name: str):
    _, graph, slot, root = recorded(f, torch.randn(2, 3, dtype=F64))
    assert forward_ready(graph) == name
    with pytest.raises(NoForwardRule):
        tangents(graph, {slot: identity((2, 3))}, root)


def test_a_rule_that_declines_is_named():
    _, graph, slot, root = recorded(
        lambda x: nn.functional.mse_loss(x, torch.zeros_like(x)), torch.randn(2, 3, dtype=F64)
    )
    assert forward_ready(graph) is None
    with pytest.raises(NoForwardRule, match="MseLossBackward0"):
        tangents(graph, {slot: identity((2, 3))}, root)


def test_infinite_slopes_are_left_to_the_walk():
    """Forward a zero direction meets the slope inf of ``sqrt`` at 0; in reverse none does."""
    _, graph, slot, root = recorded(lambda x: x.sqrt(), torch.tensor([[0.0, 1.0]], dtype=F64))
    with pytest.raises(NoForwardRule, match="not finite"):
        tangents(graph, {slot: identity((1, 2))}, root)


def test_autocast_casts_tangents_as_it_casts_activations():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(3, 5)

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = model(x)
        return y

    found = jacobian(cast, x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), reference.jacobian(model, x), rtol=0.05, atol=0.02)


def test_large_single_precision_products_take_the_calibrated_kernel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64))
    x = torch.randn(32, 16)
    torch.testing.assert_close(
        jacobian(model, x), torch.func.vmap(torch.func.jacrev(model))(x), rtol=1e-4, atol=1e-5
    )


def test_writing_in_place_is_followed():
    def f(x: Tensor) -> Tensor:
        h = x * 2
        h.mul_(x).add_(x.sin())
        h = h.clone()
        h.copy_(h.exp() + x)
        return h.relu_()

    x = torch.randn(3, 4, dtype=F64)
    torch.testing.assert_close(jacobian(f, x), reference.jacobian(f, x))
