"""Chunks that are computed again in the backward pass, beside one history held whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchjac import jacobian, value_and_jacobian
from batchjac.errors import BudgetError, CouplingError, StateError
from batchjac.problem import Problem, pose
from batchjac.recompute import recomputed
from tests.common import batch, close, mlp
from tests.two_processes import data
from tests.zoo.registry import default_dtype

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # compiling and forward mode load scripts of torch's own that warn about their age
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def asked(f: Any, x: Any, **options: Any) -> Problem:
    usual = {
        "wrt": None, "of": None, "outputs": None, "mode": "auto", "coupling": "error",
        "create_graph": True, "batched": True,
    }  # fmt: skip
    return pose(f, x, **(usual | options))


def again(f: Any, x: Any, samples: int = 2, **options: Any) -> Tensor:
    """The Jacobian in chunks that are computed again."""
    (j,) = recomputed(
        asked(f, x, **options), lambda solution, _: [solution.jacobian], None, fixed=samples
    )
    return j


def gradients(j: Tensor, goals: Sequence[Tensor]) -> list[Tensor | None]:
    loss = j.square().sum() + j.flatten(1).prod(1).sum()
    return list(torch.autograd.grad(loss, goals, create_graph=True, allow_unused=True))


def same_gradients(ours: Tensor, theirs: Tensor, goals: Sequence[Tensor]) -> None:
    """Equal, first gradients and second."""
    close(ours.detach(), theirs.detach())
    first = [gradients(j, goals) for j in (ours, theirs)]
    close(*first)
    second = [
        torch.autograd.grad(
            sum(g.square().sum() for g in found if g is not None), goals, allow_unused=True,
            retain_graph=True,
        )
        for found in first
    ]  # fmt: skip
    close(*second)


class Product(torch.autograd.Function):
    """Reads a tensor past torch's own functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return cotangents[0] @ w.T, x.T @ cotangents[0]


def captured(kind: str) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """A function and what it captured, among it a tensor that was computed before."""
    model, leaf = mlp(), torch.randn(3, 3, requires_grad=True)
    made = 2 * leaf
    functions = {
        "module": model,
        "closure": lambda x: model(x @ made) * leaf.sum(),
        "custom": lambda x: model(Product.apply(x, made).sin() + leaf[0]),
    }
    return functions[kind], [leaf, *model.parameters()]


@pytest.mark.parametrize("source", ["leaf", "result", "constant"])
@pytest.mark.parametrize("kind", ["module", "closure", "custom"])
def test_gradients_and_second_gradients(
    kind: str, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    f, goals = captured(kind)
    before = nn.Linear(2, 3)
    leaf = batch().requires_grad_()
    x = {"leaf": leaf, "result": before(batch(2)), "constant": batch()}[source]
    goals += [leaf, *before.parameters()]
    same_gradients(again(f, x), jacobian(f, x, create_graph=True), goals)
    assert not caplog.records  # no walk failed in the middle of autograd's own


def test_a_budget_that_does_not_hold_the_history() -> None:
    model, x = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)), torch.randn(64, 16)
    whole = value_and_jacobian(model, x, create_graph=True)
    chunked = value_and_jacobian(model, x, create_graph=True, max_memory="1MiB")
    assert chunked[1].grad_fn.name() == "_RecomputedBackward"
    assert chunked[0].grad_fn is chunked[1].grad_fn
    close(chunked, whole)
    goals = list(model.parameters())
    found = [
        torch.autograd.grad(j.square().sum() + y.pow(3).sum(), goals) for y, j in (chunked, whole)
    ]
    close(*found)
    with pytest.raises(BudgetError, match="of one sample"):
        jacobian(model, x, create_graph=True, max_memory="100KiB")


# What surrounds the forward is there again in the backward pass, and gone afterwards.


def test_random_numbers_are_drawn_again() -> None:
    """The gradient is that of the answer: with all noise in the Jacobian, their product is known.

    ``J = w m`` with a mask ``m`` of dropout, so ``w dL/dw = L`` summed for ``L = sum J``.
    """
    model, x = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Dropout(0.5)), batch()
    state = torch.get_rng_state()
    j = again(model, x)
    assert len({tuple((row != 0).flatten().tolist()) for row in j.detach()}) > 1  # drawn anew
    j.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    weight = model[0].weight
    assert weight.grad is not None
    close(weight.grad, (j.detach() / weight.detach()).sum(0))


