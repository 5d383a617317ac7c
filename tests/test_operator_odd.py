"""``batchjac.operator`` at its edges: maps that sum over samples, changes meanwhile, NaN, half."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac.errors import BudgetError, InputError, StateError, UnsupportedError
from batchjac.maps import LinearMap
from tests.common import N, batch, close, mlp

pytestmark = pytest.mark.usefixtures("float64")


def over_parameters() -> tuple[LinearMap, Tensor]:
    """The map, and its rows ``[3, 15, 415]`` by the dense way."""
    f = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 15))
    a = batchjac.operator(f, torch.randn(3, 4), wrt="parameters")
    return a, flattened(a.dense(), 3, 15)


def flattened(j: dict[str, Tensor], n: int, o: int) -> Tensor:
    return torch.cat([t.reshape(n, o, -1) for t in j.values()], 2)


# ---- maps that sum over samples


def test_estimates_of_a_transpose_over_parameters_are_refused() -> None:
    a, _ = over_parameters()
    with pytest.raises(UnsupportedError, match=r"svd\(k\).*sums over samples"):
        a.T.svd(1)
    with pytest.raises(UnsupportedError, match=r"norm\(samples=.*sums over samples"):
        a.T.norm(samples=200)
    square = batchjac.operator(nn.Linear(1, 2), torch.randn(3, 1), wrt="weight", outputs=[0, 1]).T
    with pytest.raises(UnsupportedError, match=r"trace\(samples=.*sums over samples"):
        square.trace(samples=3)


def test_exact_figures_of_a_transpose_over_parameters() -> None:
    a, j = over_parameters()
    close(a.T.matrix(), j.mT)
    close(a.T.norm(), j.norm(dim=(1, 2)))
    close(a.T[3:5, [1]], j.mT[:, 3:5, [1]])
    close(a.T.svd(8).S, torch.linalg.svdvals(j)[:, :8])


def test_a_composition_that_ends_in_parameters_has_columns() -> None:
    a, j = over_parameters()
    after = batchjac.operator(nn.Linear(15, 2), torch.randn(3, 15))
    ended = a.T @ after.T
    truth = j.mT @ after.matrix().mT
    close(ended[:, 1], truth[:, :, 1])
    close(ended.matrix(), truth)
    close(ended[4], truth[:, 4])
    rows = (after @ a).matrix()
    close((after @ a).gram(across=True), torch.einsum("noi,mpi->nomp", rows, rows))


@pytest.mark.parametrize(
    "act",
    [
        lambda g: g.matrix(), lambda g: g[0], lambda g: g[:, 0], lambda g: g.norm(),
        lambda g: g.norm(samples=3), lambda g: g.gram(across=True), lambda g: g.svd(1),
        lambda g: g.diag(), lambda g: g.trace(), lambda g: g.trace(samples=3),
    ],
)  # fmt: skip
def test_a_sum_over_samples_has_products_only(act: Callable[[LinearMap], Any]) -> None:
    a, _ = over_parameters()
    g = a.T @ a
    with pytest.raises(UnsupportedError, match="a sum over samples: it has products only"):
        act(g)


def test_products_of_a_sum_over_samples() -> None:
    a, j = over_parameters()
    v = a.inputs.split(torch.randn(1, 1, 415))
    found = (a.T @ a) @ a.inputs.nest(v, many=False)
    flat = torch.cat([b.data.flatten() for b in v])
    close(
        torch.cat([t.flatten() for t in found.values()]), torch.einsum("noi,noj,j->i", j, j, flat)
    )


# ---- gradients of norms


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


@pytest.mark.parametrize("wrt", [None, "parameters"])
def test_the_gradient_of_a_norm_that_is_zero(wrt: str | None) -> None:
    f = nn.Sequential(Squares(), nn.Linear(3, 2, bias=False))
    x = batch()
    x[1] = 0  # and so is this sample's J
    x.requires_grad_()
    norm = batchjac.operator(f, x, wrt=wrt, create_graph=True).norm()
    (grad,) = torch.autograd.grad(norm.sum(), f[1].weight if wrt is None else x)
    j = batchjac.jacobian(f, x, wrt="1.weight" if wrt else None, create_graph=True)
    (truth,) = torch.autograd.grad(
        torch.linalg.matrix_norm(j.flatten(2).flatten(1)[:, None]).sum(),
        f[1].weight if wrt is None else x,
    )
    assert truth.isfinite().all()
    close(grad, truth)


# ---- changes meanwhile


def chunked(f: Any = None, **options: Any) -> tuple[Any, Tensor, Any]:
    f = f or nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 4))
    x = torch.randn(120, 64)
    a = batchjac.operator(f, x, max_memory="1MiB", **options)
    assert a.chunk < 120
    return f, x, a


ACTS: list[Callable[[Any], Any]] = [
    lambda a: a @ torch.randn(120, 64), lambda a: a.T @ torch.randn(120, 4), lambda a: a.norm(),
    lambda a: a.dense(),
]  # fmt: skip


@pytest.mark.parametrize("act", ACTS)
def test_a_forward_that_runs_again_is_of_the_same_function(act: Callable[[Any], Any]) -> None:
    f, _, a = chunked()
    act(a)
    with torch.no_grad():
        f[2].bias.add_(1)
    with pytest.raises(StateError, match=r"'2\.bias' was changed since .*batchjac\.operator again"):
        act(a)


def test_inputs_buffers_and_modules_of_a_plain_function_are_watched() -> None:
    _, x, a = chunked()
    x[0] = 0
    with pytest.raises(StateError, match="an input was changed"):
        a @ torch.randn(120, 64)

    f = nn.Sequential(nn.Linear(64, 512), nn.BatchNorm1d(512), nn.Linear(512, 4)).eval()
    _, _, a = chunked(f)
    a @ torch.randn(120, 64)
    f[1].running_mean.fill_(3)
    with pytest.raises(StateError, match=r"'1\.running_mean' was changed"):
        a @ torch.randn(120, 64)

    g = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 4))
    _, _, a = chunked(lambda x: g(x).sin())
    a @ torch.randn(120, 64)
    g[0].weight = nn.Parameter(torch.zeros(512, 64))
    with pytest.raises(StateError, match="weight' was changed"):
        a @ torch.randn(120, 64)


class Counts(nn.Module):
    """Writes into a buffer whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Tensor
        self.register_buffer("count", torch.zeros(1))
        self.inner = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        y: Tensor = self.inner(x)
        return y


