"""Samples that depend on each other: refused with a name and a remedy, or one of three answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchjac import jacobian, value_and_jacobian
from batchjac.engines import reference
from batchjac.errors import CouplingError, InputError
from batchjac.testing import jacobian_in_chunks

pytestmark = pytest.mark.usefixtures("_double")
Function = Callable[..., Any]
N = 5


@pytest.fixture
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def full_truth(f: Function, x: Tensor) -> Tensor:
    """``[N, *out, N, *in]``, which is what PyTorch's own function returns."""
    found: Tensor = torch.autograd.functional.jacobian(copy.deepcopy(f), x)
    return found


def sum_truth(f: Function, x: Tensor) -> Tensor:
    total = full_truth(f, x).sum(0)
    return total.movedim(total.dim() - x.dim(), 0)


# Models whose samples are coupled.


class BatchAttention(nn.Module):
    """Every sample looks at all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(1)  # the batch in the place of time
        y: Tensor = self.head(self.attention(h, h, h, need_weights=False)[0].squeeze(1))
        return y


class Contrast(nn.Module):
    """Similarities to all samples of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = F.normalize(self.encoder(x))
        return torch.log_softmax(z @ z.T / 0.5, 1)


def norm_1d(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, **options), nn.Tanh(), nn.Linear(6, 2))


def norm_2d(**options: Any) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3, **options),
        nn.GELU(), nn.Flatten(), nn.Linear(27, 2),
    )  # fmt: skip


def two_norms() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3),
                         nn.BatchNorm1d(3))  # fmt: skip


