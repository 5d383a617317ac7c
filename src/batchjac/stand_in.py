"""Finite numbers in the place of samples whose NaN hide where a cotangent goes.

A cotangent of zero comes out of a node as NaN where the node's derivative is NaN or infinite:
that may be the sample's own NaN, or a NaN that another sample put into the statistics of all. With
finite numbers in the place of those samples the same function shows which of the two it is.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from batchjac.errors import InputTypeError, is_out_of_memory
from batchjac.problem import Problem, differentiable
from batchjac.state import normal
from batchjac.tree import Tree

log = logging.getLogger("batchjac")

_LOOK = 1 << 20  # entries of an input looked at together: what that copies is outside the budget


@dataclass(frozen=True)
class Seen:
    """What gradients say about samples that no cotangent was put on.

    ``leaks``: some of them have a gradient. ``partly`` and ``wholly``, ``[N]``: nothing can be
    said about entries of this sample, or about all entries of one tensor of it, which are NaN.
    """

    leaks: bool
    partly: Tensor
    wholly: Tensor


def look(gradient: Tensor, others: Tensor) -> Seen:
    """What one ``gradient [N, ...]`` says about the samples in the mask ``others [N]``."""
    flat = gradient.detach().reshape(len(others), -1)
    nan = flat.isnan() & others.to(flat.device)[:, None]
    leaks = ((flat != 0) & ~flat.isnan())[others.to(flat.device)].any()
    wholly = nan.all(1) & nan.any(1)  # all of nothing is nothing
    return Seen(bool(leaks), nan.any(1).cpu(), wholly.cpu())


def together(first: Seen, second: Seen) -> Seen:
    """Both observations."""
    return Seen(
        first.leaks or second.leaks, first.partly | second.partly, first.wholly | second.wholly
    )


def unseen(samples: int) -> Seen:
    """No gradient at all."""
    nothing = torch.zeros(samples, dtype=torch.bool)
    return Seen(False, nothing, nothing)


def decide(problem: Problem, samples: slice, seen: Seen, again: Callable[[Problem], Seen]) -> Seen:
    """What was ``seen``, or what is seen ``again`` with finite numbers where NaN hid it.

    First in the place of samples that hold NaN or infinity; then, where a sample has no gradient
    but NaN even so (the root of a sum that is zero), in its place too. Single entries that are NaN
    with finite inputs are kinks and say nothing against the others, which are zero.
    """
    if seen.leaks or not seen.partly.any():
        return seen
    bad = not_finite(problem, samples)
    if bad.any():
        seen = _tried(again, stand_in(problem, samples, bad), seen)
    if not seen.leaks and seen.wholly.any():
        seen = _tried(again, stand_in(problem, samples, bad | seen.wholly), seen)
    return seen


def _tried(again: Callable[[Problem], Seen], problem: Problem, seen: Seen) -> Seen:
    """What is seen in these numbers; nothing new if the function refuses them."""
    try:
        return again(problem)
    except Exception as error:  # the user's function may refuse numbers that are not its own
        if is_out_of_memory(error):
            raise
        return seen


def not_finite(problem: Problem, samples: slice) -> Tensor:
    """Which samples hold NaN or infinity, as a mask."""
    parts = [normal(t)[samples] for t in problem.tree.leaves if differentiable(t)]
    count = len(range(*samples.indices(problem.samples)))
    bad = torch.zeros(count, dtype=torch.bool)
    for part in parts:
        bad |= ~part.detach().isfinite().reshape(count, -1).all(1).cpu()
    return bad


def stand_in(problem: Problem, samples: slice, bad: Tensor) -> Problem:
    """The same question about these samples alone, other numbers in the place of ``bad`` ones.

    They are those of other samples, a little smaller, so that signs and sizes stay what the
    function expects and no two samples are equal; near one where there is no other sample.
    """
    generator = torch.Generator().manual_seed(len(bad))  # its own: the user's random state stays

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        data = normal(leaf)[samples].detach()
        return _filled(data, bad, generator) if differentiable(leaf) else data

    tree = problem.tree
    leaves = tuple(part(leaf) for leaf in tree.leaves)
    return replace(
        problem, tree=Tree(leaves, tree.paths, tree.build), inputs=tree.build(leaves),
        samples=len(bad), create_graph=False,
    )  # fmt: skip


def _filled(data: Tensor, bad: Tensor, generator: torch.Generator) -> Tensor:
    shape = (int(bad.sum()), *data.shape[1:])
    factor = 1 - 0.25 * torch.rand(shape, generator=generator)
    numbers = factor.to(data.device, data.dtype)
    good = data[~bad.to(data.device)]
    if len(good):
        numbers = numbers * good[torch.arange(shape[0], device=data.device) % len(good)]
    filled = data.clone()
    filled[bad.to(data.device)] = numbers
    return filled


def count_nan(problem: Problem) -> None:
    """Say in the log how many samples hold NaN."""
    for path, leaf in zip(problem.tree.paths, problem.tree.leaves, strict=True):
        if isinstance(leaf, Tensor) and leaf.is_meta:  # enough for a plan
            raise InputTypeError(f"inputs{path} is on the meta device and holds no numbers")
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            continue
        if not leaf.detach().sum().isnan():  # one pass, and nothing made; inf - inf is looked at
            continue
        some = max(1, _LOOK // max(1, leaf[:1].numel()))
        bad = sum(
            int(part.reshape(len(part), -1).isnan().any(1).sum())
            for part in leaf.detach().split(some)
        )
        if bad:
            log.warning(
                "inputs%s: %d of %d samples hold NaN, which passes through to their Jacobians",
                path, bad, problem.samples,
            )  # fmt: skip
