"""The specification: one ``autograd.grad`` for every sample and every output.

Slow, and right wherever PyTorch is. Every rule, mode, chunk size and device must equal it. It
assumes nothing about samples: with ``coupling="error"`` it looks at every other sample's gradient
and refuses if one is not zero.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from batchjac.answer import Part, nest, parts
from batchjac.block import dense
from batchjac.capture import Capture, Target, capture
from batchjac.errors import CouplingError
from batchjac.problem import Problem, pose
from batchjac.seeds import Seeds, seeds
from batchjac.stand_in import Seen, decide, look, together, unseen
from batchjac.state import untouched


def jacobian(
    f: Any,
    inputs: Any,
    *,
    of: str | None = None,
    wrt: str | Sequence[str] | None = None,
    outputs: Any = None,
    coupling: str = "error",
    create_graph: bool = False,
    batched: bool = True,
) -> Any:
    """The derivative of every output with respect to every sample's input, one at a time.

    Arguments, result and errors are those of ``batchjac.jacobian``.

    Cost: one forward and ``N * outputs`` backward passes.
    """
    problem = pose(
        f, inputs, wrt=wrt, of=of, outputs=outputs, mode="auto", coupling=coupling,
        create_graph=create_graph, batched=batched,
    )  # fmt: skip
    problem = replace(problem, vmapped=False)  # torch's own batching rules are not always right
    with (
        untouched(problem.module),
        _frozen_statistics(coupling == "frozen"),
        capture(problem, slice(0, problem.samples)) as captured,
    ):
        found = {part: _jacobian(problem, captured, part, t) for part, t in parts(captured)}
        _refuse_coupled_inputs(problem, captured)
        return nest(problem, captured, found.__getitem__)


def _jacobian(problem: Problem, captured: Capture, part: Part, target: Target) -> Tensor:
    y, path = captured.outputs[part[0]], captured.values.paths[part[0]]
    rows = seeds(y, problem.outputs, problem.coupling, slice(0, problem.samples), path)
    n = captured.samples
    if not rows.width:
        inner = target.shape[1:] if target.per_sample and not rows.across else target.shape
        return torch.zeros(n, *rows.shape, *inner, dtype=target.dtype)
    j = _every_row(problem, y, rows, target)
    if not target.per_sample or problem.coupling == "full":
        return j.reshape(n, *rows.shape, *target.shape)
    if problem.coupling == "sum":  # over the outputs' samples, for each sample of the input
        return j.sum(0).transpose(0, 1).reshape(n, *rows.shape, *target.shape[1:])

    def again(finite: Problem) -> Seen:
        with torch.random.fork_rng([]), capture(finite, slice(0, n)) as other:
            y = other.outputs[part[0]]
            rows = seeds(y, problem.outputs, problem.coupling, slice(0, n))
            return _seen(_every_row(finite, y, rows, dict(parts(other))[part]))

    _refuse(decide(problem, slice(0, n), _seen(j), again))
    each = torch.arange(n)
    return j.transpose(1, 2)[each, each].reshape(n, *rows.shape, *target.shape[1:])


def _every_row(problem: Problem, y: Tensor, rows: Seeds, target: Target) -> Tensor:
    """``[N, V, *target]``: the gradient of each row of each sample, whole."""
    of_sample = [
        torch.stack([_gradient(problem, y, target, c) for c in cotangents])
        for cotangents in _one_hot(rows, len(y))
    ]
    return torch.stack(of_sample)


def _seen(j: Tensor) -> Seen:
    """What the rows ``[N, V, N, *in]`` of each sample say about the others."""
    own = torch.eye(len(j), dtype=torch.bool)
    looks = [look(rows.transpose(0, 1), ~own[n]) for n, rows in enumerate(j)]
    return functools.reduce(together, looks)


def _refuse(seen: Seen) -> None:
    """Samples that leak; what is NaN whatever the numbers stays in the answer, as NaN."""
    if seen.leaks:
        raise CouplingError("the output of one sample depends on another sample")


def _refuse_coupled_inputs(problem: Problem, captured: Capture) -> None:
    """For parameters the samples show in the inputs: the gradients there must stay apart too."""
    parameters = any(w.kind == "parameter" for w in problem.wanted)
    if problem.coupling in ("sum", "full") or not parameters:
        return
    whole = slice(0, problem.samples)

    def again(finite: Problem) -> Seen:
        with torch.random.fork_rng([]), capture(finite, whole) as other:
            return _seen_in_inputs(finite, other)

    _refuse(decide(problem, whole, _seen_in_inputs(problem, captured), again))


def _seen_in_inputs(problem: Problem, captured: Capture) -> Seen:
    n, edges = captured.samples, captured.inputs
    seen = unseen(n)
    for y in captured.outputs.values():
        rows = seeds(y, problem.outputs, problem.coupling, slice(0, n))
        if not y.requires_grad or not edges:
            continue
        for sample, cotangents in enumerate(_one_hot(rows, n)):
            others = torch.arange(n) != sample
            for cotangent in cotangents:
                grads = torch.autograd.grad(
                    y, edges, cotangent, retain_graph=True, allow_unused=True
                )
                for g in grads:
                    if g is not None:
                        seen = together(seen, look(dense(g), others))
    return seen


def _one_hot(rows: Seeds, n: int) -> Iterator[list[Tensor]]:
    """For every sample, its cotangents ``[N, *out]``, each with a single 1."""
    width = len(rows.entries)
    for sample in range(n):
        cotangents = []
        for v in range(width):
            weights = torch.zeros(n, width)
            weights[sample, v] = 1
            cotangents.append(rows.combined(weights))
        yield cotangents


def _gradient(problem: Problem, y: Tensor, target: Target, cotangent: Tensor) -> Tensor:
    zero = torch.zeros(target.shape, dtype=target.dtype, device=target.device)
    if not y.requires_grad or target.edge is None:
        return zero
    (g,) = torch.autograd.grad(
        y, target.edge, cotangent, retain_graph=True, create_graph=problem.create_graph,
        allow_unused=True,
    )  # fmt: skip
    return zero if g is None else dense(g)


@contextlib.contextmanager
def _frozen_statistics(active: bool) -> Iterator[None]:
    if not active:
        yield
        return
    with _FrozenStatistics():
        yield


class _FrozenStatistics(TorchFunctionMode):
    """``F.batch_norm`` in training, written out with its batch statistics held constant."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.batch_norm:
            return func(*args, **kwargs)
        return _batch_norm(*args, **kwargs)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    def per_channel(t: Tensor) -> Tensor:
        return t.reshape(1, -1, *(1,) * (x.dim() - 2))

    if training:
        over = [0, *range(2, x.dim())]
        mean, var = x.detach().mean(over), x.detach().var(over, unbiased=False)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean, running_var
    y = (x - per_channel(mean)) * per_channel((var + eps).rsqrt())
    y = y if weight is None else y * per_channel(weight)
    return y if bias is None else y + per_channel(bias)
