"""Which kernel each node of a planned walk will use, in words: one line for each kind and shape.

Only nodes with more than one kernel, or with one that is not torch's own, have a line. What
``kernels`` chooses by measuring is known once it was measured on this machine for this shape.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from batchjac import convolutions, kernels
from batchjac.graph import Step
from batchjac.rules import conv, registry

LATER = "measured at the first call"
MOST = 12  # lines; of more the shapes are left out

CONVOLUTIONS = {
    "backward": "backward operator",
    "posed": "transposed convolution",
    "channels_last": "channels-last convolution",
    "channels_last_within": "channels-last convolution, its result put in order",
    "columns": "product and shifted adds",
    "own": "our own kernel",
}
_LEFT = {"MmBackward0": 0, "AddmmBackward0": 1, "BmmBackward0": 0}  # the edge of the left factor


@dataclass(frozen=True)
class Pushed:
    """A node and how it is passed: ``images``, rows times samples of one walk, ``up`` or down.

    The graph was recorded on so many ``samples``.
    """

    step: Step
    up: bool
    images: int
    samples: int


def lines(nodes: Iterable[Pushed]) -> tuple[str, ...]:
    """The kernels of these nodes."""
    found = Counter(
        (_kind(node.step), _shapes(node.step), said)
        for node in nodes
        if any(node.step.edges) and (said := _kernel(node)) is not None
    )
    if len(found) > MOST:
        short: Counter[tuple[str, str, str]] = Counter()
        for (kind, _, said), count in found.items():
            short[kind, "", said] += count
        found = short
    return tuple(
        f"{kind}{shapes}: {said}{f'  x{count}' if count > 1 else ''}"
        for (kind, shapes, said), count in found.items()
    )


def _kind(step: Step) -> str:
    return step.name.rstrip("0123456789").removesuffix("Backward")


def _shapes(step: Step) -> str:
    """From the node's output to its first wanted input, of one sample."""
    edge = next(e for e in step.edges if e is not None)
    return " " + " <- ".join("x".join(map(str, s[1:])) for s in (step.shape, edge.shape))


def _kernel(node: Pushed) -> str | None:
    """In words; None where there is nothing to choose."""
    step, up = node.step, node.up
    if registry.find(step) is None:
        return None  # told apart
    if step.name.startswith("ConvolutionBackward"):
        return "forward convolution" if up else _convolution(step, node.images)
    if step.name in _LEFT:
        return _product(step, node.images / node.samples)
    if step.name.startswith("ScaledDotProduct"):
        return "batched products for each head"
    if "MaxPool" in step.name:
        return "gathered from the forward's places" if up else "one scatter to the forward's places"
    return None


def _measured(step: Step) -> bool:
    """Whether the kernels are measured for such numbers; without any, as on a CPU."""
    meta = step.outputs[0]
    return meta.device.type in ("cpu", "meta") and meta.dtype in (torch.float32, torch.float64)


def _convolution(step: Step, images: int) -> str | None:
    edge = step.edges[0]
    if edge is None:
        return None
    if not _measured(step):
        return CONVOLUTIONS["backward"]
    shape, sizes = (images, *step.shape[1:]), (images, *edge.shape[1:])
    names = convolutions.chosen_convolution(
        conv.layer(step), shape, step.saved("weight").shape, sizes, edge.meta.dtype,
        conv.onward(edge),
    )  # fmt: skip
    return " or ".join(CONVOLUTIONS[name] for name in names) or LATER


def _product(step: Step, times: float) -> str:
    """A matrix that all rows go through; ``times`` as many of them as of samples recorded."""
    left = _LEFT[step.name]
    wanted = [k for k, e in enumerate(step.edges) if e is not None]
    if left not in wanted or (step.name[0] == "B" and step.saved("mat2").stride(0) != 0):
        return "einsum, a product for each sample"
    edge = step.edges[left]
    assert edge is not None
    small = times * math.prod(step.shape) * edge.shape[-1] < kernels.SMALL
    if small or not _measured(step) or edge.meta.dtype != torch.float32:
        return "torch.matmul"
    return kernels.chosen_linear() or LATER
