"""``jax.jit(jax.vmap(jax.jacrev(f)))``, or ``jacfwd`` where that is faster; and a training step."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from torch import Tensor, nn

from benchmarks.steps import Added
from benchmarks.translate import Compiled, array, forward, to_last
from benchmarks.ways import Compute, NotWrittenError

LETTERS = "DHW"


class JaxOps:
    """JAX's names for what ``translate`` needs."""

    relu = staticmethod(jax.nn.relu)
    tanh = staticmethod(jnp.tanh)
    sigmoid = staticmethod(jax.nn.sigmoid)
    reshape = staticmethod(jnp.reshape)
    transpose = staticmethod(jnp.transpose)

    def gelu(self, x: Any) -> Any:
        return jax.nn.gelu(x, approximate=False)

    def softmax(self, x: Any) -> Any:
        return jax.nn.softmax(x, axis=-1)

    def mean(self, x: Any, axes: tuple[int, ...], keep: bool = False) -> Any:
        return jnp.mean(x, axis=axes, keepdims=keep)

    def conv(self, x: Any, kernel: Any, stride: tuple[int, ...], pad: tuple[int, ...]) -> Any:
        space = LETTERS[: x.ndim - 2]
        names = (f"N{space}C", f"{space}IO", f"N{space}C")
        return lax.conv_general_dilated(
            x, kernel, stride, [(p, p) for p in pad], dimension_numbers=names
        )

    def conv_transpose(self, x: Any, kernel: Any, stride: int, pad: int) -> Any:
        flipped = np.swapaxes(kernel[::-1, ::-1], 2, 3)  # [h, w, inputs, outputs]
        edge = kernel.shape[0] - 1 - pad
        return lax.conv_general_dilated(
            x, flipped, (1, 1), [(edge, edge)] * 2, lhs_dilation=(stride, stride),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    def max_pool(self, x: Any, size: int, stride: int, pad: int) -> Any:
        space = x.ndim - 2
        window, steps = (1, *[size] * space, 1), (1, *[stride] * space, 1)
        edges = [(0, 0), *[(pad, pad)] * space, (0, 0)]
        return lax.reduce_window(x, -np.inf, lax.max, window, steps, edges)


def seconds(function: Any, x: Any) -> float:
    function(x).block_until_ready()  # compiles
    start = time.perf_counter()
    function(x).block_until_ready()
    return time.perf_counter() - start


def prepare(model: nn.Module, x: Tensor) -> Compute:
    """Both modes are tried on a few samples, and the faster is kept."""
    if x.device.type != "cpu":
        raise RuntimeError("JAX is installed for CPUs only")
    ops = JaxOps()

    def one(sample: Any) -> Any:
        return forward(ops, model, sample[None])[0]

    function = jax.jit(jax.vmap(jax.jacrev(one)))
    few = to_last(model, x[:8])
    y = jax.eval_shape(one, few[0])
    if few[0].size <= 8 * y.size:  # beyond that no kernel makes up for the number of columns
        other = jax.jit(jax.vmap(jax.jacfwd(one)))
        function = min(function, other, key=lambda f: seconds(f, few))

    def compiler(given: Any) -> Any:
        made = function.lower(given).compile()
        return lambda x: made(x).block_until_ready()

    return Compiled(model, jnp.asarray, compiler)


def network(layer: nn.Module, weights: Iterator[Any], x: Any) -> Any:
    """A chain of dense layers and residual blocks, its weights taken in the order they come."""
    match layer:
        case nn.Sequential():
            for each in layer:
                x = network(each, weights, x)
            return x
        case Added():
            return x + network(layer.body, weights, x)
        case nn.Linear():
            return x @ next(weights).T + next(weights)
        case nn.Tanh():
            return jnp.tanh(x)
    raise NotWrittenError(type(layer).__name__)


def training_step(of: str, model: nn.Module, x: Tensor) -> Callable[[], tuple[Any, list[Any]]]:
    """``jit(value_and_grad)`` of a step's loss, compiled beforehand, in the faster mode."""
    weights, given = [jnp.asarray(array(p)) for p in model.parameters()], jnp.asarray(array(x))

    def loss(jacobian: Any, weights: list[Any], x: Any) -> Any:
        def one(sample: Any) -> Any:
            y = network(model, iter(weights), sample)
            return y, y

        j, y = jax.vmap(jacobian(one, has_aux=True))(x)
        if of == "inverse":
            return ((y**2).sum(1) + (jnp.linalg.inv(j) ** 2).sum((1, 2))).mean()
        return ((y**2).sum(1) / 2 - jnp.linalg.slogdet(j)[1]).mean()

    def compiled(jacobian: Any, x: Any) -> Any:
        step = jax.jit(jax.value_and_grad(partial(loss, jacobian)))
        made = step.lower(weights, x).compile()
        return lambda: jax.block_until_ready(made(weights, x))

    few = given[:64]
    best = min((jax.jacrev, jax.jacfwd), key=lambda j: fastest(compiled(j, few)))
    call = compiled(best, given)

    def step() -> tuple[Any, list[Any]]:
        value, gradients = call()
        return value, list(gradients)

    return step


def fastest(call: Callable[[], Any]) -> float:
    """Seconds of the best of five calls."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
