"""The lazy Jacobian: products from one recorded forward, and what follows from them.

``batchjac.operator`` is the function below; a module of that name would take its place whenever
something imports it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from batchjac import measures, memory
from batchjac.block import Block
from batchjac.capture import Capture
from batchjac.errors import BudgetError, InputError, StateError, UnsupportedError
from batchjac.gram import Across, Norms, Products, Source, Within, total
from batchjac.maps import Blocks, LinearMap
from batchjac.problem import Problem, pose
from batchjac.recording import Recording, record
from batchjac.seeds import seeds
from batchjac.selected import pulled, pushed, spread
from batchjac.solve import solve
from batchjac.space import Axes, Space, joined, only, space
from batchjac.state import redrawing
from batchjac.unchanged import Watch

_BESIDE = 8  # of what is allowed, one part in so many for columns that wait to be measured
_FIRST = slice(0, 1)
_CLOSED = "this operator was closed; make another with batchjac.operator"


class Jacobian(LinearMap):
    """Every sample's own Jacobian as a linear map, made by ``batchjac.operator``."""

    def __init__(self, problem: Problem, max_memory: int | str | None) -> None:
        self.problem = replace(problem, mode="reverse")
        self._asked, self._limit = problem, max_memory
        tensors = [t for t in problem.tree.leaves if isinstance(t, Tensor)]
        self._allowed = memory.budget(max_memory, tensors[0].device)
        self._samples = problem.samples
        self._heap = memory.Heap()
        self._heap.allow(self._allowed)
        self._room = memory.beside_columns(self._allowed)
        self._kept: Recording | None = None
        self._closed = self._halved = False
        few = self.samples
        if problem.coupling == "error" and not problem.create_graph:
            told = max_memory is not None
            few = memory.first(tensors, problem.module, self.samples, self._allowed, told)
        self._watch = Watch(problem.module, tensors)
        looked = replace(self.problem, around=self._watch.looking(problem.around))
        first = record(looked, slice(0, few), self._room)
        self._inputs, self._outputs = _inputs(problem, first.captured), _outputs(first)
        self.chunk = self._fitting(first)
        if self._watch.drew and self.chunk < self.samples:
            raise BudgetError(
                "the function draws random numbers (dropout, noise), so its samples are recorded "
                f"together, and max_memory has room for {self.chunk} of {self.samples}; raise "
                "max_memory, pass fewer samples, or call model.eval()"
            )
        if few == self.chunk == self.samples:
            self._kept = first
        else:
            first.close()
            if self.chunk == self.samples:
                self._kept = self._record(slice(0, self.samples))
            else:  # for what it says of a function that looks at the whole batch
                self._record(slice(0, self.chunk), halved=True).close()
        self._watch.note()

    @property
    def inputs(self) -> Space:
        return self._inputs

    @property
    def outputs(self) -> Space:
        return self._outputs

    @property
    def samples(self) -> int:
        return self._samples

    def _record(self, samples: slice, halved: bool = False) -> Recording:
        return record(self.problem, samples, self._room, halved)

    def _fitting(self, first: Recording) -> int:
        """How many samples one forward takes: all, if they fit beside one row."""
        n, need = self.samples, first.need
        fits = self._room // (need.saved + need.live)
        whole = self.problem.coupling != "error" or self.problem.create_graph
        if fits < (n if whole else 1):
            together = (n if whole else 1) * (need.saved + need.live)
            raise BudgetError(memory.too_small_beside(together, self._allowed, whole))
        return int(min(n, fits))

    def recordings(self) -> Iterator[Recording]:
        """The recorded forward; with more samples than fit, one chunk after the other."""
        if self._kept is not None:
            yield self._kept
            return
        self._refuse_changed()
        for start in range(0, self.samples, self.chunk):
            part = self._record(slice(start, min(self.samples, start + self.chunk)))
            yield part
            part.close()
            self._heap.wrote(0)

    def _refuse_changed(self) -> None:
        if self._closed:
            raise StateError(_CLOSED)
        changed = self._watch.changed()
        if changed is not None:
            raise StateError(
                f"{changed} was changed since the operator was made, and a forward has to "
                "run again; call batchjac.operator again"
            )

    @property
    def at_once(self) -> int:
        own = sum(a.width * (1 if a.shared else self.samples) for a in self.inputs.leaves)
        column = (own + self.samples * self.outputs.width) * self.inputs.dtype.itemsize
        return max(1, self._allowed // (_BESIDE * max(1, column)))

    def push(self, columns: Blocks) -> list[Block]:
        parts = []
        for recording in self.recordings():
            parts.append(pushed(recording, self.inputs, columns, recording.samples))
            self._heap.wrote(0)
        return joined(parts, self.outputs)

    def pull(self, rows: Blocks) -> list[Block]:
        parts = []
        for recording in self.recordings():
            parts.append(pulled(recording, rows, recording.samples))
            self._heap.wrote(0)
        return joined(parts, self.inputs)

    def rows(self, entries: Sequence[int]) -> Tensor:
        basis = self.outputs.basis(entries)
        return self._singly(
            super().rows(entries), lambda one: self.inputs.flat(pulled(one, basis, _FIRST))
        )

    def columns(self, entries: Sequence[int]) -> Tensor:
        basis = self.inputs.basis(entries)
        found = self._singly(
            super().columns(entries).transpose(1, 2),
            lambda one: self.outputs.flat(pushed(one, self.inputs, basis, _FIRST)),
        )
        return found.transpose(1, 2)

    def _singly(self, found: Tensor, lines: Callable[[Recording], Tensor]) -> Tensor:
        """Lines ``[N, K, width]``, a sample by itself where they are not finite.

        Zero times NaN, summed over samples, puts the NaN of one sample into all.
        """
        if not self.inputs.shared or self._together:
            return found
        odd = (~found.sum((1, 2)).isfinite()).nonzero()[:, 0].tolist()
        if odd:
            found = found.clone()
        for n in odd:
            one = self._apart([n])
            found[n] = lines(one)[:, 0]
            one.close()
        return found

    @property
    def _together(self) -> bool:
        """Whether samples have to be recorded together."""
        options = self.problem
        return options.coupling != "error" or options.create_graph or self._watch.drew

    def norm_squared(self) -> Tensor:
        found = self._factored(Norms, self.shape[1]) if self.inputs.shared else None
        return super().norm_squared() if found is None else found.sum(1)

    def norm_estimate(self, samples: int, generator: torch.Generator | None) -> Tensor:
        if not self.inputs.shared:
            return super().norm_estimate(samples, generator)
        z = self.outputs.random(measures.count_of(samples), self.samples, generator)
        found = self._factored(Norms, samples, z)
        return super().norm_estimate(samples, generator) if found is None else found.mean(1)

    @torch.inference_mode(False)
    def gram(self, *, of: str = "outputs", across: bool = False) -> Tensor:
        if not self.inputs.shared or of != "outputs":
            return super().gram(of=of, across=across)
        found = self._factored(Across if across else Within, self.shape[1])
        if found is not None:
            return found
        return measures.kernel(self) if across else super().gram()

    def _factored(
        self, kind: type[Products], rows: int, given: Blocks | None = None
    ) -> Tensor | None:
        """Inner products of rows of the identity, or given ones, without forming them."""
        self.refuse_coupled()
        if self._closed:
            raise StateError(_CLOSED)
        if not rows:
            return None

        def seeded(
            recording: Recording, entries: Sequence[int], samples: Sequence[int]
        ) -> list[Block]:
            if given is None:
                own = self.outputs.basis(entries)
            else:
                own = [Block(b.data[list(entries)], b.shape) for b in given]
            return spread(recording, [only(b, samples) for b in own])

        sizes = [math.prod(a.shape) * a.dtype.itemsize for a in self.inputs.leaves if a.shared]
        source = Source(
            self.samples, rows, self._allowed, self._kept, self._together, self._apart, seeded,
            self._heap, sum(sizes) + 2 * max(sizes),
        )  # fmt: skip
        return total(kind, source)

    def _apart(self, samples: Sequence[int]) -> Recording:
        """A recording of these samples."""
        self._refuse_changed()
        index = torch.tensor(list(samples))
        tree, outputs = self.problem.tree, self.problem.outputs
        leaves = tuple(t[index.to(t.device)] if isinstance(t, Tensor) else t for t in tree.leaves)
        if isinstance(outputs, Tensor) and outputs.dim() == 1:
            outputs = outputs[index.to(outputs.device)]
        some = replace(
            self.problem, tree=replace(tree, leaves=leaves), inputs=tree.build(leaves),
            samples=len(index), outputs=outputs,
        )  # fmt: skip
        # samples that were recorded together are for the first time apart
        halved, self._halved = not self._halved and len(index) < self.samples, True
        return record(some, slice(0, len(index)), self._room, halved)

    def refuse_coupled(self) -> None:
        if self.problem.coupling == "full":
            raise UnsupportedError(
                'coupling="full": samples have no blocks of their own; this operator has products '
                "and dense()"
            )

    def dense(self) -> Any:
        self._refuse_changed()
        if self._watch.drew and self.problem.coupling != "full":  # numbers that were recorded
            return super().dense()
        redraw = redrawing()
        self._watch.redraw()
        try:
            return solve(self._asked, self._limit, None).jacobian
        finally:
            redraw()

    def close(self) -> None:
        """Free the recorded forward; further products raise ``StateError``."""
        if self._kept is not None:
            self._kept.close()
        self._kept, self._closed = None, True

    def __del__(self) -> None:
        # a very deep graph overflows the stack unless it is taken apart from its outputs down
        kept: Recording | None = getattr(self, "_kept", None)
        if kept is not None and kept.roots:
            kept.close()

    def __enter__(self) -> "Jacobian":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        function = self.problem.module or self.problem.function
        name = getattr(function, "__name__", type(function).__name__)
        held = "one recorded forward" if self._kept else f"forwards of {self.chunk} samples"
        if self._closed:
            held = "closed"
        n, o, i = self.shape
        return (
            f"Jacobian of {name}: {n} samples x {o} outputs ({self.outputs.words}) x {i} "
            f"{'parameters' if self.inputs.shared else 'inputs'} ({self.inputs.words}), "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}, {held}"
        )


