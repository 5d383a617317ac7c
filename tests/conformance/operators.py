"""Every differentiable operator of ``op_db``, each of its samples asked about on several routes.

single    f takes one sample, ``batched=False``: the graph holds what vmap makes of the operator.
          The truth is the reference on the loop, so vmap's forward is held to it as well
loop      f stacks the operator over the samples in a Python loop: the graph holds plain nodes
batch     f is the operator itself on the stacked tensors, whatever it makes of the first axis;
          kept when the output has that axis. Where it mixes samples, both engines must refuse
complex   as ``loop``, complex inside f and ``view_as_real`` at its boundary
in place  as ``loop``, written in place into a view
second    as ``loop``, with ``create_graph=True``; the derivative of the Jacobian too
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .batch import Batch, Function, Looped, N, OneSample, Whole, batch, picked
from .databases import op_db, seeded
from .verdict import Case, forward

INPUT_NUMBERS = 160  # samples with more numbers than this only where the operator has no smaller
SAMPLES_SEEN = 400  # of an operator that has more, the first


def label(op: Any) -> str:
    """The operator's name and variant, as torch's own tests print it."""
    return f"{op.name}, {op.variant_test_name}" if op.variant_test_name else str(op.name)


# by the kind of the database's entry, where the name has no namespace
FAMILIES = {
    "UnaryUfuncInfo": "Element by element, one argument",
    "BinaryUfuncInfo": "Element by element, two arguments",
    "ReductionOpInfo": "Reductions",
}


def family(op: Any) -> str:
    """Where the operator stands on the page."""
    if "." in op.name:
        return str(op.name.rpartition(".")[0])
    return FAMILIES.get(type(op).__name__, "Shapes, indices, products and the rest")


@functools.cache
def operators() -> list[Any]:
    """Every operator with a derivative for real double precision."""
    return [op for op in op_db() if op.supports_autograd and torch.float64 in op.dtypes]


def cases(op: Any, samples: int) -> Iterator[Case]:
    """At most ``samples`` samples of the operator, on every route that each one allows."""
    found = batches(op, torch.float64)
    for given, finish in picked(found, samples):
        yield from _routes(op, given, finish)
    if torch.complex128 in op.dtypes:
        for given, finish in picked(batches(op, torch.complex128), 1):
            yield from _running(_case(op, "complex", given, Looped, _finished(op.op, finish)))
    for given, finish in picked(found, 1):
        if op.inplace_variant is not None:
            yield from _running(_case(op, "in place", given, Looped, _in_view(op)))
        if op.supports_gradgrad:
            plain = _finished(op.op, finish)
            yield from _running(_case(op, "second", given, Looped, plain, create_graph=True))


def _routes(op: Any, given: Batch, finish: Function) -> Iterator[Case]:
    plain = _finished(op.op, finish)
    loop = _case(op, "loop", given, Looped, plain)
    if isinstance(forward(loop), Exception):
        return
    single = _case(op, "single", given, OneSample, plain, batched=False)
    yield single if is_random(single) else replace(single, truth=loop)
    yield loop
    whole = _case(op, "batch", given, Whole, plain)
    if _keeps_axis(forward(whole)):
        yield whole


def _case(
    op: Any, route: str, given: Batch, kind: Function, function: Function,
    **options: Any,
) -> Case:  # fmt: skip
    detail = f"({given.detail})"

    def build() -> tuple[Function, Any]:
        return kind(function, given), given.inputs

    return Case(label(op), route, detail, build, options)


def _finished(function: Function, finish: Function) -> Function:
    """The function, and what torch's tests do to its result (a phase made definite, say)."""
    return lambda *args, **kwargs: finish(function(*args, **kwargs))


def _in_view(op: Any) -> Function:
    """Half of a tensor written in place, the other half kept."""

    def function(given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = torch.stack([given, given])
        op.inplace_variant(base[0], *args, **kwargs)
        return base

    return function


def batches(op: Any, dtype: torch.dtype) -> list[tuple[Batch, Function]]:
    """All small samples of the operator, else the smallest; with what finishes each result."""
    columns = zip(*(_samples(op, dtype, seed) for seed in range(N)), strict=False)
    found = []
    for column in columns:
        given = batch([((s.input, *s.args), s.kwargs) for s in column])
        if given is not None:
            found.append((given, column[0].output_process_fn_grad))
    found = list({given.detail: (given, finish) for given, finish in found}.values())
    small = [pair for pair in found if pair[0].numbers <= INPUT_NUMBERS]
    return small or sorted(found, key=lambda pair: pair[0].numbers)[:1]


def _samples(op: Any, dtype: torch.dtype, seed: int) -> list[Any]:
    with seeded(seed):
        made = op.sample_inputs("cpu", dtype, requires_grad=True)
        return list(itertools.islice(made, SAMPLES_SEEN))


def _running(case: Case) -> Iterator[Case]:
    """The case if its function runs: an operator may not take such arguments."""
    if not isinstance(forward(case), Exception):
        yield case


def _keeps_axis(result: Any) -> bool:
    """Whether there are floating outputs and all have the samples first."""
    if isinstance(result, Exception):
        return False
    floating = [t for t in result if t.is_floating_point()]
    return bool(floating) and all(t.dim() > 0 and t.shape[0] == N for t in floating)


def is_random(single: Case) -> bool:
    """Whether a function of one sample draws random numbers, by the word of vmap."""
    f, inputs = single.build()
    try:
        torch.vmap(f, randomness="error")(*inputs)
    except Exception as error:  # vmap fails in many ways; only this one is about randomness
        return "randomness" in str(error)
    return False
