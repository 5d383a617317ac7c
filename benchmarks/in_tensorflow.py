"""``tf.GradientTape.batch_jacobian`` under ``tf.function``."""

import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import tensorflow as tf
from torch import Tensor, nn

from benchmarks.translate import Compiled, forward
from benchmarks.ways import Compute


class TensorFlowOps:
    """TensorFlow's names for what ``translate`` needs."""

    relu = staticmethod(tf.nn.relu)
    tanh = staticmethod(tf.tanh)
    sigmoid = staticmethod(tf.sigmoid)
    softmax = staticmethod(tf.nn.softmax)
    gelu = staticmethod(tf.nn.gelu)
    reshape = staticmethod(tf.reshape)
    transpose = staticmethod(tf.transpose)

    def mean(self, x: Any, axes: tuple[int, ...], keep: bool = False) -> Any:
        return tf.reduce_mean(x, axes, keepdims=keep)

    def conv(self, x: Any, kernel: Any, stride: tuple[int, ...], pad: tuple[int, ...]) -> Any:
        size = kernel.shape[: len(pad)]
        same = set(stride) == {1} and all(2 * p == k - 1 for p, k in zip(pad, size, strict=True))
        if not same and any(pad):
            x = tf.pad(x, [(0, 0), *[(p, p) for p in pad], (0, 0)])
        return tf.nn.convolution(x, kernel, list(stride), "SAME" if same else "VALID")

    def conv_transpose(self, x: Any, kernel: Any, stride: int, pad: int) -> Any:
        n, height, width, _ = x.shape
        assert kernel.shape[0] - stride == 2 * pad  # what "SAME" takes away on both sides
        shape = (n, height * stride, width * stride, kernel.shape[2])
        return tf.nn.conv2d_transpose(x, kernel, shape, stride, "SAME")

    def max_pool(self, x: Any, size: int, stride: int, pad: int) -> Any:
        space = len(x.shape) - 2
        if pad:
            edges = [(0, 0), *[(pad, pad)] * space, (0, 0)]
            x = tf.pad(x, edges, constant_values=float(np.finfo(np.float32).min))
        pool = tf.nn.max_pool1d if space == 1 else tf.nn.max_pool2d
        return pool(x, size, stride, "VALID")


def prepare(model: nn.Module, x: Tensor) -> Compute:
    """One graph for each number of samples."""
    if x.device.type != "cpu":
        raise RuntimeError("TensorFlow is installed for CPUs only")
    ops = TensorFlowOps()

    @tf.function(autograph=False)
    def jacobian(part: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(part)
            y = forward(ops, model, part)
        return tape.batch_jacobian(y, part)

    return Compiled(model, tf.constant, jacobian.get_concrete_function)
