"""A differentiable map over chunks of samples whose history is never held whole.

The answer is computed without a history, chunk by chunk. In the backward pass every chunk is
computed again, now with one, its share of the cotangent is pulled back, and it is freed. As
``torch.utils.checkpoint`` does for a part of a forward; here the part is a Jacobian.

Source: Griewank and Walther, Evaluating Derivatives, 2nd ed., 2008, chapter 12: checkpointing.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from batchjac import history, memory
from batchjac.again import Task, Then, autocasts
from batchjac.capture import capture
from batchjac.engines.sweep import Kernels
from batchjac.errors import UnsupportedError
from batchjac.graph import let_go, taken_apart
from batchjac.job import jobs
from batchjac.memory import Chunk
from batchjac.problem import Problem, differentiable
from batchjac.sink import size
from batchjac.solution import Solution
from batchjac.solve import solve
from batchjac.state import load_random, remembered
from batchjac.tree import Tree, emptied, flatten
from batchjac.work import need, width


def recomputed(
    problem: Problem,
    then: Then,
    max_memory: int | str | None,
    *,
    copies: float = 0,
    whole: bool = False,
    fixed: int | None = None,
) -> list[Tensor]:
    """What ``then`` makes of the Jacobian of some samples, for all samples, joined along them.

    With ``problem.create_graph`` the answer is differentiable by all that the function, and
    ``then``, read: inputs, parameters, tensors they captured. Every chunk is computed again in the
    backward pass. Without, chunks keep to the budget and no more.

    Args:
        problem: The question, with ``coupling="error"``: samples are independent.
        then: Called on the ``Solution`` of some samples and their slice of the batch. It returns
            tensors whose first axis is these samples, always as many and of the same shapes beyond
            it. It must be a function of its arguments and of tensors that it only reads.
        max_memory: Bytes for all that a call takes, forward and backward: the answer, its
            gradient, gradients of what it is differentiated by, and one chunk.
        copies: How many tensors of the size of the Jacobian ``then`` holds, its history included.
        whole: What ``then`` returns is the Jacobian itself; else it is called on the first samples
            once more, to see how much it returns.
        fixed: Samples in one chunk, whatever fits; for tests.

    Raises:
        BudgetError: One sample does not fit.
        StateError, RuntimeError (in the backward pass): What was read has changed since.
    """
    assert problem.coupling == "error", "samples that depend on each other stay together"
    device = next(t.device for t in problem.tree.leaves if isinstance(t, Tensor))
    allowed = memory.budget(max_memory, device)
    count, rows, kept = _measured(problem, allowed, copies, None if whole else then)
    task = Task(problem, then, fixed or count, rows, allowed - kept, autocasts())
    results = task.forward()
    if not problem.create_graph or not task.tensors:
        return results
    return task.recorded(results)


def answer(
    problem: Problem,
    max_memory: int | str | None,
    out: Any,
    fixed: Chunk | None = None,
    valued: bool = False,
) -> Solution:
    """What ``solve`` finds; chunks are computed again where a history does not fit the budget."""
    if problem.create_graph and max_memory is not None:
        load_random()  # at the first such call, not when a larger one is first done again
    try:
        return solve(problem, max_memory, out, fixed, valued)
    except history.TooLong:
        if problem.coupling != "error":
            raise
    trees: list[tuple[int, Tree, Tree]] = []  # samples, value and Jacobian, without their numbers

    def then(solution: Solution, samples: slice) -> list[Tensor]:
        value = flatten(solution.value() if valued else None)
        j = flatten(solution.jacobian)
        if not torch.is_grad_enabled():
            trees.append((samples.stop - samples.start, _bare(value), _bare(j)))
        return [leaf for leaf in (*value.leaves, *j.leaves) if differentiable(leaf)]

    found = iter(recomputed(problem, then, max_memory, whole=True))
    chunks = [(n, value) for n, value, _ in trees]
    value = flatten(Solution(chunks, None).value())
    value = flatten(value.map(lambda leaf: next(found) if differentiable(leaf) else leaf))
    j = trees[0][2]
    return Solution(
        [(problem.samples, value)], j.map(lambda leaf: leaf if leaf is None else next(found))
    )


def _bare(tree: Tree) -> Tree:
    """The nesting, whose floating numbers come as results."""
    return emptied(tree, lambda t: t.new_empty(len(t), 0) if differentiable(t) else t)


def _measured(
    problem: Problem, allowed: int, copies: float, then: Then | None
) -> tuple[int, int, int]:
    """How many samples go together, the rows of each, and bytes of what is kept."""
    tensors = [t for t in problem.tree.leaves if isinstance(t, Tensor)]
    n = memory.first(tensors, problem.module, problem.samples, allowed, told=True)
    with remembered(problem.module) as before, taken_apart(before.restore):
        with capture(problem, slice(0, n)) as captured:
            if captured.hooked and problem.create_graph:
                raise UnsupportedError(
                    "the function hooks gradients, and what a hook does to the gradient of a loss "
                    "may depend on all samples at once, which max_memory does not hold; raise "
                    "max_memory so that the whole history fits, or remove the hooks"
                )
            work = jobs(problem, captured, slice(0, n), Kernels())
            shapes = [(job.shape(g), g.target.dtype) for job in work for g in job.goals]
            result = sum(size(shape[1:], dtype) for shape, dtype in shapes)
            result += sum(y.nbytes for y in captured.outputs.values()) // n
            rows, widest = width(work), need(work, n).widest
            each = math.ceil(history.history(work, n) + (2 + copies) * result)
            del work
        let_go(before.restore)
    kept = 2 * problem.samples * (result if then is None else _returned(problem, then, rows))
    kept += _gradients(problem)
    count = history.pieces(each, problem.samples, allowed, kept, rows * widest)
    return count, rows, kept


def _returned(problem: Problem, then: Then, rows: int) -> int:
    """Bytes of what ``then`` makes of one sample, seen on two if there are: some take no less."""
    few = slice(0, min(2, problem.samples))
    plain = replace(problem, create_graph=False)
    leaves = [leaf[few] if isinstance(leaf, Tensor) else leaf for leaf in problem.tree.leaves]
    with torch.no_grad():
        solution = solve(plain.part(few, leaves), None, None, Chunk(few.stop, rows), valued=True)
        return sum(piece.nbytes for piece in then(solution, few)) // few.stop


def _gradients(problem: Problem) -> int:
    """Bytes of the gradients by inputs and parameters: the sum so far, and what is added to it."""
    parameters = problem.module.parameters() if problem.module is not None else ()
    read = (*problem.tree.leaves, *parameters)
    return 2 * sum(t.nbytes for t in read if isinstance(t, Tensor) and t.requires_grad)
