"""The public functions."""

from collections.abc import Callable, Sequence
from typing import Any

from batchjac.problem import pose
from batchjac.solve import solve


def jacobian(
    f: Callable[..., Any],
    inputs: Any,
    *,
    of: str | None = None,
    wrt: str | Sequence[str] | None = None,
    outputs: Any = None,
    mode: str = "auto",
    coupling: str = "error",
    create_graph: bool = False,
    max_memory: int | str | None = None,
    out: Any = None,
    batched: bool = True,
) -> Any:
    """The derivative of every output of every sample with respect to that sample's own input."""
    return value_and_jacobian(
        f, inputs, of=of, wrt=wrt, outputs=outputs, mode=mode, coupling=coupling,
        create_graph=create_graph, max_memory=max_memory, out=out, batched=batched,
    )[1]  # fmt: skip


def value_and_jacobian(
    f: Callable[..., Any],
    inputs: Any,
    *,
    of: str | None = None,
    wrt: str | Sequence[str] | None = None,
    outputs: Any = None,
    mode: str = "auto",
    coupling: str = "error",
    create_graph: bool = False,
    max_memory: int | str | None = None,
    out: Any = None,
    batched: bool = True,
) -> tuple[Any, Any]:
    """The function's value, and the Jacobian as ``jacobian`` gives it, from the same forward."""
    problem = pose(
        f, inputs, wrt=wrt, of=of, outputs=outputs, mode=mode, coupling=coupling,
        create_graph=create_graph, batched=batched,
    )  # fmt: skip
    return solve(problem, max_memory, out)
