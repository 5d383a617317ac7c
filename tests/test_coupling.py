"""Samples that depend on each other: refused with a name and a remedy, or one of three answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchjac import jacobian, value_and_jacobian
from batchjac.engines import reference
from batchjac.errors import CouplingError, InputError
from tests.common import N, batch, close, full_truth
from tests.coupled import (
    COUPLED,
    NORMS,
    OTHERS,
    Function,
    norm_1d,
    norm_2d,
)

pytestmark = pytest.mark.usefixtures("float64")


def sum_truth(f: Function, x: Tensor) -> Tensor:
    total = full_truth(f, x).sum(0)
    return total.movedim(total.dim() - x.dim(), 0)


@pytest.mark.parametrize("name", COUPLED)
def test_refused(name: str) -> None:
    f = COUPLED[name]()
    with pytest.raises(CouplingError, match="outputs of one sample depend on other samples"):
        jacobian(f, batch(4))
    with pytest.raises(CouplingError, match="depends on another sample"):
        reference.jacobian(f, batch(4))


@pytest.mark.parametrize("name", COUPLED)
def test_full(name: str) -> None:
    f, x = COUPLED[name](), batch(4)
    found = jacobian(f, x, coupling="full")
    close(found, full_truth(f, x))
    close(found, reference.jacobian(f, x, coupling="full"))


@pytest.mark.parametrize("name", COUPLED)
def test_sum(name: str) -> None:
    f, x = COUPLED[name](), batch(4)
    found = jacobian(f, x, coupling="sum")
    close(found, sum_truth(f, x))
    close(found, reference.jacobian(f, x, coupling="sum"))


def held_constant(model: nn.Module, x: Tensor) -> nn.Module:
    """The model in evaluation, its running statistics those of this batch."""
    model = copy.deepcopy(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]

    def note(norm: Any, args: Any) -> None:
        (h,) = args
        over = [d for d in range(h.dim()) if d != 1]
        norm.running_mean = h.detach().mean(over)
        norm.running_var = h.detach().var(over, correction=0)
        norm.track_running_stats = True
        norm.eval()

    for norm in norms:
        norm.register_forward_pre_hook(note)
    model(x)
    for norm in norms:
        norm._forward_pre_hooks.clear()
    return model


@pytest.mark.parametrize("name", NORMS)
def test_frozen(name: str) -> None:
    model, x = NORMS[name](), batch(4)
    y, found = value_and_jacobian(model, x, coupling="frozen")
    held = held_constant(model, x)
    close(found, jacobian(held, x))
    close(found, reference.jacobian(model, x, coupling="frozen"))
    close(y, held(x).detach())


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("wrt", ["parameters", "layer"])
def test_frozen_for_parameters_and_layers(name: str, wrt: str) -> None:
    model, x = NORMS[name](), batch(4)
    layer = "norm" if name == "over time" else "0"
    if wrt == "parameters" and not list(model.parameters()):
        return
    question = "parameters" if wrt == "parameters" else layer
    found = jacobian(model, x, wrt=question, coupling="frozen")
    close(found, jacobian(held_constant(model, x), x, wrt=question))


@pytest.mark.parametrize("name", ["mean subtraction", "contrast", "attention over the batch"])
def test_frozen_holds_only_batch_normalisation(name: str) -> None:
    """What couples samples by other means has no statistics to hold."""
    with pytest.raises(CouplingError, match="depend on other samples"):
        jacobian(OTHERS[name](), batch(4), coupling="frozen")


@pytest.mark.parametrize("coupling", ["error", "frozen"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2), nn.Tanh()),
        lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, affine=True)),
        lambda: nn.Sequential(nn.Unflatten(1, (2, 2)),
                              nn.InstanceNorm1d(2, track_running_stats=True)),
        lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Tanh()),
        lambda: nn.Sequential(nn.LayerNorm(4), nn.Tanh()),
        lambda: norm_1d().eval(),
        lambda: norm_2d().eval(),
    ],
    ids=["instance", "instance with weights", "instance with statistics", "group", "layer",
         "batch 1d in evaluation", "batch 2d in evaluation"],
)  # fmt: skip
def test_norms_of_each_sample_alone(make: Callable[[], nn.Module], coupling: str) -> None:
    """Instance norm is torch's batch norm inside: its statistics are not of the batch."""
    model, x = make(), batch(4)
    whole = full_truth(model, x)
    close(jacobian(model, x, coupling=coupling), whole[torch.arange(N), ..., torch.arange(N), :])


