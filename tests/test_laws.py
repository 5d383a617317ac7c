"""The laws of DESIGN.md on the zoo, and on shapes that hypothesis chooses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import batchjac
from batchjac.testing import jacobian_in_chunks
from tests.zoo import CASES, Case, rowloop, seeded
from tests.zoo.rowloop import call, differentiable, leaves, tree_map

pytestmark = [pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]
few = settings(max_examples=10, deadline=None, derandomize=True)
size = st.integers(1, 4)
PLAIN = [
    c for c in CASES
    if not (c.options or c.expected or c.expects) and c.dtype == torch.float64
]  # fmt: skip


def obeying(law: str) -> Any:
    """Parametrise over the cases to which a law applies."""
    cases = [c for c in PLAIN if law not in c.without]
    assert len(cases) > 200
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.name)


def flat_value(y: Any) -> Tensor:
    """All floating outputs of every sample in one row: ``[N, O]``."""
    return torch.cat([leaf.flatten(1) if leaf.dim() > 1 else leaf.unsqueeze(1)
                      for leaf in leaves(y) if differentiable(leaf)], dim=1)  # fmt: skip


def flat_jacobian(jacobian: Any, y: Any, x: Any) -> Tensor:
    """The nested Jacobian as one matrix a sample: ``[N, O, I]``."""
    blocks = iter([b for b in leaves(jacobian) if b is not None])
    inputs = [leaf for leaf in leaves(x) if differentiable(leaf)]
    rows = []
    for leaf in leaves(y):
        if differentiable(leaf):
            n, width = len(leaf), leaf[0].numel()
            rows.append(
                torch.cat([next(blocks).reshape(n, width, t[0].numel()) for t in inputs], 2)
            )
    assert next(blocks, None) is None
    return torch.cat(rows, dim=1)


def evaluate(case: Case, change: Callable[[Any], Any] = lambda x: x) -> tuple[Any, Any]:
    """The value of a fresh build at changed inputs, and those inputs."""
    f, inputs = case.build()
    inputs = change(inputs)
    given = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, inputs)
    with case.around(), torch.inference_mode(False), torch.enable_grad(), seeded(case.seed):
        y = call(f, given)
    return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, y), inputs


def jacobian(case: Case, change: Callable[[Any], Any] = lambda x: x, **options: Any) -> Any:
    f, inputs = case.build()
    with case.around(), seeded(case.seed):
        return batchjac.jacobian(f, change(inputs), **options)


def matrix(case: Case, change: Callable[[Any], Any] | None = None) -> Tensor:
    """The Jacobian as a matrix; remembered where the inputs are those of the case."""
    if change is None and case.name in KNOWN:
        return KNOWN[case.name]
    y, x = evaluate(case, change or (lambda x: x))
    found = flat_jacobian(jacobian(case, change or (lambda x: x)), y, x)
    if change is None:
        KNOWN[case.name] = found
    return found


KNOWN: dict[str, Tensor] = {}


def agree(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def drawn(case: Case, like: Any) -> Any:
    """A direction for every floating input, the same at every call."""
    source = torch.Generator().manual_seed(case.seed)
    return tree_map(
        lambda t: torch.randn(t.shape, generator=source, dtype=t.dtype) if differentiable(t) else t,
        like,
    )


def moved(case: Case, step: float, only: slice = slice(None)) -> Callable[[Any], Any]:
    """``x + step * v`` for the samples in ``only``."""

    def change(x: Any) -> Any:
        steps = iter(leaves(drawn(case, x)))

        def one(t: Any) -> Any:
            v = next(steps)
            if not differentiable(t):
                return t
            t = t.detach().clone()
            t[only] += step * v[only]
            return t

        return tree_map(one, x)

    return change


@obeying("directional")
def test_jacobian_times_a_direction_is_the_directional_derivative(case: Case) -> None:
    """⟨u, Jv⟩ = ⟨Jᵀu, v⟩: Jᵀ was made by the walk, Jv comes from values of f alone."""
    h = 1e-6
    ahead, _ = evaluate(case, moved(case, h))
    behind, x = evaluate(case, moved(case, -h))
    slope = (flat_value(ahead) - flat_value(behind)) / (2 * h)
    v = flat_value(drawn(case, x))
    found = torch.einsum("noi,ni->no", matrix(case), v)
    u = torch.randn_like(found)
    agree((u * found).sum(1), (u * slope).sum(1), 1e-6 * float(1 + slope.abs().max()))
    agree(found, slope, 1e-6 * float(1 + slope.abs().max()))


@obeying("alone")
def test_changing_the_others_leaves_a_block_unchanged(case: Case) -> None:
    agree(matrix(case, moved(case, 0.1, slice(1, None)))[0], matrix(case)[0])


@obeying("permute")
def test_permuting_samples_permutes_blocks(case: Case) -> None:
    def turn(t: Any) -> Any:
        return t.roll(1, dims=0) if isinstance(t, Tensor) else t

    agree(matrix(case, lambda x: tree_map(turn, x)), matrix(case).roll(1, dims=0))


@obeying("compose")
def test_jacobian_of_a_composition_is_the_product(case: Case) -> None:
    y, x = evaluate(case)
    inner = flat_value(y)
    weight = torch.randn(inner.shape[1], 2, dtype=inner.dtype)

    def outer(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight) + z[:, :1] ** 2

    f, inputs = case.build()
    whole = _call_as(inputs, lambda *a, **k: outer(flat_value(f(*a, **k))))
    with case.around(), seeded(case.seed):
        found = batchjac.jacobian(whole, inputs)
    left = batchjac.jacobian(outer, inner)
    agree(flat_jacobian(found, outer(inner), x), left @ matrix(case))


def _call_as(inputs: Any, f: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes its arguments the way these inputs are passed."""
    if isinstance(inputs, dict):
        return lambda **kwargs: f(**kwargs)
    return lambda *args: f(*args)


