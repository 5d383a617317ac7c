"""What is passed as ``f``, what is asked of it, and from where the call comes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchjac.errors import BatchAxisError, InputError, InputTypeError

from . import rowloop
from .registry import LAWS, NOT_ITS_SLOPE, case

GROUP = "callables and callers"


def one_by_one(f: Any, inputs: Any) -> Any:
    """The truth for a function of one sample: the batch is a loop, stacked."""

    def batch(*args: Tensor) -> Any:
        rows = [f(*sample) for sample in zip(*args, strict=True)]
        if isinstance(rows[0], tuple):
            return tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return torch.stack(rows)

    return rowloop.jacobian(batch, inputs)


@case("one_sample_function", group=GROUP, options={"batched": False}, expected=one_by_one)
def one_sample_function() -> Any:
    weight = torch.randn(2, 3)
    return lambda x: (weight @ x).tanh() * x.norm(), torch.randn(4, 3)


@case("one_sample_scalar", group=GROUP, options={"batched": False}, expected=one_by_one)
def one_sample_scalar() -> Any:
    return lambda x: x.prod() + x[0] ** 2, torch.randn(4, 3)


@case("one_sample_module", group=GROUP, options={"batched": False}, expected=one_by_one)
def one_sample_module() -> Any:
    """Convolutions and pools take a sample without batch axis as well."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(0))
    return model, torch.randn(3, 1, 5, 5)


@case("one_sample_with_a_branch", group=GROUP, options={"batched": False}, expected=one_by_one)
def one_sample_with_a_branch() -> Any:
    def f(x: Tensor) -> Tensor:
        return x.exp() if x.sum() > 0 else x[:1] * x

    return f, torch.randn(4, 3)


@case("one_sample_two_in_two_out", group=GROUP, options={"batched": False}, expected=one_by_one)
def one_sample_two_in_two_out() -> Any:
    return lambda a, b: (torch.outer(a, b), a.sum() * b), (torch.randn(3, 2), torch.randn(3, 3))


@case("functools_partial", group=GROUP)
def functools_partial() -> Any:
    def f(model: nn.Module, x: Tensor, power: int) -> Tensor:
        return model(x) ** power

    return functools.partial(f, nn.Linear(3, 2), power=3), torch.randn(4, 3)


@case("bound_method", group=GROUP)
def bound_method() -> Any:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

        def embed(self, x: Tensor) -> Tensor:
            return self.net(x).sin()

    return Model().embed, torch.randn(4, 3)


@case("object_with_call", group=GROUP)
def object_with_call() -> Any:
    class Energy:
        weight = torch.randn(3, 3)

        def __call__(self, x: Tensor) -> Tensor:
            return ((x @ self.weight) * x).sum(1)

    return Energy(), torch.randn(4, 3)


@case("builtin_function", group=GROUP)
def builtin_function() -> Any:
    return torch.sin, torch.randn(4, 3)


@case("caller_under_no_grad", group=GROUP, around=torch.no_grad)
def caller_under_no_grad() -> Any:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(4, 3)


@case("caller_in_inference_mode", group=GROUP, around=torch.inference_mode)
def caller_in_inference_mode() -> Any:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)


@contextmanager
def anomalies() -> Iterator[None]:
    with warnings.catch_warnings():  # that it is slow
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly(check_nan=False):
            yield


@case("caller_detects_anomalies", group=GROUP, around=anomalies)
def caller_detects_anomalies() -> Any:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)


@case("inputs_are_inference_tensors", group=GROUP)
def inputs_are_inference_tensors() -> Any:
    with torch.inference_mode():
        x = torch.randn(4, 3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), x


@case("no_grad_decorator_of_the_function", group=GROUP, without=NOT_ITS_SLOPE)
def no_grad_decorator_of_the_function() -> Any:
    """The function hides everything from autograd: its derivative is zero, and that is said."""
    net = nn.Linear(3, 2)
    return torch.no_grad()(lambda x: net(x)), torch.randn(4, 3)


def selected(index: Any) -> Any:
    """The truth for ``outputs=``: the whole Jacobian, indexed along the first output axis."""
    return lambda f, x: rowloop.jacobian(f, x)[:, index]


def classifier() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)), torch.randn(4, 4)


