"""Several inputs, several outputs, and those that are no numbers one can differentiate."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .registry import NOT_ITS_SLOPE, case

GROUP = "inputs and outputs"
ROUNDED = NOT_ITS_SLOPE | {"compose"}  # float32 somewhere: these two laws are held to float64


@case("two_inputs_tuple", group=GROUP)
def two_inputs_tuple() -> Any:
    left, right = nn.Linear(3, 4), nn.Conv1d(1, 4, 2)

    def f(a: Tensor, b: Tensor) -> Tensor:
        return left(a).tanh() * right(b).amax(2)

    return f, (torch.randn(4, 3), torch.randn(4, 1, 3))


@case("inputs_dict", group=GROUP)
def inputs_dict() -> Any:
    model = nn.Bilinear(2, 3, 2)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *, text: Tensor, image: Tensor) -> Tensor:
            return self.model(text, image.sin())

    return Named(), {"image": torch.randn(4, 3), "text": torch.randn(4, 2)}


@case("inputs_nested", group=GROUP)
def inputs_nested() -> Any:
    def f(pair: tuple[Tensor, Tensor], rest: dict[str, Any]) -> Tensor:
        a, b = pair
        return a * rest["scale"].unsqueeze(1) + b.prod(1, keepdim=True) * rest["more"][0]

    n = 3
    pair = (torch.randn(n, 2), torch.randn(n, 4))
    return f, (pair, {"scale": torch.randn(n), "more": [torch.randn(n, 2)]})


@case("outputs_tuple", group=GROUP)
def outputs_tuple() -> Any:
    trunk, mean, spread = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 1)

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = trunk(x).tanh()
        return mean(hidden), spread(hidden).exp()

    return f, torch.randn(4, 4)


@case("outputs_dict", group=GROUP)
def outputs_dict() -> Any:
    box, label = nn.Linear(4, 4), nn.Linear(4, 3)

    def f(x: Tensor) -> dict[str, Tensor]:
        return {"boxes": box(x).view(-1, 2, 2), "labels": label(x).log_softmax(1)}

    return f, torch.randn(3, 4)


@dataclass
class Prediction:
    mean: Tensor
    variance: Tensor


@case("outputs_dataclass", group=GROUP)
def outputs_dataclass() -> Any:
    net = nn.Linear(3, 4)

    def f(x: Tensor) -> Prediction:
        mean, raw = net(x).chunk(2, dim=1)
        return Prediction(mean, nn.functional.softplus(raw))

    return f, torch.randn(4, 3)


class States(NamedTuple):
    hidden: Tensor
    cell: Tensor


Plain = namedtuple("Plain", ["value"])


@case("outputs_namedtuples_nested", group=GROUP)
def outputs_namedtuples_nested() -> Any:
    cell = nn.LSTMCell(3, 2)

    def f(x: Tensor) -> list[Any]:
        hidden, memory = cell(x)
        return [States(hidden, memory), {"again": (Plain(hidden * memory),)}]

    return f, torch.randn(3, 3)


@case("several_in_several_out", group=GROUP)
def several_in_several_out() -> Any:
    def f(a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"sum": a + b.mean(1, keepdim=True), "scalar": (a.prod(1) * b.sum(1)).sin()}

    return f, (torch.randn(3, 2), torch.randn(3, 3))


@case("integer_input_embedding", group=GROUP)
def integer_input_embedding() -> Any:
    """Words are integers and have no derivative; the numbers beside them do."""
    table, head = nn.Embedding(6, 3, padding_idx=0), nn.Linear(5, 2)

    def f(words: Tensor, numbers: Tensor) -> Tensor:
        return head(torch.cat([table(words).mean(1), numbers.tanh()], dim=1)).exp()

    return f, (torch.randint(6, (4, 3)), torch.randn(4, 2))


@case("boolean_mask_input", group=GROUP)
def boolean_mask_input() -> Any:
    lstm = nn.GRU(2, 3, batch_first=True)

    def f(x: Tensor, mask: Tensor) -> Tensor:
        return lstm(x.masked_fill(mask.unsqueeze(2), 0.0))[0].mean(1)

    return f, {"x": torch.randn(4, 3, 2), "mask": torch.rand(4, 3) > 0.6}


@case("embedding_bag_weighted", group=GROUP)
def embedding_bag_weighted() -> Any:
    """The derivative with respect to per-sample weights of an embedding bag."""
    bag = nn.EmbeddingBag(6, 3, mode="sum")

    def f(words: Tensor, weights: Tensor) -> Tensor:
        return bag(words, per_sample_weights=weights).sin()

    return f, (torch.randint(6, (4, 3)), torch.rand(4, 3))


@case("unused_input", group=GROUP)
def unused_input() -> Any:
    return lambda a, b: a.sin(), (torch.randn(4, 3), torch.randn(4, 2))


@case("partly_used_inputs", group=GROUP)
def partly_used_inputs() -> Any:
    """Each output reads one of the inputs only: zero blocks beside full ones."""
    return lambda a, b: (a.exp(), b[:, :1] ** 2), (torch.randn(3, 2), torch.randn(3, 3))


@case("integer_output_beside_float", group=GROUP)
def integer_output_beside_float() -> Any:
    net = nn.Linear(4, 3)

    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = net(x)
        best = logits.max(dim=1)
        return logits, best.indices, best.values > 0

    return f, torch.randn(4, 4)


@case("output_that_is_no_tensor", group=GROUP)
def output_that_is_no_tensor() -> Any:
    net = nn.Linear(3, 2)
    return lambda x: (net(x), None, 5, {"note": "text", "again": net(x).exp()}), torch.randn(4, 3)


@case("input_that_is_no_tensor", group=GROUP)
def input_that_is_no_tensor() -> Any:
    def f(x: Tensor, power: float, mode: str, nothing: None) -> Tensor:
        assert nothing is None
        return x.abs() ** power if mode == "power" else x

    return f, (torch.randn(4, 3), 1.5, "power", None)


class ModelOutput(OrderedDict[str, Any]):
    """A dict whose entries are attributes too, as large model libraries return."""

    def __init__(self, logits: Tensor | None = None, hidden: tuple[Tensor, ...] = ()) -> None:
        super().__init__(logits=logits, hidden=hidden)
        self.logits, self.hidden = logits, hidden


@case("output_mapping_with_attributes", group=GROUP)
def output_mapping_with_attributes() -> Any:
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)

    def f(x: Tensor) -> ModelOutput:
        hidden = first(x).tanh()
        return ModelOutput(logits=second(hidden), hidden=(hidden, hidden * 2))

    return f, torch.randn(4, 3)


@case("output_beside_the_input_itself", group=GROUP)
def output_beside_the_input_itself() -> Any:
    return lambda x: (x, x.sin(), x[:, :2]), torch.randn(4, 3)


@case("output_with_an_empty_axis", group=GROUP)
def output_with_an_empty_axis() -> Any:
    return lambda x: {"some": x.sin(), "none": x[:, :0].exp()}, torch.randn(4, 3)


@case("input_with_an_empty_axis", group=GROUP)
def input_with_an_empty_axis() -> Any:
    return lambda a, b: torch.cat([a, b], 1).sum(1, keepdim=True).sin(), (
        torch.randn(4, 3),
        torch.randn(4, 0),
    )


@case("output_with_a_negative_bit", group=GROUP)
def output_with_a_negative_bit() -> Any:
    """A lazy view: the imaginary part of a lazy conjugate."""
    return lambda x: torch.fft.rfft(x.sin(), dim=1).conj().imag, torch.randn(3, 4)


@case("output_of_another_precision", group=GROUP, tolerance=1e-5, without=ROUNDED)
def output_of_another_precision() -> Any:
    net = nn.Linear(3, 2)
    return lambda x: {"half": net(x).float().tanh(), "whole": net(x).exp()}, torch.randn(4, 3)


@case("input_is_a_parameter", group=GROUP)
def input_is_a_parameter() -> Any:
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh()), nn.Parameter(torch.randn(4, 3))


@case("output_without_dependence", group=GROUP)
def output_without_dependence() -> Any:
    return lambda x: torch.ones(len(x), 2, dtype=x.dtype), torch.randn(4, 3)


@case("output_depends_on_parameters_only", group=GROUP)
def output_depends_on_parameters_only() -> Any:
    bias = nn.Parameter(torch.randn(2))
    return lambda x: bias.exp().expand(len(x), -1), torch.randn(4, 3)


@case("some_outputs_without_dependence", group=GROUP)
def some_outputs_without_dependence() -> Any:
    return lambda x: {"x": x**2, "constant": torch.zeros(len(x), 2, dtype=x.dtype)}, torch.randn(
        4, 3
    )


@case("same_tensor_twice_in_the_output", group=GROUP)
def same_tensor_twice_in_the_output() -> Any:
    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x.sin()
        return y, y, y[:, 1:]

    return f, torch.randn(3, 3)


@case("same_tensor_for_two_inputs", group=GROUP)
def same_tensor_for_two_inputs() -> Any:
    """One tensor stands in both places; each place still has a derivative of its own."""
    x = torch.randn(3, 3)
    return lambda a, b: a * b.exp(), (x, x)


@case("two_precisions_in", group=GROUP, tolerance=1e-5, without=ROUNDED)
def two_precisions_in() -> Any:
    """Each block of the result has the precision of its input."""
    return lambda a, b: a.sin() * b.sum(1, keepdim=True), (
        torch.randn(3, 2),
        torch.randn(3, 2).float(),
    )


@case("inputs_not_contiguous", group=GROUP)
def inputs_not_contiguous() -> Any:
    net = nn.Conv1d(3, 2, 2)
    return net, torch.randn(5, 3, 8)[::2, :, ::2].transpose(1, 2).contiguous().mT


@case("inputs_expanded", group=GROUP)
def inputs_expanded() -> Any:
    """One sample shown to several places of the batch without being copied."""
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh()), torch.randn(1, 3).expand(4, -1)


@case("inputs_already_require_grad", group=GROUP)
def inputs_already_require_grad() -> Any:
    x = torch.randn(4, 3, requires_grad=True)
    x.grad = torch.ones_like(x)
    return nn.Linear(3, 2), x


@case("inputs_with_a_history", group=GROUP)
def inputs_with_a_history() -> Any:
    """The input itself was computed from something: the Jacobian starts at the input."""
    return lambda x: x.exp().cumsum(1), torch.randn(4, 3, requires_grad=True) * 2
