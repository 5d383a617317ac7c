"""A differentiable map over chunks of samples whose history is never held whole.

The answer is computed without a history, chunk by chunk. In the backward pass every chunk is
computed again, now with one, its share of the cotangent is pulled back, and it is freed. As
``torch.utils.checkpoint`` does for a part of a forward; here the part is a Jacobian.

Source: Griewank and Walther, Evaluating Derivatives, 2nd ed., 2008, chapter 12: checkpointing.
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from batchjac import memory
from batchjac.aside import aside
from batchjac.capture import capture
from batchjac.coupling import Values
from batchjac.engines.sweep import Kernels
from batchjac.errors import StateError, UnsupportedError
from batchjac.graph import let_go, taken_apart
from batchjac.job import history, jobs, need, width
from batchjac.memory import Chunk
from batchjac.outside import Seen
from batchjac.problem import Problem, differentiable
from batchjac.sink import size
from batchjac.solution import Solution
from batchjac.solve import solve
from batchjac.state import Before, normal, remembered, seed
from batchjac.tree import Tree, emptied, flatten

# From the Jacobian of some samples, and which they are, to tensors with those samples first.
Then = Callable[[Solution, slice], Sequence[Tensor]]


def recomputed(
    problem: Problem,
    then: Then,
    max_memory: int | str | None,
    *,
    copies: float = 0,
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
        fixed: Samples in one chunk, whatever fits; for tests.

    Raises:
        BudgetError: One sample does not fit.
        StateError, RuntimeError (in the backward pass): What was read has changed since.
    """
    assert problem.coupling == "error", "samples that depend on each other stay together"
    device = next(t.device for t in problem.tree.leaves if isinstance(t, Tensor))
    allowed = memory.budget(max_memory, device)
    count, rows, kept = _measured(problem, allowed, copies)
    task = _Task(problem, then, fixed or count, rows, allowed - kept, _autocasts())
    results = task.forward()
    if not problem.create_graph or not task.tensors:
        return results
    # torch leaves its apply untyped
    found: tuple[Tensor, ...] = _Recomputed.apply(task, results, *task.tensors)  # type: ignore[no-untyped-call]
    return list(found)


def answer(
    problem: Problem,
    max_memory: int | str | None,
    out: Any,
    fixed: Chunk | None = None,
    valued: bool = False,
) -> Solution:
    """What ``solve`` finds; chunks are computed again where a history does not fit the budget."""
    try:
        return solve(problem, max_memory, out, fixed, valued)
    except memory.TooLong:
        if problem.coupling != "error":
            raise
    trees: list[tuple[int, Tree, Tree]] = []  # samples, value and Jacobian, without their numbers

    def then(solution: Solution, samples: slice) -> list[Tensor]:
        value = flatten(solution.value() if valued else None)
        j = flatten(solution.jacobian)
        if not torch.is_grad_enabled():
            trees.append((samples.stop - samples.start, _bare(value), _bare(j)))
        return [leaf for leaf in (*value.leaves, *j.leaves) if differentiable(leaf)]

    found = iter(recomputed(problem, then, max_memory))
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


def _measured(problem: Problem, allowed: int, copies: float) -> tuple[int, int, int]:
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
            each = math.ceil(history(work, n) + (2 + copies) * result)
            del work
        let_go(before.restore)
    kept = 2 * problem.samples * result + _gradients(problem)
    count = memory.pieces(each, problem.samples, allowed, kept, rows * widest)
    return count, rows, kept


def _gradients(problem: Problem) -> int:
    """Bytes of the gradients by inputs and parameters: the sum so far, and what is added to it."""
    parameters = problem.module.parameters() if problem.module is not None else ()
    read = (*problem.tree.leaves, *parameters)
    return 2 * sum(t.nbytes for t in read if isinstance(t, Tensor) and t.requires_grad)


_PLAIN = torch.contiguous_format


