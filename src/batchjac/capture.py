"""Run the function once, under ordinary autograd, and keep what the walk needs of it."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from batchjac import descend
from batchjac.errors import BatchAxisError, InputTypeError, StateError
from batchjac.graph import edge_of
from batchjac.plain import plainly
from batchjac.pooling import quick_pooling
from batchjac.problem import Problem, check_boundary, differentiable, layer
from batchjac.state import normal
from batchjac.tree import Tree, emptied, flatten


@dataclass(frozen=True)
class Target:
    """A tensor to differentiate with respect to: its place in the graph and what it looks like."""

    path: str
    edge: GradientEdge | None  # None: nothing that was recorded depends on it
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    per_sample: bool  # False for a parameter: all samples share it


@dataclass(frozen=True)
class Capture:
    """One run of the function on some samples.

    ``values`` is the nested output; ``outputs`` maps the index of each differentiable leaf to its
    tensor. ``targets`` nests the answer: one tree per wanted name, ``None`` for leaves without a
    derivative. ``inputs`` are the recorded inputs, also when only parameters are asked for: they
    witness whether samples depend on each other. ``hooked``: the function hooked a gradient;
    ``nodes``: how many it recorded.
    """

    samples: int
    values: Tree
    outputs: dict[int, Tensor]
    targets: dict[str, Tree]
    inputs: tuple[GradientEdge, ...]
    hooked: bool
    nodes: int
    keep: tuple[Any, ...] = field(repr=False)  # graph edges do not keep leaf nodes alive
    froze: bool = False  # parameters that were not asked for recorded nothing


@dataclass
class _Seen:
    """What the hooks of one forward collect."""

    of: list[Any] = field(default_factory=list)
    layers: dict[str, list[Tree]] = field(default_factory=dict)
    hooked: bool = False


@contextlib.contextmanager
def capture(problem: Problem, samples: slice) -> Iterator[Capture]:
    """One forward of ``problem.function`` on ``samples``, recorded.

    Parameters that are not asked for record nothing (unless ``create_graph``), so their inputs
    are not kept and no slow path computes weight gradients on the way. Hooks and flags stay for
    the block: what saves by other means than ``torch.utils.checkpoint`` may run again.
    """
    with contextlib.ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.enable_grad(), plainly()):
            stack.enter_context(context)
        try:
            captured = _capture(problem, samples, stack, freeze=not problem.create_graph)
        except RuntimeError as error:
            if "Inference tensors cannot be saved" in str(error):
                raise StateError(
                    "f computes with tensors made under torch.inference_mode, for instance its "
                    "parameters, which autograd cannot record; make the model outside it"
                ) from error
            # a function that takes gradients by its own parameters needs them to record
            if problem.create_graph or "require grad" not in str(error):
                raise
            captured = _capture(problem, samples, stack, freeze=False)
        try:
            yield captured
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise StateError(
                "the function writes into a tensor that its own derivative needs, so PyTorch "
                f"cannot differentiate it: {str(error).split('; expected')[0]}. Write into a "
                "clone, or use the form that returns a new tensor"
            ) from error


@contextlib.contextmanager
def again(problem: Problem, captured: Capture) -> Iterator[None]:
    """Hooks and flags as they were in a capture that has ended, for what its graph runs again."""
    seen = _Seen(layers={w.name: [] for w in problem.wanted if w.kind == "layer"})
    with (
        torch.inference_mode(False),
        plainly(),
        _recording(problem, captured.froze),
        _hooks(problem, seen),
    ):
        yield


def _capture(
    problem: Problem, samples: slice, stack: contextlib.ExitStack, freeze: bool
) -> Capture:
    begun = _nodes_so_far()
    seen = _Seen(layers={w.name: [] for w in problem.wanted if w.kind == "layer"})
    count = len(range(*samples.indices(problem.samples)))
    with contextlib.ExitStack() as attempt:
        attempt.enter_context(_recording(problem, freeze))
        bases = [_base(problem, leaf, samples) for leaf in problem.tree.leaves]
        # a copy: the function may write into its input, and a leaf cannot be written into
        leaves = [b.clone() if isinstance(b, Tensor) else b for b in bases]
        edges = [edge_of(t) if isinstance(t, Tensor) and t.requires_grad else None for t in leaves]
        parameters = {n: normal(p) for n, p in problem.parameters.items()}
        shared = {n: edge_of(p) for n, p in parameters.items()}
        inputs = _targets(problem.tree, leaves, edges)
        if seen.layers or problem.of is not None:
            attempt.enter_context(_hooks(problem, seen))
        # its own mode: a function may leave gradients switched off
        with torch.enable_grad(), _noticed(seen), quick_pooling():
            result = problem.call(leaves)
        stack.push(attempt.pop_all())
    if problem.of is not None:
        result = _once(seen.of, "of", problem.of)
    targets: dict[str, Tree] = {}
    for wanted in problem.wanted:
        if wanted.kind == "inputs":
            targets[wanted.name] = inputs
        elif wanted.kind == "layer":
            tree = _once(seen.layers[wanted.name], "wrt", wanted.name)
            for target in tree.leaves:
                _check_layer(target, wanted.name, count)
            targets[wanted.name] = tree
        else:
            p = parameters[wanted.name]
            goal = Target("", shared[wanted.name], tuple(p.shape), p.dtype, p.device, False)
            targets[wanted.name] = Tree((goal,), ("",), lambda leaves: leaves[0])
    values = flatten(result)
    outputs = _outputs(values, count)
    witnesses = tuple(edge for edge in edges if edge is not None)
    hooked = seen.hooked or _module_hooks(problem.module) or _hooked(parameters.values())
    keep = (bases, leaves, result)
    nodes = _nodes_so_far() - begun
    return Capture(count, values, outputs, targets, witnesses, hooked, nodes, keep, freeze)


def without_graph(captured: Capture) -> Capture:
    """What nesting the answer needs of a capture, without the memory of the forward."""
    targets = {}
    for name, tree in captured.targets.items():
        leaves = tuple(t and replace(t, edge=None) for t in tree.leaves)
        outer = tree if name == "inputs" else emptied(tree, lambda t: t and torch.empty(0))
        targets[name] = replace(outer, leaves=leaves)
    values = emptied(captured.values, lambda t: torch.empty(0) if isinstance(t, Tensor) else t)
    outputs = {k: torch.empty(0) for k in captured.outputs}
    return Capture(captured.samples, values, outputs, targets, (), captured.hooked, 0, ())


def _nodes_so_far() -> int:
    """How many nodes this thread has recorded."""
    # private: torch's own types leave it out, though the module has it
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


def _base(problem: Problem, leaf: Any, samples: slice) -> Any:
    """A leaf's chunk of samples, recorded from here on when it is differentiated."""
    if not isinstance(leaf, Tensor):
        return leaf
    part = normal(leaf)
    if part.shape[0] != len(range(*samples.indices(part.shape[0]))):
        part = part[samples]
    if not differentiable(leaf):
        return part
    # layers alone: the graph begins there, and what comes before costs no memory
    wanted = any(w.kind != "layer" for w in problem.wanted)
    if problem.create_graph and part.requires_grad:
        return part
    return part.detach().requires_grad_(wanted)