class Sequence(nn.Module):
    """Statistics over samples and time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.view(-1, 2, 2)).square()
        return y


NORMS: dict[str, Callable[[], nn.Module]] = {
    "1d": norm_1d,
    "1d without weights": lambda: norm_1d(affine=False),
    "1d without running statistics": lambda: norm_1d(track_running_stats=False).eval(),
    "1d with a cumulative average": lambda: norm_1d(momentum=None),
    "2d": norm_2d,
    "2d without weights": lambda: norm_2d(affine=False),
    "two": two_norms,
    "over time": Sequence,
}
OTHERS: dict[str, Callable[[], Function]] = {
    "mean subtraction": lambda: lambda x: x - x.mean(0),
    "functional": lambda: lambda x: F.batch_norm(x, None, None, training=True),
    "contrast": Contrast,
    "attention over the batch": BatchAttention,
    "softmax over the batch": lambda: lambda x: x.softmax(0),
    "running sum": lambda: lambda x: x.square().cumsum(0),
    "shifted": lambda: lambda x: x * x.roll(1, 0),
    "reversed": lambda: lambda x: x.flip(0).sin(),
    "sorted": lambda: lambda x: x.sort(0).values,
    "largest": lambda: lambda x: x - x.amax(0),
    "distances": lambda: lambda x: torch.cdist(x, x.detach() + x[:1]),
    "without rules": lambda: lambda x: torch.special.i0e(x - torch.special.i0e(x).median(0).values),
}
COUPLED: dict[str, Callable[[], Function]] = NORMS | OTHERS


def batch() -> Tensor:
    return torch.randn(N, 4)


@pytest.mark.parametrize("name", COUPLED)
def test_refused(name: str) -> None:
    f = COUPLED[name]()
    with pytest.raises(CouplingError, match="outputs of one sample depend on other samples"):
        jacobian(f, batch())
    with pytest.raises(CouplingError, match="depends on another sample"):
        reference.jacobian(f, batch())


@pytest.mark.parametrize("name", COUPLED)
def test_full(name: str) -> None:
    f, x = COUPLED[name](), batch()
    found = jacobian(f, x, coupling="full")
    close(found, full_truth(f, x))
    close(found, reference.jacobian(f, x, coupling="full"))


@pytest.mark.parametrize("name", COUPLED)
def test_sum(name: str) -> None:
    f, x = COUPLED[name](), batch()
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
    model, x = NORMS[name](), batch()
    y, found = value_and_jacobian(model, x, coupling="frozen")
    held = held_constant(model, x)
    close(found, jacobian(held, x))
    close(found, reference.jacobian(model, x, coupling="frozen"))
    close(y, held(x).detach())


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("wrt", ["parameters", "layer"])
def test_frozen_for_parameters_and_layers(name: str, wrt: str) -> None:
    model, x = NORMS[name](), batch()
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
        jacobian(OTHERS[name](), batch(), coupling="frozen")


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
    model, x = make(), batch()
    whole = full_truth(model, x)
    close(jacobian(model, x, coupling=coupling), whole[torch.arange(N), ..., torch.arange(N), :])


@pytest.mark.parametrize("name", ["1d", "2d", "attention over the batch", "contrast"])
def test_full_for_parameters(name: str) -> None:
    """One answer for each output of each sample: every parameter is shared anyway."""
    model, x = COUPLED[name](), batch()
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
        jacobian(COUPLED[name](), batch(), wrt="parameters")
    with pytest.raises(InputError, match='coupling="sum" has no meaning for parameters'):
        jacobian(COUPLED[name](), batch(), wrt="parameters", coupling="sum")


@pytest.mark.parametrize("coupling", ["full", "sum"])
def test_layers(coupling: str) -> None:
    model, x = norm_1d(), batch()
    h = model[0](x).detach()
    rest = nn.Sequential(*model[1:])
    truth = full_truth(rest, h) if coupling == "full" else sum_truth(rest, h)
    close(jacobian(model, x, wrt="0", coupling=coupling), truth)
    both = jacobian(model, x, wrt=["inputs", "0"], coupling=coupling)
    close(both["0"], truth)
    close(both["inputs"], jacobian(model, x, coupling=coupling))


def test_layers_after_the_coupling_are_apart() -> None:
    model, x = norm_1d(), batch()
    h = model[:2](x).detach()
    close(jacobian(model, x, wrt="1"), jacobian(nn.Sequential(*model[2:]), h))
    with pytest.raises(CouplingError):
        jacobian(model, x, wrt="0")
    with pytest.raises(CouplingError):
        jacobian(model, x, wrt=["1", "0"])


def test_of_a_layer_before_the_coupling() -> None:
    model, x = norm_1d(), batch()
    close(jacobian(model, x, of="0"), model[0].weight.detach().expand(N, 6, 4))
    with pytest.raises(CouplingError):
        jacobian(model, x, of="1")


def test_one_of_two_outputs_is_enough_to_refuse() -> None:
    def f(x: Tensor) -> dict[str, Tensor]:
        return {"apart": x.sin(), "coupled": x - x.mean(0)}

    with pytest.raises(CouplingError):
        jacobian(f, batch())
    x = batch()
    found = jacobian(f, x, coupling="sum")
    close(found["apart"], torch.diag_embed(x.cos()))
    close(found["coupled"], torch.zeros(N, 4, 4))


def test_one_of_two_inputs_is_enough_to_refuse() -> None:
    with pytest.raises(CouplingError):
        jacobian(lambda a, b: a + b.mean(0), (batch(), batch()))


@pytest.mark.parametrize("coupling", ["full", "sum", "frozen"])
def test_selected_outputs(coupling: str) -> None:
    model, x = norm_1d(), batch()
    whole = jacobian(model, x, coupling=coupling)
    close(jacobian(model, x, coupling=coupling, outputs=[1]), whole[:, [1]])
    close(jacobian(model, x, coupling=coupling, outputs=-1), whole[:, 1])
    each = torch.tensor([0, 1, 1, 0, 1])
    if coupling != "sum":  # the sum over samples of each sample's own output
        found = jacobian(model, x, coupling=coupling, outputs=each)
        close(found, whole[torch.arange(N), each])


def test_a_selection_per_sample_is_summed_as_selected() -> None:
    model, x = norm_1d(), batch()
    each = torch.tensor([0, 1, 1, 0, 1])
    whole = full_truth(model, x)
    expected = whole[torch.arange(N), each].sum(0)
    close(jacobian(model, x, coupling="sum", outputs=each), expected)


@pytest.mark.parametrize("coupling", ["full", "sum"])
def test_a_history(coupling: str) -> None:
    model, x = norm_1d(), batch().requires_grad_()
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


# Finding it.


def pair(i: int, j: int) -> Function:
    """Sample ``i`` alone looks at sample ``j``, past any rule."""

    def f(x: Tensor) -> Tensor:
        y = x.sin()
        return torch.index_add(y, 0, torch.tensor([i]), x[j : j + 1])

    return f


@pytest.mark.parametrize("n", [2, 3, 6, 16])
def test_every_single_pair_is_found(n: int) -> None:
    x = torch.randn(n, 2)
    for i in range(n):
        for j in range(n):
            if i == j:
                continue
            with pytest.raises(CouplingError):
                jacobian(pair(i, j), x)


def test_most_single_pairs_of_a_large_batch_are_found() -> None:
    """Sixteen halves, each of which separates a pair with one chance in two."""
    found, pairs = 0, [(i, (7 * i + 3) % 60) for i in range(60)]
    for i, j in pairs:
        try:
            jacobian(pair(i, j), torch.randn(60, 2))
        except CouplingError:
            found += 1
    assert found >= 50


class OnlyWhenPositive(nn.Module):
    """Couples samples or not, as the data want it."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if float(x.detach()[0, 0]) > 0 else x * 2