@pytest.mark.parametrize("name", ["1d", "2d", "attention over the batch", "contrast"])
def test_full_for_parameters(name: str) -> None:
    """One answer for each output of each sample: every parameter is shared anyway."""
    model, x = COUPLED[name](), batch(4)
    assert isinstance(model, nn.Module)
    parameters = dict(model.named_parameters())

    def of_parameters(*values: Tensor) -> Tensor:
        given = dict(zip(parameters, values, strict=True))
        y: Tensor = torch.func.functional_call(copy.deepcopy(model), given, (x,))
        return y

    truth = torch.autograd.functional.jacobian(of_parameters, tuple(parameters.values()))
    found = jacobian(model, x, wrt="parameters", coupling="full")
    assert list(found) == list(parameters)
    for name, expected in zip(parameters, truth, strict=True):
        close(found[name], expected)
    some = list(parameters)[-2:]
    close(jacobian(model, x, wrt=some, coupling="full"), {k: found[k] for k in some})


@pytest.mark.parametrize("name", ["1d", "2d", "contrast"])
def test_parameters_are_refused_alike(name: str) -> None:
    with pytest.raises(CouplingError):
        jacobian(COUPLED[name](), batch(4), wrt="parameters")
    with pytest.raises(InputError, match='coupling="sum" has no meaning for parameters'):
        jacobian(COUPLED[name](), batch(4), wrt="parameters", coupling="sum")


@pytest.mark.parametrize("coupling", ["full", "sum"])
def test_layers(coupling: str) -> None:
    model, x = norm_1d(), batch(4)
    h = model[0](x).detach()
    rest = nn.Sequential(*model[1:])
    truth = full_truth(rest, h) if coupling == "full" else sum_truth(rest, h)
    close(jacobian(model, x, wrt="0", coupling=coupling), truth)
    both = jacobian(model, x, wrt=["inputs", "0"], coupling=coupling)
    close(both["0"], truth)
    close(both["inputs"], jacobian(model, x, coupling=coupling))


def test_layers_after_the_coupling_are_apart() -> None:
    model, x = norm_1d(), batch(4)
    h = model[:2](x).detach()
    close(jacobian(model, x, wrt="1"), jacobian(nn.Sequential(*model[2:]), h))
    with pytest.raises(CouplingError):
        jacobian(model, x, wrt="0")
    with pytest.raises(CouplingError):
        jacobian(model, x, wrt=["1", "0"])


def test_of_a_layer_before_the_coupling() -> None:
    model, x = norm_1d(), batch(4)
    close(jacobian(model, x, of="0"), model[0].weight.detach().expand(N, 6, 4))
    with pytest.raises(CouplingError):
        jacobian(model, x, of="1")


def test_one_of_two_outputs_is_enough_to_refuse() -> None:
    def f(x: Tensor) -> dict[str, Tensor]:
        return {"apart": x.sin(), "coupled": x - x.mean(0)}

    with pytest.raises(CouplingError):
        jacobian(f, batch(4))
    x = batch(4)
    found = jacobian(f, x, coupling="sum")
    close(found["apart"], torch.diag_embed(x.cos()))
    close(found["coupled"], torch.zeros(N, 4, 4))


def test_one_of_two_inputs_is_enough_to_refuse() -> None:
    with pytest.raises(CouplingError):
        jacobian(lambda a, b: a + b.mean(0), (batch(4), batch(4)))


@pytest.mark.parametrize("coupling", ["full", "sum", "frozen"])
def test_selected_outputs(coupling: str) -> None:
    model, x = norm_1d(), batch(4)
    whole = jacobian(model, x, coupling=coupling)
    close(jacobian(model, x, coupling=coupling, outputs=[1]), whole[:, [1]])
    close(jacobian(model, x, coupling=coupling, outputs=-1), whole[:, 1])
    each = torch.tensor([0, 1, 1, 0, 1])
    if coupling != "sum":  # the sum over samples of each sample's own output
        found = jacobian(model, x, coupling=coupling, outputs=each)
        close(found, whole[torch.arange(N), each])


def test_a_selection_per_sample_is_summed_as_selected() -> None:
    model, x = norm_1d(), batch(4)
    each = torch.tensor([0, 1, 1, 0, 1])
    whole = full_truth(model, x)
    expected = whole[torch.arange(N), each].sum(0)
    close(jacobian(model, x, coupling="sum", outputs=each), expected)


@pytest.mark.parametrize("coupling", ["full", "sum"])
def test_a_history(coupling: str) -> None:
    model, x = norm_1d(), batch(4).requires_grad_()
    found = jacobian(model, x, coupling=coupling, create_graph=True)
    expected = reference.jacobian(model, x, coupling=coupling, create_graph=True)
    goals = [x, model[0].weight]
    close(
        torch.autograd.grad(found.square().sum(), goals),
        torch.autograd.grad(expected.square().sum(), goals),
    )


# One sample.


@pytest.mark.parametrize("coupling", ["error", "frozen", "sum", "full"])
def test_one_sample_has_none_to_depend_on(coupling: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten())
    x = torch.randn(1, 1, 4, 4)
    whole = full_truth(model, x)
    if coupling == "frozen":
        expected = jacobian(held_constant(model, x), x)
    else:
        expected = whole if coupling == "full" else whole.squeeze(2)
    close(jacobian(model, x, coupling=coupling), expected)