def _targets(tree: Tree, leaves: list[Any], edges: list[GradientEdge | None]) -> Tree:
    goals = [
        Target(path, edge, tuple(t.shape), t.dtype, t.device, True) if edge is not None else None
        for path, t, edge in zip(tree.paths, leaves, edges, strict=True)
    ]
    return Tree(tuple(goals), tree.paths, tree.build)


@contextlib.contextmanager
def _recording(problem: Problem, freeze: bool) -> Iterator[None]:
    """Let the wanted parameters record and, with ``freeze``, no others."""
    wanted = {id(p) for p in problem.parameters.values()}
    changed: list[tuple[Tensor, bool]] = []

    for parameter in descend.parameters(problem.module) if problem.module is not None else ():
        record = id(parameter) in wanted or (parameter.requires_grad and not freeze)
        if parameter.requires_grad != record and _can_record(parameter):
            changed.append((parameter, parameter.requires_grad))
            parameter.requires_grad_(record)
    try:
        yield
    finally:
        for tensor, before in changed:
            tensor.requires_grad_(before)


def _can_record(parameter: Tensor) -> bool:
    floating = parameter.is_floating_point() or parameter.is_complex()
    return floating and parameter.is_leaf and not parameter.is_inference()


@contextlib.contextmanager
def _hooks(problem: Problem, seen: _Seen) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in seen.layers:
            handle = layer(problem, name).register_forward_hook(_record(seen.layers[name]))
            stack.callback(handle.remove)
        if problem.of is not None:  # after the recording, in case it is the same layer
            module = layer(problem, problem.of)
            handle = module.register_forward_hook(lambda m, i, out: seen.of.append(_copy(out)))
            stack.callback(handle.remove)
        yield


