"""What people train with around a loss of the Jacobian, beside nested autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import clip_grad_norm_, parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from batchjac import jacobian
from tests.common import batch, close

pytestmark = pytest.mark.usefixtures("float64")
Jacobian = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def ours(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    j: Tensor = jacobian(f, x, create_graph=True)
    return j


def in_chunks(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What leads to J is computed again in the backward pass, some samples at a time."""
    j: Tensor = jacobian(f, x, create_graph=True, max_memory=9_500 + 400 * len(x))
    return j


def nested(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Row by row, for all samples at once."""
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    y = f(x)
    rows = [torch.autograd.grad(y[:, o].sum(), x, create_graph=True)[0] for o in range(y.shape[1])]
    return torch.stack(rows, 1)


def loss_of(j: Tensor) -> Tensor:
    """One in which every entry of J counts, each otherwise, and none linearly."""
    weights = torch.arange(1.0, 1 + j[0].numel(), dtype=j.dtype).view(j.shape[1:])
    return (weights * j.square()).sum((1, 2)).add(1).log().mean() + torch.linalg.det(j).mean()


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3))


def gradients(model: nn.Module, x: Tensor, way: Jacobian) -> list[Tensor | None]:
    return list(
        torch.autograd.grad(loss_of(way(model, x)), list(model.parameters()), allow_unused=True)
    )


def same_gradients(model: nn.Module, x: Tensor) -> None:
    """Of copies: some modules move a buffer at every forward."""
    expected = gradients(copy.deepcopy(model), x, nested)
    assert any(e is not None and e.abs().max() > 1e-3 for e in expected)
    for way in (ours, in_chunks):
        close(gradients(copy.deepcopy(model), x, way), expected)


def test_chunks_are_computed_again() -> None:
    """The budget of `in_chunks` is small enough for the tests below to be of it."""
    model, x, calls = network(), batch(), []

    def f(part: Tensor) -> Tensor:
        calls.append(len(part))
        y: Tensor = model(part)
        return y

    loss = loss_of(in_chunks(f, x))
    before = len(calls)
    loss.backward()
    assert max(calls[-2:]) < len(x)
    assert len(calls) > before


# optimisers, plain loops

OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.02),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"),
}


def trained(name: str, way: Jacobian, clip: float | None) -> tuple[list[Tensor], list[float]]:
    """Parameters after five steps, and the loss at every evaluation."""
    model, losses = network(), []
    optimizer = OPTIMISERS[name](model.parameters())
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(2))

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(way(model, x))
        loss.backward()
        if clip is not None:
            norm = clip_grad_norm_(model.parameters(), clip, error_if_nonfinite=True)
            assert norm > clip
        losses.append(loss.item())
        return losses[-1]

    for _ in range(5):
        optimizer.step(closure)
    return [p.detach() for p in model.parameters()], losses


@pytest.mark.parametrize("way", [ours, in_chunks])
@pytest.mark.parametrize("clip", [None, 1e-3], ids=["", "clipped"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_takes_the_same_steps(name: str, clip: float | None, way: Jacobian) -> None:
    found, losses = trained(name, way, clip)
    expected, _ = trained(name, nested, clip)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)  # Adam divides by small moments
    assert losses[-1] < losses[0]


def test_gradients_add_up_over_small_batches() -> None:
    model, x = network(), torch.randn(12, 3)
    for part in x.split(4):
        (loss_of(ours(model, part)) / 3).backward()
    close([p.grad for p in model.parameters()], gradients(model, x, nested))


def test_an_average_of_the_weights_can_be_differentiated_too() -> None:
    model, x = network(), torch.randn(12, 3)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(ours(model, x)).backward()
        optimizer.step()
        average.update_parameters(model)
    assert average.n_averaged == 3
    close(jacobian(average, x), nested(average, x).detach())
    same_gradients(average, x)


# parametrisations


def spectral() -> nn.Module:
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(3, 8)), nn.Tanh(),
        parametrizations.spectral_norm(nn.Linear(8, 3), n_power_iterations=2),
    )  # fmt: skip


def orthogonal() -> nn.Module:
    return nn.Sequential(
        parametrizations.orthogonal(nn.Linear(3, 8)), nn.Tanh(),
        parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map="cayley"), nn.Tanh(),
        parametrizations.orthogonal(nn.Linear(8, 3), orthogonal_map="matrix_exp"),
    )  # fmt: skip


def weight() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 8)), nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(8, 3), dim=1),
    )  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("build", [spectral, orthogonal, weight])
def test_parametrised_weights(build: Callable[[], nn.Module], training: bool) -> None:
    model = build().train(training)
    same_gradients(model, batch())


@pytest.mark.parametrize("ways", [(ours, nested), (nested, ours)], ids=["ours first", "last"])
@pytest.mark.parametrize("build", [spectral, orthogonal, weight])
def test_parametrised_weights_that_are_cached(
    build: Callable[[], nn.Module], ways: tuple[Jacobian, Jacobian]
) -> None:
    """The weights are computed once, in whichever call comes first, and shared with the other."""
    model, x = build(), batch()
    with nn.utils.parametrize.cached():
        first, second = (loss_of(way(model, x)) for way in ways)
    parameters = list(model.parameters())
    close(
        torch.autograd.grad(first, parameters, retain_graph=True, allow_unused=True),
        torch.autograd.grad(second, parameters, allow_unused=True),
    )


def test_power_iterations_go_on_beside_a_jacobian() -> None:
    """A call leaves buffers as they were; the forward of the training itself moves them."""
    model, x = spectral().train(), batch()
    before = copy.deepcopy(model.state_dict())
    loss_of(ours(model, x)).backward()
    close(model.state_dict(), before)
    model(x)
    assert not torch.equal(next(model.buffers()), before[next(iter(dict(model.named_buffers())))])


@pytest.mark.parametrize("named", [True, False], ids=["module", "function"])
def test_every_chunk_begins_with_the_same_buffers(named: bool) -> None:
    """A power iteration that has not converged moves the weights at every forward."""
    model, x, sizes = spectral().train(), torch.randn(50, 3), []
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))

    def f(part: Tensor) -> Tensor:
        sizes.append(len(part))
        y: Tensor = model(part)
        return y

    expected = nested(copy.deepcopy(model), x)
    found = jacobian(model if named else f, x, create_graph=True, max_memory=40_000)
    close(found, expected)
    assert named or max(sizes) < len(x)
    weights = [p for n, p in model.named_parameters() if n != "2.bias"]  # J does not know it
    begun = copy.deepcopy(model)
    truth = [p for n, p in begun.named_parameters() if n != "2.bias"]
    close(
        torch.autograd.grad(loss_of(found), weights),
        torch.autograd.grad(loss_of(nested(begun, x)), truth),
    )


# parameters that are passed in


def call(model: nn.Module, parameters: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        y: Tensor = functional_call(model, parameters, (x,))
        return y

    return f


@pytest.mark.parametrize("way", [ours, in_chunks])
@pytest.mark.parametrize("steps", [1, 2])
def test_through_the_steps_of_an_inner_training(steps: int, way: Jacobian) -> None:
    """Finn et al., 2017: the gradient of an outer loss goes through the inner steps."""
    model, inner, outer = network(), batch(), batch()

    def meta(way: Jacobian) -> tuple[Tensor, ...]:
        names, values = zip(*model.named_parameters(), strict=True)
        begun = values
        for _ in range(steps):
            loss = loss_of(way(call(model, dict(zip(names, values, strict=True))), inner))
            slopes = torch.autograd.grad(loss, values, create_graph=True, materialize_grads=True)
            values = tuple(v - 0.1 * s for v, s in zip(values, slopes, strict=True))
        loss = loss_of(way(call(model, dict(zip(names, values, strict=True))), outer))
        return torch.autograd.grad(loss, begun, materialize_grads=True)

    found, expected = meta(way), meta(nested)
    assert max(e.abs().max() for e in expected) > 1e-2
    close(found, expected)


def test_parameters_made_by_another_network() -> None:
    """A hypernetwork: the weights are outputs, and gradients reach what made them."""
    maker, model, x = nn.Linear(2, 3 * 3 + 3), nn.Linear(3, 3), batch()

    def found(way: Jacobian) -> Any:
        made = maker(torch.tensor([0.3, -0.7])).tanh()
        parameters = {"weight": made[:9].view(3, 3), "bias": made[9:]}
        f = call(model, parameters)
        return torch.autograd.grad(loss_of(way(lambda t: f(t).sin(), x)), list(maker.parameters()))

    close(found(ours), found(nested))
    close(found(in_chunks), found(nested))


def test_by_the_parameters_of_a_call() -> None:
    """``wrt`` names a module's parameters; those of a call are inputs, the same for all samples."""
    model, x = network(), batch()
    parameters = {k: p.detach().expand(len(x), *p.shape) for k, p in model.named_parameters()}

    def each(x: Tensor, **own: Tensor) -> Tensor:
        y: Tensor = torch.func.vmap(lambda p, s: functional_call(model, p, (s,)))(own, x)
        return y

    found = jacobian(each, {"x": x, **parameters})
    named = jacobian(model, x, wrt="parameters")
    assert named.keys() == parameters.keys()
    close({k: found[k] for k in named}, dict(named))


# compiled, and in lower precision


def test_a_compiled_module() -> None:
    model, x = network(), batch()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    close(gradients(compiled, x, ours), gradients(model, x, nested))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype) -> None:
    """The same products in the same precision: rounding is all that may differ."""
    model, x = network().float(), batch().float()
    weights = [p for p in model.parameters() if p is not model[-1].bias]  # J does not know it
    with torch.autocast("cpu", dtype=dtype):
        jacobians = [ours(model, x), nested(model, x)]
    jacobians.append(nested(model, x))
    found, rounded, exact = (
        torch.autograd.grad(j.square().add(1).log().mean(), weights) for j in jacobians
    )
    for a, b, truth in zip(found, rounded, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - truth).norm() <= 2 * (b - truth).norm() + 0.01 * truth.norm()
