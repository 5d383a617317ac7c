"""A case's PyTorch model in another library: the same weights, channels last.

The walk over the layers is written once, against a few operations (``Ops``) that JAX and TensorFlow
each give under their own names. Channels last is what both do best on CPUs.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.ways import NotWrittenError


class Ops(Protocol):
    """What a library has to bring; ``x`` is one of its arrays, ``[N, *space, channels]``."""

    def relu(self, x: Any) -> Any: ...
    def tanh(self, x: Any) -> Any: ...
    def sigmoid(self, x: Any) -> Any: ...
    def gelu(self, x: Any) -> Any: ...
    def softmax(self, x: Any) -> Any: ...
    def mean(self, x: Any, axes: tuple[int, ...], keep: bool = False) -> Any: ...
    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any: ...
    def transpose(self, x: Any, axes: tuple[int, ...]) -> Any: ...
    def conv(self, x: Any, kernel: Any, stride: tuple[int, ...], pad: tuple[int, ...]) -> Any: ...
    def conv_transpose(self, x: Any, kernel: Any, stride: int, pad: int) -> Any: ...
    def max_pool(self, x: Any, size: int, stride: int, pad: int) -> Any: ...


def array(t: Tensor) -> Any:
    """The weight as NumPy has it."""
    return t.detach().cpu().numpy()


def dense(x: Any, layer: nn.Linear) -> Any:
    return x @ array(layer.weight).T + array(layer.bias)


def conv(ops: Ops, x: Any, layer: Any) -> Any:
    kernel = np.moveaxis(array(layer.weight), (0, 1), (-1, -2))  # [*k, inputs, outputs]
    y = ops.conv(x, kernel, layer.stride, layer.padding)
    return y if layer.bias is None else y + array(layer.bias)


def conv_transpose(ops: Ops, x: Any, layer: nn.ConvTranspose2d) -> Any:
    kernel = np.moveaxis(array(layer.weight), (0, 1), (-1, -2))  # [*k, outputs, inputs]
    y = ops.conv_transpose(x, kernel, int(layer.stride[0]), int(layer.padding[0]))
    assert layer.bias is not None
    return y + array(layer.bias)


def batch_norm(x: Any, layer: nn.BatchNorm2d) -> Any:
    assert layer.running_var is not None
    assert layer.running_mean is not None
    scale = array(layer.weight) / np.sqrt(array(layer.running_var) + layer.eps)
    return x * scale + (array(layer.bias) - array(layer.running_mean) * scale)


def layer_norm(ops: Ops, x: Any, layer: nn.LayerNorm) -> Any:
    centred = x - ops.mean(x, (-1,), keep=True)
    spread = (ops.mean(centred * centred, (-1,), keep=True) + layer.eps) ** 0.5
    return centred / spread * array(layer.weight) + array(layer.bias)


def attention(ops: Ops, qkv: Any, heads: int, causal: bool) -> Any:
    """Softmax attention from ``[N, T, 3d]``."""
    n, t, width = (int(s) for s in qkv.shape)
    each = width // 3 // heads
    parts = ops.transpose(ops.reshape(qkv, (n, t, 3, heads, each)), (2, 0, 3, 1, 4))
    q, k, v = parts[0], parts[1], parts[2]
    scores = q @ ops.transpose(k, (0, 1, 3, 2)) / np.float32(np.sqrt(each))
    if causal:
        scores = scores + np.triu(np.full((t, t), -1e30, np.float32), 1)
    mixed = ops.transpose(ops.softmax(scores) @ v, (0, 2, 1, 3))
    return ops.reshape(mixed, (n, t, width // 3))


def encoder_layer(ops: Ops, x: Any, layer: nn.TransformerEncoderLayer) -> Any:
    own = layer.self_attn
    assert own.in_proj_weight is not None
    qkv = x @ array(own.in_proj_weight).T + array(own.in_proj_bias)
    mixed = dense(attention(ops, qkv, own.num_heads, causal=False), own.out_proj)
    x = layer_norm(ops, x + mixed, layer.norm1)
    hidden = ops.relu(dense(x, layer.linear1))
    return layer_norm(ops, x + dense(hidden, layer.linear2), layer.norm2)


def block(ops: Ops, x: Any, layer: models.Block) -> Any:
    qkv = dense(layer_norm(ops, x, layer.before), layer.project)
    x = x + dense(attention(ops, qkv, layer.heads, causal=True), layer.join)
    grown = ops.gelu(dense(layer_norm(ops, x, layer.between), layer.grow))
    return x + dense(grown, layer.shrink)


def last_state(ops: Ops, x: Any, cells: nn.GRU) -> Any:
    """The equations in the documentation of ``torch.nn.GRU``, one step after the other."""
    w, u = array(cells.weight_ih_l0).T, array(cells.weight_hh_l0).T
    steps, width = int(x.shape[1]), cells.hidden_size
    inputs = x @ w + array(cells.bias_ih_l0)
    h = inputs[:, 0, :width] * 0
    for t in range(steps):
        a, b = inputs[:, t], h @ u + array(cells.bias_hh_l0)
        r = ops.sigmoid(a[:, :width] + b[:, :width])
        z = ops.sigmoid(a[:, width : 2 * width] + b[:, width : 2 * width])
        new = ops.tanh(a[:, 2 * width :] + r * b[:, 2 * width :])
        h = (1 - z) * new + z * h
    return h


def channels_second(rank: int) -> tuple[int, ...]:
    """The axes that turn channels last into PyTorch's order."""
    return (0, rank - 1, *range(1, rank - 1))


