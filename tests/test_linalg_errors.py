"""Every bad input of ``batchjac.linalg`` and what is said about it; what is answered with NaN."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac import linalg
from batchjac.errors import (
    BatchAxisError,
    BatchjacError,
    CouplingError,
    InputError,
    InputTypeError,
    LinAlgError,
    NameNotFoundError,
)
from batchjac.testing import jacobian_in_chunks

N = 4
J = torch.eye(3).repeat(N, 1, 1)
B = torch.ones(N, 3)
X = torch.arange(12.0).view(N, 3)


def wide() -> Tensor:
    return torch.ones(N, 2, 3)


def with_nan(value: float = float("nan")) -> Tensor:
    j = J.clone()
    j[1, 0, 2] = value
    return j


def singular(*samples: int) -> Tensor:
    """The identity, of which some have a last row that is zero or nearly so."""
    j = J.double().clone()
    for k, n in enumerate(samples):
        j[n, 2, 2] = 0 if k == 0 else 1e-18
    return j


def uneven(x: Tensor) -> Tensor:
    """Two outputs, or three where the first of the samples together is large."""
    return x[:, : 2 + int(x[0, 0] > 5)] * 1.0


def two(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x))
        return y


Case = tuple[str, Callable[[], Any], type[BatchjacError], str]

WHAT: list[Case] = [
    ("a name", lambda: linalg.inverse("model", X), InputTypeError,
     r"f must be an nn\.Module or a callable on a batch, got str"),
    ("no inputs", lambda: linalg.inverse(torch.sin), InputTypeError,
     r"linalg\.inverse takes a function and its inputs, or a tensor of Jacobians; got "
     r"builtin_function_or_method and no inputs"),
    ("an array", lambda: linalg.inverse(J.numpy()), InputTypeError,
     r"got ndarray and no inputs; convert an array of Jacobians with torch\.as_tensor"),
    ("a seed for a trace", lambda: linalg.trace(torch.sin, X, generator=3), InputTypeError,
     r"generator must be a torch\.Generator or None, got int; a seed makes one, "),
    ("a seed for a series", lambda: linalg.logdet(0.1 * J, generator=3, method="power"),
     InputTypeError, "generator must be"),
    ("a trace that is not square", lambda: linalg.trace(wide()), InputError,
     r"got Jacobians of 2 x 3; linalg\.svdvals takes others"),
    ("products that are not square", lambda: linalg.solve(wide(), B[:, :2], method="gmres"),
     InputError, r"got Jacobians of 2 x 3; use linalg\.lstsq"),
    ("a right side for fewer", lambda: linalg.solve(J, B[:3]), InputError,
     r"b is \[3, 3\], expected \[N, 3\].*N the number of samples of the Jacobians"),
    ("inputs beside J", lambda: linalg.inverse(J, X), InputError,
     "the Jacobians are given as a tensor, so inputs has no meaning"),
    ("options beside J", lambda: linalg.inverse(J, create_graph=True), InputError,
     "given as a tensor, so create_graph= has no meaning"),
    ("an unknown option", lambda: linalg.inverse(torch.sin, X, dim=1), InputTypeError,
     r"linalg\.inverse takes no 'dim'; its options are batched, compile, coupling"),
    ("out=", lambda: linalg.inverse(torch.sin, X, out=J), InputTypeError, "takes no 'out'"),
    ("J of two axes", lambda: linalg.inverse(J[0]), InputError,
     r"J must be \[N, outputs, inputs\], got \[3, 3\]; .* say how many are outputs"),
    ("J of four axes", lambda: linalg.svdvals(torch.ones(N, 2, 3, 4)), InputError,
     r"got \[4, 2, 3, 4\]; with nested axes"),
    ("too many output axes", lambda: linalg.pinv(J, output_axes=3), InputError,
     r"output_axes=3 of J \[4, 3, 3\].*expected 0 to 2"),
    ("output axes a text", lambda: linalg.pinv(J, output_axes="1"), InputTypeError,
     "output_axes must be a number of axes, got '1'"),
    ("output axes of a function", lambda: linalg.pinv(torch.sin, X, output_axes=1), InputError,
     "output_axes= says which axes of a given J"),
    ("J sparse", lambda: linalg.inverse(J.to_sparse()), InputTypeError,
     r"J has the layout torch\.sparse_coo; pass its \.to_dense"),
    ("J without entries", lambda: linalg.inverse(torch.ones(N, 0, 0)), InputError,
     r"J \[4, 0, 0\] has no entries"),
    ("no samples", lambda: linalg.inverse(J[:0]), InputError, r"J \[0, 3, 3\] has no entries; a "
     "sample, an output and an input are needed"),
    ("two outputs", lambda: linalg.inverse(two, X), InputError,
     "takes one matrix for each sample, and this question has outputs nested in a tuple"),
    ("two inputs", lambda: linalg.inverse(torch.mul, (X, X)), InputError,
     "inputs nested in a tuple"),
    ("two layers", lambda: linalg.inverse(Named(), X, wrt=["inputs", "first"]), InputError,
     "a dict of 2 by name"),
    ("an unknown layer", lambda: linalg.inverse(Named(), X, wrt="firts"), NameNotFoundError,
     "did you mean 'first'"),
    ("full coupling", lambda: linalg.inverse(torch.sin, X, coupling="full"), InputError,
     'coupling="full" makes no matrix for each sample'),
    ("coupled samples", lambda: linalg.inverse(nn.BatchNorm1d(3), X), CouplingError,
     r"Use model\.eval\(\)"),
    ("coupled samples by products", lambda: linalg.trace(nn.BatchNorm1d(3), X), CouplingError,
     r"Use model\.eval\(\)"),
    ("a width that varies", lambda: linalg.svdvals(uneven, X, max_memory=1500), BatchAxisError,
     r"an output has \[2\] numbers for each sample in one chunk of samples, \[3\] in the next"),
    ("a width that varies in the Jacobian", lambda: jacobian_in_chunks(uneven, X, 2, 9),
     BatchAxisError, r"output changes its size from one chunk .* the first was \[4, 2, 3\], now it "
     r"is \[4, 3, 3\]"),
]  # fmt: skip

DTYPES: list[Case] = [
    (f"{name} of {dtype}", lambda f=f, dtype=dtype: f(J.to(dtype)), InputTypeError,
     rf"linalg\.{name} needs float32 or float64, got {dtype}, which has too few digits")
    for dtype in (torch.float16, torch.bfloat16)
    for name, f in [
        ("inverse", linalg.inverse), ("pinv", linalg.pinv), ("slogdet", linalg.slogdet),
        ("svdvals", linalg.svdvals), ("condition", linalg.condition), ("trace", linalg.trace),
        ("logdet", linalg.logdet), ("solve", lambda j: linalg.solve(j, B)),
        ("lstsq", lambda j: linalg.lstsq(j, B)),
    ]
]  # fmt: skip
DTYPES += [
    ("complex", lambda: linalg.inverse(J.to(torch.complex64)), InputTypeError,
     r"takes real Jacobians, got torch\.complex64; .*\[\[A, -B\], \[B, A\]\]"),
    ("complex inputs", lambda: linalg.inverse(torch.abs, X.to(torch.complex64)), InputTypeError,
     r"inputs is complex \(torch\.complex64\)"),
    ("integers", lambda: linalg.inverse(J.long()), InputTypeError, r"got torch\.int64; convert"),
    ("a model in half", lambda: linalg.inverse(Named().half(), X.half()), InputTypeError,
     r"needs float32 or float64, got torch\.float16.*\.float\(\)"),
]  # fmt: skip

SHAPES: list[Case] = [
    ("inverse of wide", lambda: linalg.inverse(wide()), InputError,
     r"linalg\.inverse needs as many outputs as inputs, got Jacobians of 2 x 3; use linalg\.pinv"),
    ("inverse of a wide model", lambda: linalg.inverse(nn.Linear(3, 2), X), InputError,
     "got Jacobians of 2 x 3"),
    ("solve of wide", lambda: linalg.solve(wide(), B[:, :2]), InputError,
     r"linalg\.solve needs .* 2 x 3; use linalg\.lstsq, or regularisation="),
    ("solve by products of wide", lambda: linalg.solve(wide(), B[:, :2], method="gmres"),
     InputError, r"linalg\.solve needs .* 2 x 3"),
    ("slogdet of wide", lambda: linalg.slogdet(wide()), InputError,
     r"linalg\.slogdet needs .* 2 x 3; there is no determinant"),
    ("trace of wide", lambda: linalg.trace(wide()), InputError, r"linalg\.trace needs .* 2 x 3"),
    ("logdet by parameters", lambda: linalg.logdet(Named(), X, wrt="first.weight"), InputError,
     r"from one tensor \[N, \*in\] to one \[N, \*out\]; got .*3, 3"),
    ("b of another length", lambda: linalg.solve(J, B[:, :2]), InputError,
     r"b is \[4, 2\], expected \[N, 3\] as the outputs are, or \[N, 3, k\]"),
    ("b of fewer samples", lambda: linalg.solve(J, B[:2]), InputError, r"b is \[2, 3\], expected"),
    ("b of more samples", lambda: linalg.lstsq(J, B.repeat(2, 1)), InputError,
     "b is of 8 samples, the Jacobians are of 4"),
    ("b with too many axes", lambda: linalg.lstsq(J, torch.ones(N, 3, 1, 1)), InputError,
     r"b is \[4, 3, 1, 1\]"),
    ("b a number", lambda: linalg.solve(J, torch.tensor(1.0)), InputError, r"b is \[\], expected"),
    ("b of another dtype", lambda: linalg.solve(J, B.double()), InputTypeError,
     r"b is torch\.float64 on cpu, the Jacobians are torch\.float32"),
    ("no b", lambda: linalg.solve(torch.sin, X), InputTypeError,
     r"linalg\.solve needs a tensor b: solve\(f, inputs, b\) or solve\(J, b\); got NoneType"),
    ("no b for J", lambda: linalg.lstsq(J), InputTypeError, r"lstsq\(J, b\); got NoneType"),
]  # fmt: skip

NUMBERS: list[Case] = [
    ("regularisation below zero", lambda: linalg.inverse(J, regularisation=-1.0), InputError,
     r"regularisation must be zero or positive, and finite, got -1\.0"),
    ("regularisation NaN", lambda: linalg.solve(J, B, regularisation=float("nan")), InputError,
     "regularisation must be .* got nan"),
    ("regularisation a text", lambda: linalg.pinv(J, regularisation="1"), InputTypeError,
     "regularisation must be a number, got str"),
    ("rtol of one", lambda: linalg.pinv(J, rtol=1.0), InputError,
     "0 <= rtol < 1, got 1.0"),
    ("rtol a text", lambda: linalg.pinv(J, rtol="1"), InputTypeError, "rtol must be a number"),
    ("rtol and regularisation", lambda: linalg.lstsq(J, B, rtol=0.1, regularisation=0.1),
     InputError, "rtol= cuts singular values off, regularisation= does not; pass one"),
    ("on_singular unknown", lambda: linalg.inverse(J, on_singular="zero"), InputError,
     "on_singular must be one of 'error', 'nan', got 'zero'"),
    ("on_singular by products", lambda: linalg.solve(J, B, method="cgls", on_singular=""),
     InputError, "on_singular must be one of"),
    ("method unknown", lambda: linalg.solve(J, B, method="qr"), InputError,
     "method must be one of 'lu', 'gmres', 'cgls', got 'qr'"),
    ("tolerance of lu", lambda: linalg.solve(J, B, tolerance=0.1), InputError,
     'tolerance= and max_products= are for method="gmres"'),
    ("tolerance of zero", lambda: linalg.solve(J, B, method="gmres", tolerance=0.0), InputError,
     "tolerance must lie between 0 and 1, got 0.0"),
    ("no products", lambda: linalg.solve(J, B, method="gmres", max_products=0), InputError,
     "max_products must be at least 1, got 0"),
    ("regularised by products", lambda: linalg.solve(J, B, method="gmres", regularisation=1.0),
     InputError, "regularisation= needs method=\"lu\", got method='gmres'"),
    ("an option by products", lambda: linalg.trace(torch.sin, X, mode="forward"), InputTypeError,
     r"linalg\.trace by products takes no 'mode'; its options are of, wrt"),
    ("a map with options", lambda: linalg.trace(batchjac.operator(torch.sin, X), wrt="inputs"),
     InputError, "has its inputs and options already; leave wrt= away"),
    ("one probe", lambda: linalg.trace(J, probes=1), InputError,
     "probes must be at least 2, to tell the error; got 1"),
    ("probes a float", lambda: linalg.logdet(J, probes=4.0), InputTypeError,
     r"probes must be a number of vectors, got 4\.0"),
    ("trace by an unknown method", lambda: linalg.trace(J, method="exact"), InputError,
     "method must be one of 'hutchinson', 'hutch\\+\\+', got 'exact'"),
    ("logdet by an unknown method", lambda: linalg.logdet(J, method="lu"), InputError,
     "method must be one of 'lanczos', 'power', got 'lu'"),
    ("no steps", lambda: linalg.logdet(J, steps=0), InputError, "steps must be at least 1, got 0"),
    ("steps a float", lambda: linalg.logdet(J, steps=2.0), InputTypeError, "steps must be a num"),
]  # fmt: skip

SINGULAR: list[Case] = [
    ("inverse", lambda: linalg.inverse(singular(1)), LinAlgError,
     r"linalg\.inverse: the Jacobians of 1 sample are singular in torch\.float64: 1 \(condition "
     r"inf\); from 4\.5e\+15 = 1/eps on no digit is right\. Pass regularisation="),
    ("two", lambda: linalg.inverse(singular(3, 0)), LinAlgError,
     r"of 2 samples are singular in torch\.float64: 3 \(condition inf\), 0 \(condition 1\.0e\+18"),
    ("solve", lambda: linalg.solve(singular(3, 0), B.double()), LinAlgError,
     r"linalg\.solve: .* 3 \(condition inf\), 0 \(condition 1\.0e\+18"),
    ("slogdet", lambda: linalg.slogdet(singular(3, 0)), LinAlgError,
     r"linalg\.slogdet: .* 3 \(condition inf\), 0 \(condition 1\.0e\+18"),
    ("slogdet with a history", lambda: linalg.slogdet(singular(3, 0).requires_grad_()),
     LinAlgError, r"3 \(condition inf\), 0 \(condition 1\.0e\+18"),
    ("all zero", lambda: linalg.inverse(0 * J), LinAlgError,
     r"of 4 samples are singular in torch\.float32: 0 \(condition inf\), 1"),
    ("of many", lambda: linalg.inverse(torch.zeros(9, 2, 2)), LinAlgError,
     r"of 9 samples .* 4 \(condition inf\) and 4 more"),
    ("a model", lambda: linalg.inverse(lambda x: x.sum(1, keepdim=True) * x.detach(), X),
     LinAlgError, r"linalg\.inverse: the Jacobians of 4 samples are singular"),
    ("a model in chunks", lambda: linalg.inverse(torch.square, X, max_memory="1KiB"), LinAlgError,
     r"of 1 sample are singular in torch\.float32: 0 \(condition inf\)"),
    ("a model in the last chunk", lambda: linalg.inverse(torch.square, X.flip(0),
     max_memory="2KiB"), LinAlgError, r"of 1 sample are singular in torch\.float32: 3 \(con"),
    ("NaN in the last chunk", lambda: linalg.pinv(torch.square, with_nan()[:, 0].roll(2, 0),
     max_memory="2KiB"), LinAlgError, "of 1 sample hold NaN or inf: 3. Look"),
    ("hardly regularised", lambda: linalg.inverse(singular(1), regularisation=1e-40), LinAlgError,
     r"singular in torch\.float64: 1 \(condition 1\.0e\+20"),
    ("pinv that overflows", lambda: linalg.pinv(1e-310 * J.double()), LinAlgError, "4 samples"),
    *[
        (f"NaN in {name}", lambda f=f: f(with_nan()), LinAlgError,
         rf"linalg\.{name}: the Jacobians of 1 sample hold NaN or inf: 1\. Look for overflow")
        for name, f in [
            ("inverse", linalg.inverse), ("pinv", linalg.pinv), ("slogdet", linalg.slogdet),
            ("svdvals", linalg.svdvals), ("condition", linalg.condition),
            ("solve", lambda j: linalg.solve(j, B)), ("lstsq", lambda j: linalg.lstsq(j, B)),
        ]
    ],
    ("inf", lambda: linalg.svdvals(with_nan(float("inf"))), LinAlgError, "hold NaN or inf: 1"),
    ("NaN in products", lambda: linalg.trace(with_nan()), LinAlgError,
     "linalg.trace: products with the Jacobians of samples 1 hold NaN or inf"),
]  # fmt: skip

EVERY = [*WHAT, *DTYPES, *SHAPES, *NUMBERS, *SINGULAR]


@pytest.mark.parametrize("case", EVERY, ids=lambda c: c[0])
def test_bad_input_is_named(case: Case) -> None:
    _, call, error, says = case
    with pytest.raises(error, match=says) as caught:
        call()
    assert caught.type is error


def test_every_function_has_its_cases() -> None:
    public = {n for n, f in inspect.getmembers(linalg, inspect.isfunction) if n[0] != "_"}
    used = {n for _, call, _, _ in EVERY for n in call.__code__.co_names} | {
        f.__name__ for _, call, _, _ in EVERY for f in (call.__defaults__ or ())
        if inspect.isfunction(f)
    }  # fmt: skip
    assert public == {"inverse", "pinv", "solve", "lstsq", "slogdet", "svdvals", "condition",
                      "trace", "logdet"}  # fmt: skip
    assert public <= used


def test_the_error_carries_samples_and_conditions() -> None:
    with pytest.raises(LinAlgError) as caught:
        linalg.inverse(singular(3, 0))
    assert caught.value.samples == [3, 0]
    assert caught.value.measures[0] == float("inf")
    assert caught.value.measures[1] == pytest.approx(1e18)


@pytest.mark.parametrize("name", ["inverse", "solve", "slogdet", "pinv", "svdvals", "condition"])
@pytest.mark.parametrize("kind", ["singular", "NaN"])
def test_nan_in_the_places_of_samples_without_an_answer(name: str, kind: str) -> None:
    """Theirs alone; and they take no part in the gradient, whose others are as without them."""
    if kind == "singular" and name in ("pinv", "svdvals", "condition"):
        return
    j = singular(1) + torch.diag(torch.tensor([3.0, 1, 0]))
    j[1, 2, 2] = 0 if kind == "singular" else float("nan")

    def f(j: Tensor, **options: Any) -> Tensor:
        given = (j, B.double()[: len(j)]) if name == "solve" else (j,)
        found = getattr(linalg, name)(*given, on_singular="nan", **options)
        return found.logabsdet if name == "slogdet" else found

    a = j.clone().requires_grad_()
    found = f(a)
    assert found[1].isnan().all()
    assert found[[0, 2, 3]].isfinite().all()
    gradient = torch.autograd.grad(found.nansum(), a)[0]
    alone = j[[0, 2, 3]].clone().requires_grad_()
    torch.testing.assert_close(gradient[[0, 2, 3]], torch.autograd.grad(f(alone).sum(), alone)[0])
    assert torch.equal(gradient[1], torch.zeros(3, 3, dtype=torch.float64))


def test_the_condition_of_a_singular_jacobian_is_infinite() -> None:
    j = torch.diag(torch.tensor([2.0, 1, 0])).repeat(2, 1, 1)
    j[1] = torch.diag(torch.tensor([4.0, 2, 1]))
    j.requires_grad_()
    found = linalg.condition(j)
    assert found.tolist() == [float("inf"), 4.0]
    gradient = torch.autograd.grad(found, j, torch.ones(2))[0]
    assert torch.equal(gradient[0], torch.zeros(3, 3))
    assert gradient[1].diagonal().tolist() == [1.0, 0.0, -4.0]


def test_the_pseudo_inverse_of_zero_is_zero() -> None:
    assert torch.equal(linalg.pinv(torch.zeros(2, 3, 2)), torch.zeros(2, 2, 3))
    assert torch.equal(linalg.lstsq(torch.zeros(2, 3, 2), torch.ones(2, 3)), torch.zeros(2, 2))


def test_what_is_cut_off() -> None:
    """Singular values up to rtol of the largest; by default those of the size of rounding."""
    j = torch.diag(torch.tensor([1.0, 1e-3, 1e-9]))[None]
    assert linalg.pinv(j)[0].diagonal().tolist() == pytest.approx([1, 1e3, 0])
    assert linalg.pinv(j.double())[0].diagonal().tolist() == pytest.approx([1, 1e3, 1e9])
    assert linalg.pinv(j, rtol=1e-2)[0].diagonal().tolist() == [1, 0, 0]
    b = torch.ones(1, 3)
    assert linalg.lstsq(j, b, rtol=1e-2)[0].tolist() == [1, 0, 0]


def test_finite_numbers_with_an_infinite_sum_are_no_error() -> None:
    j = torch.full((2, 1, 1), 3e38)
    assert linalg.svdvals(j).flatten().tolist() == pytest.approx([3e38, 3e38])
