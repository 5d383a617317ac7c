"""One answer in chunks: computed without a history, and again with one in the backward pass."""

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from batchjac import memory
from batchjac.coupling import Values
from batchjac.errors import StateError, UnsupportedError
from batchjac.memory import Chunk
from batchjac.outside import Seen
from batchjac.problem import Problem, differentiable
from batchjac.solution import Solution
from batchjac.solve import solve
from batchjac.state import Before, normal, remembered, seed

# From the Jacobian of some samples, and which they are, to tensors with those samples first.
Then = Callable[[Solution, slice], Sequence[Tensor]]

_PLAIN = torch.contiguous_format


@dataclass
class Task:
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
                before.restore()
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

    def recorded(self, results: list[Tensor]) -> list[Tensor]:
        """The same results, with a backward pass that computes them again."""
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller's mode
            # torch leaves its apply untyped
            found: tuple[Tensor, ...] = _Recomputed.apply(self, results, *self.tensors)  # type: ignore[no-untyped-call]
        return list(found)

    def _remember(self, seen: Seen) -> None:
        """What the answer is differentiated by, and what must not change until then."""
        assert self.before is not None
        leaves = self.problem.tree.leaves
        self.inputs = tuple(k for k, t in enumerate(leaves) if _records(t))
        own = [parameter.tensor for parameter in self.before.parameters.values()]
        others = {id(t): t for t in (*own, *seen.left())}
        for buffer, _ in self.before.buffers.values():  # put back by value
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
                self.before.restore()
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
        elif gradient.layout != torch.strided and not self.history:  # of a sparse embedding
            self.sums[k] = self.sums[k] + gradient if k in self.sums else gradient.clone()
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


def autocasts() -> list[Callable[[], contextlib.AbstractContextManager[Any]]]:
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
    def forward(ctx: Any, task: Task, results: list[Tensor], *tensors: Tensor) -> Any:
        ctx.task = task
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[r for r in results if not r.is_floating_point()])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        wanted = ctx.needs_input_grad[2:]
        try:
            return (None, None, *ctx.task.pulled(cotangents, wanted))
        except RuntimeError as error:
            if "inside torch.vmap" not in str(error):
                raise
            raise UnsupportedError(
                "a Jacobian that is computed again in the backward pass takes one cotangent at a "
                "time, not a batch of them (is_grads_batched, vmap); loop over them, or raise "
                "max_memory so that its whole history fits"
            ) from error