@dataclass
class _Task:
    """The chunks of one answer, and all that is needed to compute one again."""

    problem: Problem
    then: Then
    count: int  # samples in a chunk
    rows: int
    room: int  # bytes beside what is kept
    autocasts: Sequence[Callable[[], contextlib.AbstractContextManager[Any]]]
    seeds: tuple[int, ...] = ()  # of the random numbers of each chunk
    inputs: tuple[int, ...] = ()  # leaves of the inputs that require grad
    tensors: tuple[Tensor, ...] = ()  # those leaves, then whatever else was read and requires grad
    versions: Sequence[tuple[Tensor, int]] = ()
    before: Before | None = None

    @property
    def chunks(self) -> list[slice]:
        """Samples, in turn."""
        n = self.problem.samples
        return [slice(k, min(n, k + self.count)) for k in range(0, n, self.count)]

    def forward(self) -> list[Tensor]:
        """The results without a history, and what must be known to compute them again."""
        seen = Seen()
        plain = replace(self.problem, create_graph=False)
        bare = replace(plain, around=seen.looking)
        results: list[Tensor] = []
        with remembered(self.problem.module) as before, torch.no_grad():
            draw = partial(torch.randint, (1 << 63) - 1, ())
            self.seeds = tuple(int(draw()) for _ in self.chunks)
            compared = self._compared(plain, before)
            heap = self._heap()
            for samples, number in zip(self.chunks, self.seeds, strict=True):
                seed(number)
                leaves = _cut(self.problem.tree.leaves, samples)
                solution = self._solution(bare, samples, leaves)
                compared(samples, solution)
                with seen.looking():
                    pieces = self.then(solution, samples)
                _place(results, pieces, samples, self.problem.samples)
                size = sum(piece.nbytes for piece in pieces)
                del solution, pieces, leaves
                heap.wrote(size)
        self.before = before
        self._remember(seen)
        return results

    def _remember(self, seen: Seen) -> None:
        """What the answer is differentiated by, and what must not change until then."""
        assert self.before is not None
        leaves = self.problem.tree.leaves
        self.inputs = tuple(k for k, t in enumerate(leaves) if _records(t))
        others = {id(t): t for t in (*self.before.parameters, *seen.left())}
        for buffer in self.before.buffers:  # put back by value
            if not _records(buffer):
                others.pop(id(buffer), None)
        outside = [t for t in others.values() if _records(t)]
        self.tensors = (*(leaves[k] for k in self.inputs), *outside)
        every = [t for t in (*leaves, *others.values()) if isinstance(t, Tensor)]
        self.versions = [(t, t._version) for t in every if not t.is_inference()]

    def _solution(self, problem: Problem, samples: slice, leaves: Sequence[Any]) -> Solution:
        """The Jacobian of some samples, whose inputs are ``leaves``."""
        chunk = Chunk(samples.stop - samples.start, self.rows)
        return solve(problem.part(samples, leaves), None, None, chunk, valued=True)

    def _compared(self, plain: Problem, before: Before) -> Callable[[slice, Solution], None]:
        """What refuses chunks whose samples depend on those of others, as ``solve`` does."""
        compared = Values(plain, before.restore)
        if self.count == 1 and plain.samples > 1:  # one sample alone shows nothing
            self._solution(plain, slice(0, 2), _cut(plain.tree.leaves, slice(0, 2)))

        def compare(samples: slice, solution: Solution) -> None:
            count = samples.stop - samples.start
            if count == plain.samples:
                return
            leaves = solution.chunks[0][1].leaves
            outputs = {k: leaf for k, leaf in enumerate(leaves) if differentiable(leaf)}
            compared.keep(outputs)
            if samples.start == 0:
                compared.half(count, outputs)
            compared.border(samples.stop, count, self.rows, max(2, self.count))

        return compare

    def pulled(
        self, cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients by ``tensors`` of the results contracted with these cotangents.

        With gradients enabled they are differentiable themselves, and then nothing is freed.
        """
        self._unchanged()
        history = torch.is_grad_enabled()
        totals = _Totals(len(self.inputs), self.problem.samples, history)
        assert self.before is not None
        heap = self._heap()
        with self.before.again(), remembered(self.problem.module):
            for samples, number in zip(self.chunks, self.seeds, strict=True):
                seed(number)
                found = self._again(samples, cotangents, wanted, history)
                for k, gradient in found.items():
                    totals.add(k, samples, gradient)
                del found
                heap.wrote(0)
        return [totals.result(k) for k in range(len(self.tensors))]

    def _heap(self) -> memory.Heap:
        heap = memory.Heap()
        heap.allow(self.room)
        return heap

    def _unchanged(self) -> None:
        for tensor, version in self.versions:
            if tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation: a tensor of shape {list(tensor.shape)} that the function "
                    f"reads is at version {tensor._version}; expected version {version} instead. "
                    "With max_memory the Jacobian is computed again in the backward pass; call "
                    "backward first, or change a clone"
                )

    def _again(
        self,
        samples: slice,
        cotangents: Sequence[Tensor | None],
        wanted: Sequence[bool],
        history: bool,
    ) -> dict[int, Tensor]:
        """One chunk with its history, pulled back to stand-ins for what was read."""
        some, seen = len(self.inputs), Seen()
        with torch.enable_grad(), contextlib.ExitStack() as stack:
            leaves = self._recorded(_cut(self.problem.tree.leaves, samples))
            # each stands apart, so that no path leads from one to another
            aliases = [leaves[k] for k in self.inputs]
            aliases += [t.view_as(t) for t in self.tensors[some:]]
            by = dict(zip(map(id, self.tensors[some:]), aliases[some:], strict=True))
            around = partial(seen.replacing, by)
            for context in self.autocasts:
                stack.enter_context(context())
            problem = replace(self.problem, around=around)
            solution = self._solution(problem, samples, leaves)
            with around():
                pieces = self.then(solution, samples)
            del solution
        pairs = [
            (piece, cotangent[samples])
            for piece, cotangent in zip(pieces, cotangents, strict=True)
            if cotangent is not None and piece.requires_grad
        ]
        del pieces
        if not pairs:
            return {}
        ends = [*aliases, *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        reached = _leaves([piece for piece, _ in pairs], ends)
        unknown = self._stand_ins([leaf for leaf in reached if not seen.has_made(leaf)], aliases)
        asked = [k for k, want in enumerate(wanted) if want]
        found = torch.autograd.grad(
            [piece for piece, _ in pairs], [aliases[k] for k in asked],
            [cotangent for _, cotangent in pairs], create_graph=history, allow_unused=True,
        )  # fmt: skip
        del pairs, aliases, by, around, problem, leaves, ends, reached
        _refuse_unknown(unknown)
        return {k: g for k, g in zip(asked, found, strict=True) if g is not None}

    def _recorded(self, leaves: list[Any]) -> list[Any]:
        """The inputs as ``capture`` would record them, so that they are known."""
        if all(w.kind == "layer" for w in self.problem.wanted):
            return leaves
        return [
            leaf.detach().requires_grad_() if differentiable(leaf) and not _records(leaf) else leaf
            for leaf in leaves
        ]

    def _stand_ins(
        self, reached: Sequence[Tensor], aliases: list[Tensor]
    ) -> list[weakref.ref[Tensor]]:
        """Put the tensors themselves where they were read past their stand-ins.

        Returns the leaves that nothing is known of: made in this computation, or new to it.
        """
        some = len(self.inputs)
        unknown = []
        for leaf in reached:
            at = [k for k in range(some, len(self.tensors)) if self.tensors[k] is leaf]
            if not at:
                unknown.append(weakref.ref(leaf))
                continue
            if leaf._backward_hooks or not all(t.is_leaf for t in self.tensors[some:]):
                raise UnsupportedError(
                    f"max_memory: a tensor of shape {list(leaf.shape)} is read by TorchScript or "
                    "compiled code, and has a hook or comes beside tensors that were computed "
                    "before the call, so its gradient cannot be told apart when the Jacobian is "
                    "computed again; raise max_memory so that its whole history fits, or pass the "
                    "original Python module"
                )
            aliases[at[0]] = leaf
        return unknown


class _Totals:
    """Sums of gradients over chunks; those by inputs lie side by side."""

    def __init__(self, inputs: int, samples: int, history: bool) -> None:
        self.inputs, self.samples, self.history = inputs, samples, history
        self.sums: dict[int, Tensor] = {}
        self.parts: dict[int, list[tuple[slice, Tensor]]] = {}

    def add(self, k: int, samples: slice, gradient: Tensor) -> None:
        """Take the gradient of one chunk by the tensor ``k``."""
        if k < self.inputs and self.history:
            self.parts.setdefault(k, []).append((samples, gradient))
        elif k < self.inputs:
            if k not in self.sums:
                self.sums[k] = gradient.new_zeros(self.samples, *gradient.shape[1:])
            self.sums[k][samples] = gradient
        elif k not in self.sums:
            # autograd may hand out one tensor twice, or an expanded one
            self.sums[k] = gradient if self.history else gradient.clone(memory_format=_PLAIN)
        elif self.history:
            self.sums[k] = self.sums[k] + gradient
        else:
            self.sums[k] += gradient

    def result(self, k: int) -> Tensor | None:
        """The whole gradient; None where nothing arrived."""
        if k not in self.parts:
            return self.sums.get(k)
        first = self.parts[k][0][1]
        found, start = [], 0
        for samples, part in self.parts[k]:
            found += [first.new_zeros(samples.start - start, *first.shape[1:]), part]
            start = samples.stop
        return torch.cat([*found, first.new_zeros(self.samples - start, *first.shape[1:])])


def _records(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _cut(leaves: Sequence[Any], samples: slice) -> list[Any]:
    return [normal(leaf[samples]) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _place(results: list[Tensor], pieces: Sequence[Tensor], samples: slice, n: int) -> None:
    """Put the pieces of one chunk into the results, which the first makes."""
    if not results:
        results += [p.new_empty(n, *p.shape[1:]) for p in pieces]
    for result, piece in zip(results, pieces, strict=True):
        result[samples] = piece


def _leaves(pieces: Sequence[Tensor], ends: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that these tensors depend on by other ways than through ``ends``."""
    seen = {end.grad_fn for end in ends}
    leaves = {id(end) for end in ends}
    stack = [piece.grad_fn for piece in pieces]
    found = []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and id(node.variable) not in leaves:
            found.append(node.variable)
        stack += [child for child, _ in node.next_functions]
    return found


def _refuse_unknown(leaves: Sequence[weakref.ref[Tensor]]) -> None:
    """Refuse leaves that outlive the computation, so that they were not made in it."""
    for ref in leaves:
        leaf = ref()
        if leaf is not None and leaf.requires_grad:
            raise StateError(
                f"computed again in the backward pass, the function reads a tensor of shape "
                f"{list(leaf.shape)} that requires grad and was not seen in the forward; it must "
                "read the same again, or raise max_memory so that nothing is "
                "computed again"
            )


def _autocasts() -> list[Callable[[], contextlib.AbstractContextManager[Any]]]:
    """The caller's autocast, to be entered again."""
    return [
        partial(
            torch.autocast, device, dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=torch.is_autocast_cache_enabled(),
        )
        for device in ("cpu", "cuda")
        if device == "cpu" or torch.cuda.is_available()
    ]  # fmt: skip


class _Recomputed(torch.autograd.Function):
    """The results of a task, which their backward computes again."""

    @staticmethod
    def forward(ctx: Any, task: _Task, results: list[Tensor], *tensors: Tensor) -> Any:
        ctx.task = task
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[r for r in results if not r.is_floating_point()])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        wanted = ctx.needs_input_grad[2:]
        return (None, None, *aside(lambda: ctx.task.pulled(cotangents, wanted)))
