"""The loops that the authors of the questions in docs/from_your_loop.md used, to compare with.

Both take a model and a batch ``x [N, *in]`` and return ``[N, out, *in]``.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Loop = Callable[[nn.Module, Tensor], Tensor]
QUESTION_4_BATCH = 12


def einsum_of_functional(model: nn.Module, x: Tensor) -> Tensor:
    """Question 4 and its answer: the diagonal of the doubled batch axis, 12 samples at a time.

    More samples at a time cost more per sample, since the zeros grow with their square.

    >>> einsum_of_functional(nn.Linear(3, 2), torch.zeros(15, 3)).shape
    torch.Size([15, 2, 3])
    """
    parts = []
    for rows in x.split(QUESTION_4_BATCH):
        doubled = torch.autograd.functional.jacobian(model, rows, vectorize=True)
        parts.append(torch.einsum("bib...->bi...", doubled))
    return torch.cat(parts)


def functional_per_sample(model: nn.Module, x: Tensor) -> Tensor:
    """Question 3: one ``functional.jacobian`` for each sample, each of shape ``[1, o, 1, *in]``.

    >>> functional_per_sample(nn.Linear(3, 2), torch.zeros(5, 3)).shape
    torch.Size([5, 2, 3])
    """
    parts = [torch.autograd.functional.jacobian(model, point) for point in x.split(1)]
    return torch.cat(parts)[:, :, 0]


@dataclass(frozen=True)
class Comparison:
    """What a loop took for the first samples, and how far its result is from ours there."""

    loop: str
    samples: int
    seconds: float
    seconds_all: float
    """Extrapolated: `seconds` times all samples over `samples`."""
    largest_difference: float
    largest_entry: float


def compare(
    loop: Loop, name: str, model: nn.Module, x: Tensor, ours: Tensor, *, samples: int
) -> Comparison:
    """Run `loop` on the first `samples` of ``x [N, *in]`` and compare with ``ours [N, o, *in]``.

    The time is the median of three runs, after one that is not counted.
    """
    subset = x[:samples]
    loop(model, subset[:QUESTION_4_BATCH])
    times = []
    for _ in range(3):
        start = time.perf_counter()
        theirs = loop(model, subset)
        times.append(time.perf_counter() - start)
    seconds = sorted(times)[1]
    return Comparison(
        loop=name,
        samples=len(subset),
        seconds=seconds,
        seconds_all=seconds * len(x) / len(subset),
        largest_difference=float((theirs - ours[: len(subset)]).abs().max()),
        largest_entry=float(theirs.abs().max()),
    )