@obeying("chunks")
@pytest.mark.parametrize(("samples", "rows"), [(1, 7), (7, 1)])
def test_chunks_change_nothing(case: Case, samples: int, rows: int) -> None:
    whole = jacobian(case)
    f, inputs = case.build()
    with case.around(), seeded(case.seed):
        pieces = jacobian_in_chunks(f, inputs, samples, rows)
    for a, b in zip(leaves(pieces), leaves(whole), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            agree(a, b)


def test_out_is_filled_with_the_same() -> None:
    checked, wrong = 0, []
    for case in PLAIN:
        found = jacobian(case)
        if "out" in case.without or not isinstance(found, Tensor):
            continue
        out = torch.full_like(found, torch.nan)
        returned = jacobian(case, out=out)
        checked += 1
        if returned is not out or not torch.equal(out.nan_to_num(7), found.nan_to_num(7)):
            wrong.append(case.name)
    assert not wrong
    assert checked > 200


# ---- shapes chosen by hypothesis


def dense(f: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Tensor:
    """The matrix of an affine map, column by column from its values: ``[*out, *in]``."""
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    units = torch.eye(zero.numel(), dtype=torch.float64).view(-1, *shape)
    with torch.no_grad():
        columns = f(units) - f(zero)  # [I, *out]
    return columns.movedim(0, -1).reshape(*columns.shape[1:], *shape)


def check_affine(f: Callable[[Tensor], Tensor], n: int, shape: Sequence[int]) -> None:
    found = batchjac.jacobian(f, torch.randn(n, *shape, dtype=torch.float64))
    agree(found, dense(f, shape).expand_as(found))


@few
@given(n=size, inputs=size, outputs=size, extra=st.lists(size, max_size=2), bias=st.booleans())
def test_linear_is_its_weight(
    n: int, inputs: int, outputs: int, extra: list[int], bias: bool
) -> None:
    layer = nn.Linear(inputs, outputs, bias, dtype=torch.float64)
    check_affine(layer, n, [*extra, inputs])
    found = batchjac.jacobian(layer, torch.randn(n, inputs, dtype=torch.float64))
    agree(found, layer.weight.detach().expand(n, -1, -1))


CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data(), dims=st.integers(1, 3), transposed=st.booleans())
def test_convolution_is_its_matrix(data: st.DataObject, dims: int, transposed: bool) -> None:
    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return data.draw(st.tuples(*[st.integers(low, high)] * dims))

    groups = data.draw(st.integers(1, 2))
    inputs, outputs = (groups * data.draw(st.integers(1, 2)) for _ in range(2))
    kernel, stride, dilation = per_axis(1, 3), per_axis(1, 3), per_axis(1, 2)
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    extent = [
        max(1, d * (k - 1) + 1 - 2 * p) + more
        for k, d, p, more in zip(kernel, dilation, padding, per_axis(0, 2), strict=True)
    ]
    options: dict[str, Any] = {"groups": groups, "bias": data.draw(st.booleans())}
    if transposed:  # extra places at the end, fewer than a step
        options["output_padding"] = tuple(
            data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    layer = CONVOLUTIONS[dims][transposed](
        inputs, outputs, kernel, stride, padding, dilation=dilation, dtype=torch.float64, **options
    )
    check_affine(layer, data.draw(st.integers(1, 3)), [inputs, *extent])


@few
@given(n=size, channels=size, length=st.integers(4, 7), kernel=st.integers(1, 3), stride=size,
       ceil=st.booleans(), pad=st.booleans())  # fmt: skip
def test_average_pool_is_its_matrix(
    n: int, channels: int, length: int, kernel: int, stride: int, ceil: bool, pad: bool
) -> None:
    layer = nn.AvgPool1d(kernel, stride, kernel // 2 if pad else 0, ceil_mode=ceil)
    check_affine(layer, n, [channels, length])


@few
@given(n=size, channels=size, height=st.integers(3, 6), width=st.integers(3, 6),
       kernel=st.integers(1, 3), stride=st.integers(1, 3), dilation=st.integers(1, 2))  # fmt: skip
def test_max_pool_picks_the_first_winner(
    n: int, channels: int, height: int, width: int, kernel: int, stride: int, dilation: int
) -> None:
    """Each output's Jacobian is a single 1, at the first place in scan order that has its value."""
    if dilation * (kernel - 1) >= min(height, width):
        dilation, kernel = 1, min(kernel, height, width)
    x = torch.randint(3, (n, channels, height, width)).double()
    y, places = F.max_pool2d(x, kernel, stride, 0, dilation, return_indices=True)
    found = batchjac.jacobian(lambda x: F.max_pool2d(x, kernel, stride, 0, dilation), x)
    assert torch.equal(found.sum(dim=(4, 5, 6)), torch.ones_like(y))
    values = torch.einsum("nabcijk,nijk->nabc", found, x)
    assert torch.equal(values, y)
    own = torch.stack([found[:, c, :, :, c] for c in range(channels)], dim=1)
    assert torch.equal(own.flatten(4).argmax(4), places)
    for (_, _, i, j), place in zip(
        torch.nonzero(torch.ones_like(y)).tolist(), places.flatten(), strict=True
    ):
        row, column = divmod(int(place), width)
        assert i * stride <= row < i * stride + dilation * kernel
        assert j * stride <= column < j * stride + dilation * kernel


@few
@given(n=size, widths=st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_relu_network_without_bias_is_its_own_linear_map(n: int, widths: list[int]) -> None:
    """Euler: f is homogeneous of degree one, so Jx = f(x)."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=False, dtype=torch.float64), nn.ReLU()]
    model, x = nn.Sequential(*layers), torch.randn(n, widths[0], dtype=torch.float64)
    agree(torch.einsum("noi,ni->no", batchjac.jacobian(model, x), x), model(x).detach())


@few
@given(n=size, widths=st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_tanh_network_is_a_product_of_matrices(n: int, widths: list[int]) -> None:
    x = torch.randn(n, widths[0], dtype=torch.float64)
    layers = [nn.Linear(i, o, dtype=torch.float64) for i, o in itertools.pairwise(widths)]
    product, y = torch.eye(widths[0], dtype=torch.float64).expand(n, -1, -1), x
    with torch.no_grad():
        for layer in layers:
            y = layer(y).tanh()
            product = (1 - y**2).unsqueeze(2) * (layer.weight @ product)
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())])
    agree(batchjac.jacobian(model, x), product)


@few
@given(n=size, classes=st.integers(2, 6), axes=st.lists(size, max_size=2))
def test_softmax_rows_sum_to_zero(n: int, classes: int, axes: list[int]) -> None:
    x = torch.randn(n, classes, *axes, dtype=torch.float64)
    found = batchjac.jacobian(lambda x: torch.softmax(x, 1), x)
    assert found.sum(1).abs().max() < 1e-14
    assert found.abs().max() > 1e-3 or classes == 1


@few
@given(n=size, length=size, width=size, hidden=size, layers=st.integers(1, 2), both=st.booleans(),
       kind=st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]))  # fmt: skip
def test_recurrent_layers_equal_the_row_loop(
    n: int, length: int, width: int, hidden: int, layers: int, both: bool, kind: type[nn.Module]
) -> None:
    net = kind(width, hidden, layers, bidirectional=both, batch_first=True, dtype=torch.float64)
    x = torch.randn(n, length, width, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return net(x)[0]

    agree(batchjac.jacobian(f, x), rowloop.jacobian(f, x))


@few
@given(n=size, length=size, width=st.integers(1, 3), heads=st.integers(1, 3), causal=st.booleans())
def test_attention_equals_the_row_loop(
    n: int, length: int, width: int, heads: int, causal: bool
) -> None:
    qkv = nn.Linear(width * heads, 3 * width * heads, dtype=torch.float64)
    x = torch.randn(n, length, width * heads, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        q, k, v = qkv(x).unflatten(2, (3, heads, width)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)

    agree(batchjac.jacobian(f, x), rowloop.jacobian(f, x))


@few
@given(n=size, channels=st.integers(1, 4), length=st.integers(2, 5), kind=st.sampled_from("blgi"))
def test_normalisations_equal_the_row_loop(n: int, channels: int, length: int, kind: str) -> None:
    made = {
        "b": nn.BatchNorm1d(channels),
        "l": nn.LayerNorm([channels, length]),
        "g": nn.GroupNorm(channels, channels),
        "i": nn.InstanceNorm1d(channels, affine=True),
    }
    layer = made[kind].double().eval()
    x = torch.randn(n, channels, length, dtype=torch.float64)
    agree(batchjac.jacobian(layer, x), rowloop.jacobian(layer, x))