case("select_int", group=GROUP, options={"outputs": -2}, expected=selected(-2))(classifier)
case("select_list", group=GROUP, options={"outputs": [3, 0, 3]}, expected=selected([3, 0, 3]))(
    classifier
)
case("select_slice", group=GROUP, options={"outputs": slice(1, 5, 2)},
     expected=selected(slice(1, 5, 2)))(classifier)  # fmt: skip

CHOSEN = torch.tensor([1, 4, 0, 1])


def per_sample(f: Any, x: Tensor) -> Tensor:
    return rowloop.jacobian(f, x)[torch.arange(len(x)), CHOSEN]


def at_the_maximum(f: Any, x: Tensor) -> Tensor:
    return rowloop.jacobian(f, x)[torch.arange(len(x)), f(x).argmax(1)]


case("select_per_sample", group=GROUP, options={"outputs": CHOSEN}, expected=per_sample)(classifier)
case("select_argmax", group=GROUP, options={"outputs": "argmax"}, expected=at_the_maximum)(
    classifier
)


def maps() -> Any:
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Sigmoid()), torch.randn(2, 1, 3, 3)


case("select_map", group=GROUP, options={"outputs": [2, 0]}, expected=selected([2, 0]))(maps)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.second = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).exp()


def blocks() -> Any:
    return Blocks(), torch.randn(4, 3)


def of_first(f: Any, x: Tensor) -> Tensor:
    return rowloop.jacobian(f.first, x)


def wrt_first(f: Any, x: Tensor) -> Tensor:
    return rowloop.jacobian(lambda h: f.second(h).exp(), f.first(x))


def wrt_weight(f: Any, x: Tensor) -> Tensor:
    """Every sample is given a copy of the weight of its own."""
    weight = f.second.weight.detach().expand(len(x), -1, -1)
    hidden = f.first(x).detach()
    return rowloop.jacobian(
        lambda w: (torch.einsum("noi,ni->no", w, hidden) + f.second.bias).exp(), weight
    )


def wrt_both(f: Any, x: Tensor) -> dict[str, Tensor]:
    return {"first": wrt_first(f, x), "second.weight": wrt_weight(f, x)}


case("of_a_layer", group=GROUP, options={"of": "first"}, expected=of_first)(blocks)
case("wrt_a_layer", group=GROUP, options={"wrt": "first"}, expected=wrt_first)(blocks)
case("wrt_a_parameter", group=GROUP, options={"wrt": "second.weight"}, expected=wrt_weight)(blocks)
case("wrt_a_list", group=GROUP, options={"wrt": ["first", "second.weight"]}, expected=wrt_both)(
    blocks
)


class Overwritten(nn.Module):
    """What the first layer returned is written over before anybody else reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).mul_(2).tanh_())


def overwritten() -> Any:
    return Overwritten(), torch.randn(4, 3)


def wrt_overwritten(f: Any, x: Tensor) -> Tensor:
    return rowloop.jacobian(lambda h: f.second((2 * h).tanh()), f.first(x))


case("of_a_layer_written_over", group=GROUP, options={"of": "first"}, expected=of_first)(
    overwritten
)
case("wrt_a_layer_written_over", group=GROUP, options={"wrt": "first"}, expected=wrt_overwritten)(
    overwritten
)


class Sealed(nn.Module):
    """Layers inside a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        def body(x: Tensor) -> Tensor:
            return self.second(self.first(x)).exp()

        return checkpoint(body, x, use_reentrant=False)


def sealed() -> Any:
    return Sealed(), torch.randn(4, 3)


case("wrt_a_layer_in_a_checkpoint", group=GROUP, options={"wrt": "first"}, expected=wrt_first)(
    sealed
)
case("of_a_layer_in_a_checkpoint", group=GROUP, options={"of": "first"}, expected=of_first)(sealed)


@case("complex_input", group=GROUP, expects=InputTypeError, without=LAWS)
def complex_input() -> Any:
    return lambda x: x.abs(), torch.randn(4, 3, dtype=torch.complex128)


@case("complex_output", group=GROUP, expects=InputTypeError, without=LAWS)
def complex_output() -> Any:
    return torch.fft.fft, torch.randn(4, 3)


@case("integer_inputs_only", group=GROUP, expects=InputError)
def integer_inputs_only() -> Any:
    return nn.Embedding(5, 3), torch.randint(5, (4, 2))


@case("no_batch_axis_in_the_output", group=GROUP, expects=BatchAxisError)
def no_batch_axis_in_the_output() -> Any:
    return lambda x: x.square().sum(), torch.randn(4, 3)
