"""Which module made a node: asked only when an error has to name it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from batchjac.capture import Capture, capture
from batchjac.graph import Graph, Step
from batchjac.problem import Problem


def modules(problem: Problem, captured: Capture, graph: Graph, steps: tuple[int, ...]) -> list[str]:
    """The innermost modules that recorded these steps, as ``"path (Class)"``, or node names.

    Runs the function once more under hooks: nodes are numbered in the order in which the forward
    made them, so a module's nodes are those numbered while it ran. The n-th node of the second
    run is the n-th of the first.
    """
    names = [graph.steps[k].name for k in steps]
    if problem.module is None or not steps:
        return list(dict.fromkeys(names))
    first = _first_number(captured)
    spans: list[tuple[str, int, int]] = []
    whole = slice(0, captured.samples)
    with _spans(problem.module, spans), capture(problem, whole) as again:
        offset = _first_number(again) - first
    found = [_innermost(spans, graph.steps[k], offset) for k in steps]
    return list(dict.fromkeys(f or n for f, n in zip(found, names, strict=True)))


def _first_number(captured: Capture) -> int:
    """The number of the first node that a capture made."""
    numbers = [t.grad_fn._sequence_nr() for t in captured.keep[1] if getattr(t, "grad_fn", None)]
    return int(min(numbers, default=0))


def _innermost(spans: list[tuple[str, int, int]], step: Step, offset: int) -> str | None:
    number = step.node._sequence_nr() + offset
    around = [(stop - start, name) for name, start, stop in spans if start <= number < stop]
    return min(around)[1] if around else None


@contextlib.contextmanager
def _spans(module: nn.Module, spans: list[tuple[str, int, int]]) -> Iterator[None]:
    """Note, for every call of a submodule, the node numbers handed out while it ran."""
    # private: torch's own types leave it out, though the module has it
    number = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]
    handles = []
    for path, child in module.named_modules():
        starts: list[int] = []
        name = f"{path} ({type(child).__name__})" if path else type(child).__name__

        def before(m: nn.Module, args: object, starts: list[int] = starts) -> None:
            starts.append(number())

        def after(
            m: nn.Module, args: object, out: object, name: str = name, starts: list[int] = starts
        ) -> None:
            spans.append((name, starts.pop(), number()))

        handles.append(child.register_forward_pre_hook(before))
        handles.append(child.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def coupled(problem: Problem, captured: Capture, graph: Graph, suspects: tuple[int, ...]) -> str:
    """The text of the error for coupled samples: which modules, and what to do."""
    names = modules(problem, captured, graph, suspects)
    places = ", ".join(names) or "an operation without a rule"
    ways = ['"sum" (the derivative of the sum over samples)', '"full" ([N, *out, N, *in])']
    remedy = ""
    if problem.coupling == "frozen":
        remedy = 'coupling="frozen" holds the statistics of batch normalisation constant, no more. '
    elif any("BatchNorm" in graph.steps[k].name for k in suspects):
        remedy = "Use model.eval() for batch normalisation, or say what you want: "
        ways.insert(0, '"frozen" (batch statistics held constant)')
    return (
        f"outputs of one sample depend on other samples, by way of {places}: a per-sample Jacobian "
        f"does not exist. {remedy or 'Say what you want: '}coupling={', '.join(ways)}"
    )