def test_what_the_forward_itself_writes_is_no_change() -> None:
    f, x, a = chunked(Counts())
    v = torch.randn(120, 64)
    j = batchjac.jacobian(f, x)
    for _ in range(2):
        close(a @ v, torch.einsum("noi,ni->no", j, v))
        close(a.dense(), j)
    f(x)
    with pytest.raises(StateError, match="'count' was changed"):
        a @ v


def test_inner_products_that_record_again_are_of_the_same_function() -> None:
    f = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 4))
    a = batchjac.operator(f, torch.randn(120, 64), wrt="parameters", max_memory="2.5MiB")
    assert a.chunk < 120
    a.norm()
    with torch.no_grad():
        f[2].bias.add_(1)
    with pytest.raises(StateError, match=r"'2\.bias' was changed"):
        a.norm()


def test_random_numbers_are_not_drawn_again_for_every_chunk() -> None:
    f = nn.Sequential(nn.Linear(64, 512), nn.Dropout(), nn.Tanh(), nn.Linear(512, 4))
    with pytest.raises(BudgetError, match=r"draws random numbers.*max_memory"):
        batchjac.operator(f, torch.randn(120, 64), max_memory="1MiB")
    assert batchjac.operator(f.eval(), torch.randn(120, 64), max_memory="1MiB").chunk < 120


@pytest.mark.parametrize("coupling", ["error", "full"])
def test_dense_is_of_the_recorded_random_numbers(coupling: str) -> None:
    f, x = nn.Sequential(nn.Linear(3, 50), nn.Dropout(), nn.Linear(50, 4)), batch()
    a = batchjac.operator(f, x, coupling=coupling)
    v = batch()
    before = torch.get_rng_state()
    j = a.dense()
    assert torch.equal(torch.get_rng_state(), before)
    close(a @ v, torch.einsum("nomi,mi->no" if coupling == "full" else "noi,ni->no", j, v))


def test_dense_of_a_closed_operator() -> None:
    a = batchjac.operator(mlp(), batch())
    a.close()
    with pytest.raises(StateError, match="closed"):
        a.dense()


def test_dense_after_a_change() -> None:
    f = mlp()
    a = batchjac.operator(f, batch())
    f.load_state_dict({k: 2 * t for k, t in f.state_dict().items()})
    with pytest.raises(StateError, match=r"'0\.weight' was changed"):
        a.dense()


# ---- nothing selected


@pytest.mark.parametrize("wrt", [None, "parameters"])
def test_no_output_selected(wrt: str | None) -> None:
    f, x = mlp(), batch()
    a = batchjac.operator(f, x, outputs=[], wrt=wrt)
    assert a.shape[:2] == (N, 0)
    assert a.gram().shape == (N, 0, 0)
    assert a.matrix().shape == a.shape
    close(a.norm(), torch.zeros(N))
    close(a.norm(samples=2), torch.zeros(N))
    if wrt:
        assert a.gram(across=True).shape == (N, 0, N, 0)
        close(a.T @ torch.zeros(N, 0), {k: torch.zeros_like(p) for k, p in f.named_parameters()})
    else:
        close(a.T @ torch.zeros(N, 0), torch.zeros(N, 3))
        close(a.gram(of="inputs"), torch.zeros(N, 3, 3))


