"""Losses of the Jacobian over the zoo, beside nested autograd; and a thousand steps."""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from batchjac import jacobian
from batchjac.engines import reference
from batchjac.errors import UnsupportedError
from batchjac.problem import pose
from batchjac.recompute import recomputed
from batchjac.solution import Solution
from batchjac.tree import flatten
from tests.zoo import CASES, Case, seeded
from tests.zoo.registry import default_dtype

pytestmark = [
    # tracers, forward mode and inductor load scripts of torch's own that warn about their age
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

# torch has no second derivative of these, or a user's function none of its own: the same error.
ONCE = {
    "function_numpy_in_backward": "numpy",
    "point_distances": "_cdist_backward",
    "pairwise_distances_pdist": "_pdist_backward",
    "implicit_reparametrisation": "_standard_gamma_grad",
    "per_sample_losses": "multi_margin_loss_backward",
    "connectionist_temporal_loss": "_ctc_loss_backward",
    "embedding_bag_weighted": "_embedding_bag_per_sample_weights_backward",
}
# torch's second derivative is missing (ours is 0 inside and outside), or takes another slope at 0
# than its first.
OURS = {"hard_functions_at_their_ends", "prelu_and_rrelu"}
# Exact sizes are part of what was traced; a whole batch decides.
WHOLE = {"exported_and_decomposed", "fx_made_by_make_fx", "jit_scripted"}


def names(case: Case) -> str:
    return case.name


def goals(f: Any, inputs: Any) -> list[Tensor]:
    """The inputs, made to record, and what the function holds that does."""
    found = [t for t in flatten(inputs).leaves if isinstance(t, Tensor) and t.is_floating_point()]
    for t in found:
        if t.is_leaf and not t.is_inference():
            t.requires_grad_()
    held = [t for t in _held(f, 0) if t.requires_grad]
    return list({id(t): t for t in (*found, *held) if t.requires_grad}.values())


def _held(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, nn.Module):
        yield from value.parameters()
    elif isinstance(value, Tensor):
        yield value
    elif inspect.ismethod(value):
        yield from _held(value.__self__, depth)
    elif inspect.isfunction(value) and depth < 4:
        for cell in value.__closure__ or ():
            yield from _held(cell.cell_contents, depth + 1)


def loss(j: Any) -> Tensor:
    """Quadratic, with random weights, of all that the answer holds."""
    generator, total = torch.Generator().manual_seed(1), torch.zeros(())
    for part in flatten(j).leaves:
        if isinstance(part, Tensor):
            weights = torch.randn(part.shape, generator=generator, dtype=torch.float64)
            weights = weights.to(part.dtype)
            total = total + (part * weights).sum() + (part.square() * weights.cos()).sum()
    return total


def gradients(case: Case, answer: Callable[[Any, Any], Any]) -> Sequence[Tensor]:
    """Of the loss, by all that the function depends on."""
    f, inputs = case.build()
    with case.around(), seeded(case.seed), default_dtype(case.dtype):
        by = goals(f, inputs)
        total = loss(answer(f, inputs))
        if not total.requires_grad:
            return [torch.zeros_like(t) for t in by]
        return torch.autograd.grad(total, by, allow_unused=True, materialize_grads=True)


def nested(case: Case) -> Sequence[Tensor]:
    """By autograd alone, whose fused attention has no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        return gradients(
            case, lambda f, x: reference.jacobian(f, x, create_graph=True, **case.options)
        )


def equal(ours: Sequence[Tensor], theirs: Sequence[Tensor], case: Case) -> None:
    sizes = [float(t.to_dense().nan_to_num(0, 0, 0).abs().max()) for t in theirs if t.numel()]
    largest = max(sizes, default=0.0)
    allowed = max(1e-9, 10 * case.tolerance) * max(largest, 1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.to_dense(), b.to_dense(), rtol=0, atol=allowed, equal_nan=True)


RIGHT = [c for c in CASES if c.expects is None]


@pytest.mark.parametrize("case", [c for c in RIGHT if c.name not in OURS], ids=names)
def test_a_loss_has_the_gradient_of_nested_autograd(case: Case) -> None:
    def answer(f: Any, x: Any) -> Any:
        return jacobian(f, x, create_graph=True, **case.options)

    if case.name in ONCE:
        for way in (lambda: nested(case), lambda: gradients(case, answer)):
            with pytest.raises((RuntimeError, NotImplementedError), match=ONCE[case.name]):
                way()
        return
    equal(gradients(case, answer), nested(case), case)


def chunked(case: Case) -> Callable[[Any, Any], Any]:
    """The answer in chunks of two samples that are computed again."""
    options: dict[str, Any] = {
        "wrt": None, "of": None, "outputs": None, "mode": "auto", "coupling": "error",
        "create_graph": True, "batched": True,
    }  # fmt: skip

    def answer(f: Any, x: Any) -> Any:
        problem = pose(f, x, **(options | dict(case.options)))

        def then(solution: Solution, samples: slice) -> list[Tensor]:
            return [t for t in flatten(solution.jacobian).leaves if isinstance(t, Tensor)]

        return recomputed(problem, then, None, fixed=2)

    return answer


CHUNKS = [
    c for c in RIGHT
    if "chunks" not in c.without
    and c.name not in OURS | WHOLE | set(ONCE)
    and c.options.get("coupling", "error") == "error"
]  # fmt: skip


@pytest.mark.parametrize("case", CHUNKS, ids=names)
def test_chunks_computed_again_have_the_same_gradient(case: Case) -> None:
    def whole(f: Any, x: Any) -> Any:
        return jacobian(f, x, create_graph=True, **case.options)

    try:
        ours = gradients(case, chunked(case))
    except UnsupportedError as error:
        assert "hooks gradients" in str(error)  # noqa: PT017 (only then may it be refused)
        return
    equal(ours, gradients(case, whole), case)


# No leak.


def resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE")


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(("max_memory", "steps"), [(None, 1000), ("250kB", 200)])
def test_a_thousand_steps_leave_nothing(max_memory: str | None, steps: int) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(256, 4)

    def step() -> Tensor:
        optimiser.zero_grad()
        j = jacobian(model, x, create_graph=True, max_memory=max_memory)
        torch.linalg.vector_norm(j).backward()
        optimiser.step()
        return j

    assert step().grad_fn.name() == (
        "ViewBackward0" if max_memory is None else "_RecomputedBackward"
    )
    for _ in range(50):
        step()
    alive, held = tensors(), resident()
    for _ in range(steps):
        step()
    assert tensors() == alive
    assert resident() - held < 4 << 20