class Scaled(nn.Module):
    """What it computes depends on its mode and on a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.first = mlp(), nn.Linear(3, 3)
        self.register_buffer("scale", torch.tensor(2.0))
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        y: Tensor = self.inner(self.scale * self.first(x))
        return y.tanh() if self.training else y.sin()


def test_modes_and_buffers_are_those_of_the_forward() -> None:
    model, x = Scaled(), batch().requires_grad_()
    goals = [x, *model.parameters()]
    j = again(model, x)
    whole = gradients(jacobian(model, x, create_graph=True), goals)
    model.eval()
    assert isinstance(model.scale, Tensor)
    model.scale.fill_(5.0)
    close(gradients(j, goals), whole)
    assert not model.training
    assert not model.first.training
    assert model.scale.item() == 5
    assert not model.calls


def test_a_closure_over_a_module_too() -> None:
    model, x = Scaled(), batch().requires_grad_()
    goals = [x, *model.parameters()]
    j = [jacobian(lambda x: model(x), x, create_graph=True), again(lambda x: model(x), x)]
    model.eval()
    close(*(gradients(j, goals) for j in j))
    assert not model.training
    assert not model.calls


def test_running_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()).eval()
    x = batch().requires_grad_()
    same_gradients(again(model, x), jacobian(model, x, create_graph=True), [x, *model.parameters()])
    assert model[1].num_batches_tracked == 0
    with pytest.raises(CouplingError):
        again(model.train(), x)


def test_autocast_is_entered_again() -> None:
    model, seen = mlp().float(), []
    x = torch.randn(4, 3, dtype=torch.float32)

    def f(x: Tensor) -> Tensor:
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        y: Tensor = model(x)
        return y

    with torch.autocast("cpu", torch.bfloat16):
        j = again(f, x)
    forward = len(seen)
    j.sum().backward()
    assert len(seen) == forward + 2
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("which", ["input", "parameter", "captured", "constant"])
def test_what_has_changed_since_is_refused(which: str) -> None:
    model, x, w = mlp(), batch(), torch.randn(3)
    model[2].requires_grad_(False)
    j = again(lambda x: model(x * w), x)
    with torch.no_grad():
        {"input": x, "parameter": model[0].weight, "captured": w, "constant": model[2].weight}[
            which
        ].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        j.sum().backward()


def test_another_tensor_in_the_backward_is_refused() -> None:
    tensors = [torch.randn(3, 3, requires_grad=True) for _ in range(2)]
    j = again(lambda x: (x @ tensors[0]).sin(), batch())
    tensors.reverse()
    with pytest.raises(StateError, match="was not seen in the forward"):
        j.sum().backward()


# Parameters.


def test_gradients_arrive_once_through_hooks() -> None:
    model, x = mlp(), batch()
    model[2].weight.requires_grad_(False)
    arrived: list[Tensor] = []
    model[0].weight.register_hook(lambda g: arrived.append(g) or 3 * g)
    after: list[int] = []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: after.append(1))
    found = []
    for j in (jacobian(model, x, create_graph=True), again(model, x)):
        j.square().sum().backward(retain_graph=True)
        j.square().sum().backward()
        found.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    close(*found)
    assert found[0][2] is None
    assert len(arrived) == len(after) == 4
    close(arrived[2], arrived[0])


@pytest.mark.parametrize("wrt", ["2", "0.weight", "parameters"])
def test_layers_and_parameters(wrt: str) -> None:
    model, x = mlp(), batch().requires_grad_()
    goals = [x, *model.parameters()]

    def then(solution: Any, _: slice) -> list[Tensor]:
        j = solution.jacobian
        return list(j.values()) if isinstance(j, dict) else [j]

    def loss(parts: Sequence[Tensor]) -> Tensor:
        return sum((part.pow(3).sum() for part in parts), torch.zeros(()))

    whole = jacobian(model, x, wrt=wrt, create_graph=True)
    ours = recomputed(asked(model, x, wrt=wrt), then, None, fixed=2)
    theirs = list(whole.values()) if isinstance(whole, dict) else [whole]
    close(*(torch.autograd.grad(loss(j), goals, materialize_grads=True) for j in (ours, theirs)))


def test_tokens() -> None:
    """The input has no derivative; what is asked for is a layer."""
    model = nn.Sequential(nn.Embedding(10, 3), nn.Flatten(), nn.Linear(6, 4), nn.Tanh())
    tokens = torch.randint(0, 10, (5, 2))
    same_gradients(
        again(model, tokens, wrt="0"), jacobian(model, tokens, wrt="0", create_graph=True),
        list(model.parameters()),
    )  # fmt: skip


@pytest.mark.parametrize("outputs", [[2, 0], "argmax", torch.tensor([0, 1, 2, 3, 0])])
def test_selected_outputs(outputs: Any) -> None:
    model, x = mlp(), batch()
    same_gradients(
        again(model, x, outputs=outputs), jacobian(model, x, outputs=outputs, create_graph=True),
        list(model.parameters()),
    )  # fmt: skip


def test_computed_and_tied_weights() -> None:
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    tied = nn.Linear(4, 4)
    model = nn.Sequential(model, tied, nn.Tanh(), tied)
    x = batch()
    goals = list(model.parameters())
    same_gradients(again(model, x), jacobian(model, x, create_graph=True), goals)
    with nn.utils.parametrize.cached():
        ours, theirs = again(model, x), jacobian(model, x, create_graph=True)
        close(gradients(ours, goals), gradients(theirs, goals))


def test_a_step_of_a_step() -> None:
    """Weights that were computed before, handed in by ``functional_call``."""
    model, x = mlp(), batch()
    names, goals = zip(*model.named_parameters(), strict=True)
    loss = model(x).square().sum()
    steps = torch.autograd.grad(loss, goals, create_graph=True)
    fast = {n: p - 0.1 * g for n, p, g in zip(names, goals, steps, strict=True)}
    f = lambda x: torch.func.functional_call(model, fast, (x,))  # noqa: E731 (as users write it)
    same_gradients(again(f, x), jacobian(f, x, create_graph=True), goals)


# What is made of the Jacobian.


def test_a_function_of_the_jacobian() -> None:
    model, x, b = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), batch(), batch().requires_grad_()

    def then(solution: Any, samples: slice) -> list[Tensor]:
        j, y = solution.jacobian, solution.value()
        return [torch.linalg.solve(j, b[samples]), torch.linalg.slogdet(j)[1] * y.sum(1)]

    j = jacobian(model, x, create_graph=True)
    theirs = [torch.linalg.solve(j, b), torch.linalg.slogdet(j)[1] * model(x).sum(1)]
    ours = recomputed(asked(model, x), then, None, fixed=2)
    goals = [b, *model.parameters()]
    found = [torch.autograd.grad(s.square().sum() + d.sum(), goals) for s, d in (ours, theirs)]
    close(*found)
    plain = recomputed(asked(model, x, create_graph=False), then, None, fixed=2)
    assert not any(p.requires_grad for p in plain)
    close(plain, [t.detach() for t in theirs])


def test_samples_that_depend_on_each_other_are_refused() -> None:
    model = mlp()
    with pytest.raises(CouplingError):
        again(lambda x: model(x) - model(x).detach().mean(0), batch(), samples=2)
    random = asked(lambda x: torch.rand(len(x), 4) - model(x).mean(0), batch())
    with pytest.raises(CouplingError):  # where values, being random, say nothing
        recomputed(random, lambda solution, _: [solution.jacobian], None, whole=True, fixed=1)


def test_two_processes_train_together(tmp_path: Path) -> None:
    """``DistributedDataParallel`` hears of every gradient once, and averages over processes."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.two_processes"]
    runs = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")], stdout=subprocess.PIPE, text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [json.loads(run.communicate(timeout=120)[0]) for run in runs]
    with default_dtype(torch.float32):
        model, x = data()
        model.max_memory = None
        model(x).backward()
    assert said[0] == said[1]
    for p, found in zip(model.parameters(), said[0], strict=True):
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        ours = torch.zeros_like(p) if found is None else torch.tensor(found, dtype=p.dtype)
        torch.testing.assert_close(ours, grad, rtol=1e-4, atol=1e-6)