def _copy(output: Any) -> Any:
    """The layer's output as it is now: what follows may write into it."""
    return flatten(output).map(lambda t: t.clone() if isinstance(t, Tensor) else t)


@contextlib.contextmanager
def _noticed(seen: _Seen) -> Iterator[None]:
    """Notice a gradient hook put on a tensor in the forward; nodes do not show theirs."""
    original: Callable[..., Any] = Tensor.register_hook

    def register_hook(self: Tensor, hook: Any) -> Any:
        seen.hooked = True
        return original(self, hook)

    # mypy forbids replacing a method; for the forward alone that is what is meant
    Tensor.register_hook = register_hook  # type: ignore[method-assign]
    try:
        yield
    finally:
        # the method itself, put back
        Tensor.register_hook = original  # type: ignore[method-assign]


def _module_hooks(module: nn.Module | None) -> bool:
    """Whether any layer has a full backward hook, which may change a gradient."""
    return module is not None and any(
        m._backward_hooks or m._backward_pre_hooks for _, m in descend.modules(module)
    )


def _hooked(parameters: Iterable[Tensor]) -> bool:
    """Whether a parameter that is asked for carries a hook of its own."""
    return any(p._backward_hooks for p in parameters)


def _record(calls: list[Tree]) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        tree = flatten(output)
        leaves = [_recorded(leaf) for leaf in tree.leaves]
        goals = [
            Target(p, edge_of(t), tuple(t.shape), t.dtype, t.device, True)
            if differentiable(t)
            else None
            for p, t in zip(tree.paths, leaves, strict=True)
        ]
        calls.append(Tree(tuple(goals), tree.paths, tree.build))
        return tree.build(leaves)

    return hook


def _recorded(leaf: Any) -> Any:
    """The layer's output itself, or a recorded copy when nothing before it records."""
    if not differentiable(leaf) or leaf.requires_grad:
        return leaf
    return leaf.detach().requires_grad_().clone()


def _once(calls: list[Any], argument: str, name: str) -> Any:
    if len(calls) == 1:
        return calls[0]
    if not calls:
        raise StateError(
            f"{argument}={name!r}: this layer did not run in the forward (a compiled, exported or "
            "scripted model may have no layers left; pass the original module)"
        )
    raise StateError(
        f"{argument}={name!r}: this layer ran {len(calls)} times in one forward, so its output "
        "is not one tensor; name a layer that runs once, or give each use a layer of its own"
    )


def _check_layer(target: Target | None, name: str, count: int) -> None:
    if target is not None and (not target.shape or target.shape[0] != count):
        raise BatchAxisError(
            f"wrt={name!r}: the layer's output{target.path} has shape {list(target.shape)}, whose "
            f"first axis is not the {count} samples; name a layer whose output has the batch first"
        )


def _outputs(values: Tree, count: int) -> dict[int, Tensor]:
    """The differentiable leaves of the output, each checked to have the batch axis first."""
    if not any(isinstance(leaf, Tensor) for leaf in values.leaves):
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in values.leaves})) or "nothing"
        raise InputTypeError(f"f must return tensors, it returned {kinds}")
    found = {}
    for index, (path, leaf) in enumerate(zip(values.paths, values.leaves, strict=True)):
        if not isinstance(leaf, Tensor):
            continue
        check_boundary(f"output{path}", leaf)
        if not differentiable(leaf):
            continue
        if leaf.dim() == 0 or leaf.shape[0] != count:
            raise BatchAxisError(_no_batch_axis(path, leaf, count))
        found[index] = leaf
    if not found:
        kinds = ", ".join(sorted({str(t.dtype) for t in values.leaves if isinstance(t, Tensor)}))
        raise InputTypeError(f"no output has a floating dtype (got {kinds}); nothing to derive")
    return found


def _no_batch_axis(path: str, leaf: Tensor, count: int) -> str:
    remedy = (
        "f sums or averages over the batch; return one value per sample"
        if leaf.dim() == 0
        else "return a tensor whose first axis is the batch, or pass batched=False when f takes "
        "one sample"
    )
    return (
        f"output{path} has shape {list(leaf.shape)}, expected [{count}, ...] for {count} samples: "
        f"{remedy}"
    )