def test_an_output_without_entries() -> None:
    a = batchjac.operator(lambda x: x[:, :0], batch())
    assert a.gram().shape == a.matrix()[:, :, :0].shape == (N, 0, 0)
    assert (a @ batch()).shape == (N, 0)
    nothing = batchjac.operator(lambda x: x.sum(1, keepdim=True), torch.randn(N, 0))
    close(nothing.gram(), torch.zeros(N, 1, 1))
    assert nothing.T.gram().shape == nothing.gram(of="inputs").shape == (N, 0, 0)
    for map_ in (batchjac.operator(lambda x: x[:, :0], torch.randn(N, 0)),):
        assert map_.diag().shape == (N, 0)
        close(map_.trace(), torch.zeros(N))


# ---- other libraries


def test_inputs_and_parameters_together_have_no_matrix_of_all() -> None:
    a = batchjac.operator(mlp(), batch(), wrt=["inputs", "2.weight"])
    for one in (a, a.T):
        with pytest.raises(UnsupportedError, match=r"to_scipy.*wrt="):
            one.to_scipy()


# ---- half precision, NaN


def test_a_norm_in_half_precision_does_not_overflow() -> None:
    x = torch.randn(3, 4).half()
    a = batchjac.operator(lambda x: 300 * x, x)
    for found in (a.norm(), a.norm(samples=2)):
        torch.testing.assert_close(found, torch.full((3,), 600.0, dtype=torch.float32))
    torch.testing.assert_close(a.gram(), (90_000 * torch.eye(4)).float().expand(3, 4, 4))
    hooked = nn.Linear(4, 4, bias=False, dtype=torch.float16)
    hooked.register_full_backward_hook(lambda m, i, o: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = batchjac.operator(hooked, 100 * x, wrt="weight").norm()
    truth = 2 * (100 * x).float().norm(dim=1)
    torch.testing.assert_close(found, truth, rtol=2e-3, atol=0)


@pytest.mark.parametrize("width", [5, 30])
def test_singular_values_beside_a_sample_of_nan(width: int) -> None:
    f = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    x = torch.randn(N, width)
    truth = batchjac.operator(f, x).svd(2, generator=torch.Generator().manual_seed(0))
    x[1, 0] = torch.nan
    found = batchjac.operator(f, x).svd(2, generator=torch.Generator().manual_seed(0))
    others = [n for n in range(N) if n != 1]
    for name in ("U", "S", "Vh"):
        ours = getattr(found, name)
        assert ours[1].isnan().all()
        close(ours[others], getattr(truth, name)[others])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_singular_values_in_half_precision(dtype: torch.dtype) -> None:
    for width in (5, 30):
        a = batchjac.operator(lambda x: x * x, torch.randn(3, width).to(dtype))
        with pytest.raises(UnsupportedError, match=rf"svd\(k\).*{dtype}"):
            a.svd(2)


@pytest.mark.parametrize("budget", [None, "1MiB"])
def test_a_sample_of_nan_stays_apart_toward_parameters(budget: str | None) -> None:
    f = nn.Sequential(nn.Linear(8, 300), nn.Tanh(), nn.Linear(300, 4))
    x = torch.randn(6, 8)
    x[1, 0] = torch.nan
    a = batchjac.operator(f, x, wrt="parameters", outputs=[3, 1, 0], max_memory=budget)
    dense = {k: j[:, [3, 1, 0]] for k, j in batchjac.jacobian(f, x, wrt="parameters").items()}
    truth, others = flattened(dense, 6, 3), [0, 2, 3, 4, 5]
    for found, expected in (
        (a.matrix(), truth), (a[1], truth[:, 1]), (a[:, 7], truth[:, :, 7]),
        (a[1:, [2, 2405]], truth[:, 1:, [2, 2405]]),
    ):  # fmt: skip
        close(found[others], expected[others])
        assert torch.equal(found.isnan(), expected.isnan())


# ---- words, indices


def test_an_estimate_without_factors_says_why() -> None:
    f = mlp()
    f[2].register_full_backward_hook(lambda m, i, o: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a = batchjac.operator(f, batch(), wrt="parameters")
        with pytest.raises(UnsupportedError, match="of every sample by itself") as raised:
            a.norm(samples=2)
    assert "composition" not in str(raised.value)


@pytest.mark.parametrize("key", [range(2), np.array([0, 1]), np.array([0, 1], dtype=np.int32)])
def test_ranges_and_arrays_index(key: Any) -> None:
    a = batchjac.operator(mlp(), batch())
    close(a[:, key], a.matrix()[:, :, :2])
    close(a[key], a.matrix()[:, :2])


@pytest.mark.parametrize("key", [np.array([0.5]), np.array([True, False]), np.eye(2, dtype=int)])
def test_other_arrays_do_not(key: Any) -> None:
    with pytest.raises(batchjac.errors.InputTypeError, match="1-D"):
        batchjac.operator(mlp(), batch())[key]
    with pytest.raises(InputError, match="two axes"):
        batchjac.operator(mlp(), batch())[0, 0, 0]