def operator(
    f: Callable[..., Any],
    inputs: Any,
    *,
    of: str | None = None,
    wrt: str | Sequence[str] | None = None,
    outputs: Any = None,
    coupling: str = "error",
    create_graph: bool = False,
    max_memory: int | str | None = None,
    batched: bool = True,
) -> Jacobian:
    """Every sample's own Jacobian as a linear map: products with it, and nothing dense.

    Args:
        f, inputs, of, wrt, outputs, batched: As for ``jacobian``.
        coupling: As for ``jacobian``: ``"error"``, ``"frozen"``, or ``"full"``, which has products
            with the whole ``[N * O, N * I]`` and ``dense()``, and no blocks.
        create_graph: Make products differentiable by inputs, parameters and vectors; all samples
            are then recorded together.
        max_memory: As for ``jacobian``: for what is recorded and for blocks, beside what is
            returned. If not all samples fit, the forward runs again for every product, a chunk of
            samples at a time, of the same values and without random numbers.

    Returns:
        A map ``A`` of ``shape [N, O, I]``, O outputs and I inputs of a sample (with
        ``wrt="parameters"`` I of them that all samples share):

        - ``A @ v``: v ``[N, *in]`` nested as the inputs (parameters: ``{name: [*p]}``, one for all
          samples) gives ``[N, *out]``. With one axis more at the end, ``[N, *in, K]``, v is K
          columns and so is what comes out.
        - ``A.T @ u``: u ``[N, *out]`` gives ``[N, *in]``; toward parameters their sum over samples,
          which is the transpose of that.
        - ``A[:, c]``, ``A[r]``, ``A[rows, cols]``: columns, rows, blocks, dense; by flat indices.
        - ``B @ A``: the composition, where A gives what B takes.
        - ``norm()``, ``gram()``, ``diag()``, ``trace()``, ``svd(k)`` of every sample's block;
          toward parameters ``norm()`` and ``gram()`` go layer by layer, and no row is formed that
          is not needed; ``gram(across=True)`` is the empirical tangent kernel ``[N, O, N, O]``.
        - ``dense()``, as ``jacobian`` gives it, and ``matrix()``, ``[N, O, I]``.
        - ``to_scipy()``, ``to_sparse()``, ``close()``; ``with`` closes too.

    Raises:
        InputError: Vectors of another nesting or shape, or a question without an answer.
        InputTypeError: Vectors of another dtype or device.
        StateError: The operator was closed, or what has to run again was changed meanwhile.
        UnsupportedError: A figure of every sample from a map that sums over them.
        Others as for ``jacobian``.

    Cost:
        One forward, kept until the operator is closed or freed: its saved activations are what it
        holds. ``A.T @ u``: one backward; ``A @ v``: one forward of tangents, two backward passes
        where a node has no forward rule; the first product on a graph one to three backward passes
        more, to compare. Hooks and Functions whose gradients are not linear in the cotangent define
        rows, not products: those are then made of all rows. Where a block holds inf or nan, so may
        products, not always in the same places, and toward parameters in all samples; blocks of
        samples that can be recorded apart hold it where ``jacobian`` does. Parameters and buffers
        must not change meanwhile: autograd refuses values that were overwritten.

    Source:
        Griewank and Walther, Evaluating Derivatives, 2nd ed., 2008, chapter 3: products without
        the matrix.

    Example:
        >>> import torch, batchjac
        >>> model = torch.nn.Linear(3, 2)
        >>> A = batchjac.operator(model, torch.randn(5, 3))
        >>> v = torch.randn(5, 3)
        >>> torch.allclose(A @ v, v @ model.weight.T, atol=1e-6)
        True
        >>> P = batchjac.operator(model, torch.randn(5, 3), wrt="parameters")
        >>> P.shape, P.gram(across=True).shape
        (torch.Size([5, 2, 8]), torch.Size([5, 2, 5, 2]))
    """
    problem = pose(
        f, inputs, wrt=wrt, of=of, outputs=outputs, mode="auto", coupling=coupling,
        create_graph=create_graph, batched=batched,
    )  # fmt: skip
    if coupling == "sum":
        raise InputError(
            'coupling="sum" adds samples up, which is no linear map for each of them; use '
            '"full" for products with the whole Jacobian'
        )
    return Jacobian(problem, max_memory)


def _inputs(problem: Problem, captured: Capture) -> Space:
    """What the answer nests outputs over: by name where several were asked for."""
    axes: list[Axes | None] = []
    named: dict[str, Any] = {}
    for name, tree in captured.targets.items():
        start = len(axes)
        for t in tree.leaves:
            own = None if t is None else (problem.samples, *t.shape[1:])
            axes.append(
                None if t is None or own is None
                else Axes(t.path, own if t.per_sample else t.shape, t.dtype, t.device,
                          not t.per_sample)
            )  # fmt: skip
        named[name] = tree.build(list(range(start, len(axes))))
    return space(named if problem.named else next(iter(named.values())), axes)


def _outputs(recording: Recording) -> Space:
    captured, problem = recording.captured, recording.problem
    axes: list[Axes | None] = [None] * len(captured.values.leaves)
    for job in recording.work:
        chosen = seeds(job.y, problem.outputs, "error", job.samples, job.path)
        shape = (problem.samples, *chosen.shape)
        axes[job.index] = Axes(job.path, shape, job.y.dtype, job.y.device)
    return space(captured.values.build(list(range(len(axes)))), axes)
