"""For tests, ours and those of models: fixed chunks, and the comparison with the specification."""

from typing import Any

from batchjac.memory import Chunk
from batchjac.problem import pose
from batchjac.solve import solve


def jacobian_in_chunks(
    f: Any,
    inputs: Any,
    samples: int,
    rows: int,
    *,
    of: Any = None,
    wrt: Any = None,
    outputs: Any = None,
    mode: str = "auto",
    coupling: str = "error",
    create_graph: bool = False,
    out: Any = None,
    batched: bool = True,
) -> Any:
    """``batchjac.jacobian`` with ``samples`` per forward and ``rows`` per walk, whatever fits.

    Law: equal to ``batchjac.jacobian`` for every ``samples`` and ``rows``.
    """
    problem = pose(
        f, inputs, wrt=wrt, of=of, outputs=outputs, mode=mode, coupling=coupling,
        create_graph=create_graph, batched=batched,
    )  # fmt: skip
    return solve(problem, None, out, Chunk(samples, rows)).jacobian