def forward(ops: Ops, layer: nn.Module, x: Any) -> Any:
    """``layer(x)`` in the other library."""
    match layer:
        case nn.Sequential():
            for each in layer:
                x = forward(ops, each, x)
            return x
        case nn.TransformerEncoder():
            for each in layer.layers:
                # a ModuleList is typed as one of any modules
                x = encoder_layer(ops, x, each)  # type: ignore[arg-type]
            return x
        case models.Residual():
            return ops.relu(forward(ops, layer.body, x) + forward(ops, layer.skip, x))
        case models.Patches():
            y = conv(ops, x, layer.cut)
            n, *space, width = (int(s) for s in y.shape)
            return ops.reshape(y, (n, space[0] * space[1], width)) + array(layer.position)
        case models.LastState():
            return last_state(ops, x, layer.cells)
        case models.Block():
            return block(ops, x, layer)
        case nn.Linear():
            return dense(x, layer)
        case nn.Conv1d() | nn.Conv2d():
            return conv(ops, x, layer)
        case nn.ConvTranspose2d():
            return conv_transpose(ops, x, layer)
        case nn.BatchNorm2d():
            return batch_norm(x, layer)
    return simple(ops, layer, x)


def simple(ops: Ops, layer: nn.Module, x: Any) -> Any:
    """A layer without weights."""
    rank = len(x.shape)
    match layer:
        case nn.ReLU():
            return ops.relu(x)
        case nn.Tanh():
            return ops.tanh(x)
        case nn.Identity():
            return x
        case nn.MaxPool1d() | nn.MaxPool2d():
            # torch types sizes as an int or several; the models here give one int
            return ops.max_pool(x, layer.kernel_size, layer.stride, layer.padding)  # type: ignore[arg-type]
        case nn.AdaptiveAvgPool1d() | nn.AdaptiveAvgPool2d():
            return ops.mean(x, tuple(range(1, rank - 1)), keep=True)
        case models.TokenMean():
            return ops.mean(x, (1,))
        case nn.Flatten():
            y = ops.transpose(x, channels_second(rank)) if rank > 2 else x
            return ops.reshape(y, (int(y.shape[0]), int(np.prod([int(s) for s in y.shape[1:]]))))
        case nn.Unflatten():
            # torch types the sizes as named pairs too; the models here give plain ones
            y = ops.reshape(x, (int(x.shape[0]), *layer.unflattened_size))  # type: ignore[misc]
            return ops.transpose(y, (0, *range(2, len(y.shape)), 1))
    raise NotWrittenError(type(layer).__name__)


def spatial(model: nn.Module) -> bool:
    """Whether the model takes images or signals, which have channels."""
    leaves = [m for m in model.modules() if not list(m.children())]
    return isinstance(leaves[0], nn.Conv1d | nn.Conv2d) or isinstance(
        next(iter(model.children()), None), models.Patches
    )


def to_last(model: nn.Module, x: Tensor) -> Any:
    """The inputs in the library's order."""
    return array(x.movedim(1, -1).contiguous() if spatial(model) else x)


def from_last(model: nn.Module, j: Any, rank: int) -> Tensor:
    """Its Jacobian in PyTorch's order; ``rank`` axes belong to the inputs, samples included."""
    t = torch.from_numpy(np.array(j))
    if not spatial(model):
        return t
    t = t.movedim(-1, -rank + 1)
    out = t.ndim - rank + 1  # axes of the outputs, samples included
    return t.movedim(out - 1, 1) if out > 2 else t


class Foreign:
    """A Jacobian where the other library has it, and as a tensor when somebody asks."""

    def __init__(self, model: nn.Module, j: Any, rank: int) -> None:
        self.model, self.j, self.rank = model, j, rank

    def tensor(self) -> Tensor:
        return from_last(self.model, self.j, self.rank)


class Compiled:
    """The way of another library: inputs placed and graphs compiled before any clock starts."""

    def __init__(
        self, model: nn.Module, place: Callable[[Any], Any], compiler: Callable[[Any], Any]
    ) -> None:
        self.model, self.place, self.compiler = model, place, compiler
        self.placed: dict[tuple[int, int], Any] = {}
        self.functions: dict[int, Any] = {}

    def compile(self, x: Tensor) -> Any:
        """The function for this many samples, and the samples."""
        key = (x.data_ptr(), len(x))
        if key not in self.placed:
            self.placed[key] = self.place(to_last(self.model, x))
        given = self.placed[key]
        if len(x) not in self.functions:
            self.functions[len(x)] = self.compiler(given)
        return self.functions[len(x)], given

    def __call__(self, x: Tensor, into: Tensor | None) -> Foreign:
        function, given = self.compile(x)
        return Foreign(self.model, function(given), x.ndim)
