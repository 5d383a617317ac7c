"""The same Jacobian by other people's tools, to float64 rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from batchjac import jacobian

# forward mode and captum load scripts of torch's own that warn about their age
pytestmark = [pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]
N = 6


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 9), nn.ReLU(), nn.Linear(9, 4))


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 12), nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2), nn.BatchNorm1d(4), nn.GELU(), nn.AvgPool1d(2), nn.Flatten(),
        nn.Linear(16, 3), nn.Softmax(1),
    ).eval()  # fmt: skip


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(x + self.attention(x, x, x)[0]).mean(1))
        return y


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(),
            nn.Conv2d(4, 4, 3, padding=1),
        )  # fmt: skip
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y: Tensor = self.head(torch.relu(h + self.block(h)).mean((2, 3)))
        return y


Build = tuple[Callable[[], nn.Module], tuple[int, ...]]
MODELS: dict[str, Build] = {
    "mlp": (mlp, (7,)),
    "lenet": (lenet, (1, 14, 14)),
    "conv1d": (conv1d, (2, 17)),
    "residual": (Residual, (2, 6, 6)),
    "attention": (Attends, (5, 6)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = MODELS[name]
    torch.manual_seed(len(name))
    return make().requires_grad_(False), torch.randn(N, *shape)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", MODELS)
def test_captum_saliency(name: str) -> None:
    """One backward for each class there; here all classes at once."""
    from captum.attr import Saliency

    model, x = build(name)
    x.requires_grad_()
    j = jacobian(model, x)
    for target in range(j.shape[1]):
        saliency = Saliency(model).attribute(x, target=target, abs=False)
        close(j[:, target], saliency)
        close(jacobian(model, x, outputs=target), saliency)
    each = torch.arange(N) % j.shape[1]
    close(
        jacobian(model, x, outputs=each),
        Saliency(model).attribute(x, target=each, abs=False),
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
def test_torch_func(name: str, transform: Callable[..., Any]) -> None:
    model, x = build(name)
    if name == "attention":  # its fused kernel has no forward mode
        context: Any = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    else:
        context = torch.enable_grad()
    with context:
        expected = torch.func.vmap(transform(lambda s: model(s.unsqueeze(0)).squeeze(0)))(x)
    close(jacobian(model, x), expected)


@pytest.mark.parametrize("name", ["mlp", "lenet", "conv1d"])
def test_torch_func_for_parameters(name: str) -> None:
    model, x = build(name)
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def one(given: dict[str, Tensor], sample: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(model, given, (sample.unsqueeze(0),))
        return y.squeeze(0)

    expected = torch.func.vmap(torch.func.jacrev(one), in_dims=(None, 0))(parameters, x)
    found = jacobian(model, x, wrt="parameters")
    assert found.keys() == expected.keys()
    for key in found:
        close(found[key], expected[key])


@pytest.mark.parametrize("name", MODELS)
def test_functional_jacobian_and_its_diagonal(name: str) -> None:
    """The doubled batch axis of the seeds: ``[N, O, N, *in]``, of which a diagonal is wanted."""
    model, x = build(name)
    full = torch.autograd.functional.jacobian(model, x)
    diagonal = torch.einsum("noni->noi", full.flatten(3))
    close(jacobian(model, x), diagonal.view(N, -1, *x.shape[1:]))
    close(jacobian(model, x, coupling="full"), full)
    total = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x)
    close(jacobian(model, x), total.movedim(1, 0))


# JAX, on the same weights.


def jax_double() -> Any:
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax


def weights(model: nn.Module) -> list[np.ndarray]:
    return [p.detach().numpy() for p in model.parameters()]


def jax_mlp(jax: Any, w: list[np.ndarray], x: Any) -> Any:
    np_ = jax.numpy
    h = np_.tanh(w[0] @ x + w[1])
    h = jax.nn.relu(w[2] @ h + w[3])
    return w[4] @ h + w[5]


def jax_lenet(jax: Any, w: list[np.ndarray], x: Any) -> Any:
    def convolution(x: Any, kernel: Any, bias: Any, padding: int) -> Any:
        y = jax.lax.conv_general_dilated(
            x[None], kernel, (1, 1), [(padding, padding)] * 2,
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )[0]  # fmt: skip
        return y + bias[:, None, None]

    def pooled(x: Any) -> Any:
        window = (1, 2, 2)
        return jax.lax.reduce_window(x, -np.inf, jax.lax.max, window, window, "VALID")

    h = pooled(jax.nn.relu(convolution(x, w[0], w[1], 0)))
    h = pooled(jax.nn.relu(convolution(h, w[2], w[3], 1)))
    h = jax.nn.relu(w[4] @ h.reshape(-1) + w[5])
    return w[6] @ h + w[7]


JAX: dict[str, Callable[..., Any]] = {"mlp": jax_mlp, "lenet": jax_lenet}


@pytest.mark.parametrize("name", JAX)
@pytest.mark.parametrize("direction", ["jacrev", "jacfwd"])
def test_jax(name: str, direction: str) -> None:
    jax = jax_double()
    model, x = build(name)
    ours, w = JAX[name], weights(model)

    def f(sample: Any) -> Any:
        return ours(jax, w, sample)

    value = np.array(jax.vmap(f)(x.numpy()))
    np.testing.assert_allclose(value, model(x).numpy(), rtol=1e-11)
    expected = np.array(jax.vmap(getattr(jax, direction)(f))(x.numpy()))
    assert expected.dtype == np.float64
    close(jacobian(model, x), torch.from_numpy(expected))


def test_jax_for_parameters() -> None:
    jax = jax_double()
    model, x = build("mlp")

    def f(w: list[Any], sample: Any) -> Any:
        return jax_mlp(jax, w, sample)

    expected = jax.vmap(jax.jacrev(f), in_axes=(None, 0))(weights(model), x.numpy())
    found = jacobian(model, x, wrt="parameters")
    for ours, theirs in zip(found.values(), expected, strict=True):
        close(ours, torch.from_numpy(np.array(theirs)))
