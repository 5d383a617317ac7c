"""The shape of an answer: outputs nested over what they are differentiated by."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from batchjac.capture import Capture, Target
from batchjac.problem import Problem

Part = tuple[int, str, int]  # output leaf, wanted name, target leaf


def nest(problem: Problem, captured: Capture, part: Callable[[Part], Tensor]) -> Any:
    """Fill the nesting of outputs over inputs with ``part(output, name, leaf)``."""

    def one(output: int) -> Any:
        if output not in captured.outputs:
            return None
        found = {name: _tree(captured, output, name, part) for name in captured.targets}
        return found if problem.named else next(iter(found.values()))

    return captured.values.build([one(k) for k in range(len(captured.values.leaves))])


def _tree(captured: Capture, output: int, name: str, part: Callable[[Part], Tensor]) -> Any:
    tree = captured.targets[name]
    leaves = [
        part((output, name, k)) if target is not None else None
        for k, target in enumerate(tree.leaves)
    ]
    return tree.build(leaves)


def parts(captured: Capture) -> list[tuple[Part, Target]]:
    """Every Jacobian in the answer, and what it is differentiated by."""
    return [
        ((output, name, k), target)
        for output in captured.outputs
        for name, tree in captured.targets.items()
        for k, target in enumerate(tree.leaves)
        if target is not None
    ]