def test_what_is_looked_at_is_this_run() -> None:
    model, x = OnlyWhenPositive(), batch()
    for first in (-1.0, 1.0, -1.0, 1.0):  # the second time is as strict as the first
        x[0, 0] = first
        if first > 0:
            with pytest.raises(CouplingError):
                jacobian(model, x)
        else:
            close(jacobian(model, x), 2 * torch.eye(4).expand(N, 4, 4))


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_small_chunks_are_looked_at_too(samples: int) -> None:
    alone = [] if samples == 1 else [norm_1d()]  # torch itself refuses one sample
    for f in (*alone, OTHERS["mean subtraction"](), OTHERS["without rules"]()):
        with pytest.raises(CouplingError):
            jacobian_in_chunks(f, batch(), samples, 1)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x * x.mean(0).detach(),
        lambda x: x.sin() + 0 * x.mean(0),
        lambda x: torch.stack([x[n].sin() for n in range(len(x))]),
        lambda x: torch.cat([x[2:], x[:2]]).cos().roll(2, 0),
        lambda x: x[torch.randperm(len(x)).argsort()][:0].sum() + x.tanh(),
        lambda x: torch.special.i0e(x).flip(0).flip(0),
        lambda x: torch.einsum("ni,nj->nij", x, x),
    ],
    ids=["detached", "times zero", "one by one", "there and back", "an empty part", "flipped twice",
         "outer product"],
)  # fmt: skip
def test_what_only_looks_coupled_passes(f: Function) -> None:
    x = batch()
    whole = full_truth(f, x)
    close(jacobian(f, x), whole[torch.arange(N), ..., torch.arange(N), :])


# What is said.


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), norm_1d()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


FOR_ALL = ('"sum"', '"full"')
FOR_NORMS = ('coupling="frozen"', "model.eval()")
NAMES = {
    "nested norm": (Nested, r"blocks\.1\.1 \(BatchNorm1d\)"),
    "2d": (norm_2d, r"2 \(BatchNorm2d\)"),
    "both": (two_norms, r"(1|4) \(BatchNorm1d\)"),
    "attention": (BatchAttention, r"attention \(MultiheadAttention\)|BatchAttention"),
    "contrast": (Contrast, r"by way of Contrast"),
    "a function": (OTHERS["mean subtraction"], r"by way of \w+Backward0"),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_error_names_the_module_and_the_remedy(name: str) -> None:
    make, says = NAMES[name]
    model = make()
    with pytest.raises(CouplingError, match=says) as caught:
        jacobian(model, batch())
    said, normalises = str(caught.value), "BatchNorm" in says
    assert all(remedy in said for remedy in FOR_ALL)
    assert [remedy in said for remedy in FOR_NORMS] == [normalises] * len(FOR_NORMS)


def test_the_remedies_work() -> None:
    model, x = Nested(), batch()
    for coupling, shape in (("frozen", (N, 2, 4)), ("sum", (N, 2, 4)), ("full", (N, 2, N, 4))):
        assert jacobian(model, x, coupling=coupling).shape == shape
    assert jacobian(model.eval(), x).shape == (N, 2, 4)
