"""Solutions that came from an iteration, differentiable without it.

``J x = b`` says all: whatever led to x, ``dx = J^-1 (db - dJ x)``. The backward is one more
solution, with the transpose, and one product's gradient; being made of the same function it is
itself differentiable, to any order.

Source: Christianson, Reverse accumulation and attractive fixed points, 1994.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from batchjac.aside import aside
from batchjac.errors import LinAlgError
from batchjac.linalg.krylov import SOLVERS
from batchjac.linalg.products import Flipped, Products, read_by

_SHOWN = 5


@dataclass(frozen=True)
class Task:
    """How a system is solved, and what is said where that fails."""

    name: str
    products: Products
    ends: Sequence[Tensor]  # inputs, where the history of the products may be cut
    method: str
    tolerance: float
    most: int
    lenient: bool  # NaN for what did not converge, instead of an error

    @property
    def flipped(self) -> "Task":
        """The same with the transpose, for a gradient."""
        return replace(self, products=Flipped(self.products))

    def solve(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """The solution without a history, and which samples have none: zeros, or an error."""
        with torch.no_grad():
            largest = b.abs().amax(1, keepdim=True)
            zero = largest == 0
            # squares of very small numbers are zero, and of very large ones infinite
            size = torch.where(zero, 1, largest)
            found = SOLVERS[self.method](self.products, b / size, self.tolerance, self.most)
            # a product with zero is NaN where J holds that
            x = torch.where(zero, 0, found.x * size)
        bad = ~(found.residual <= self.tolerance).all(1)
        if not bad.any():
            return x, bad
        if not self.lenient:
            raise self._failed(bad, found.residual)
        return torch.where(bad[:, None, None], 0, x), bad

    def _failed(self, bad: Tensor, residual: Tensor) -> LinAlgError:
        at = bad.nonzero().flatten()
        worst = residual[at].nan_to_num(nan=float("inf"), posinf=float("inf")).amax(1)
        listed = ", ".join(
            f"{n} (residual {float(r):.1e})"
            for n, r in zip(at[:_SHOWN].tolist(), worst[:_SHOWN], strict=True)
        )
        more = f" and {len(at) - _SHOWN} more" if len(at) > _SHOWN else ""
        other = "cgls" if self.method == "gmres" else "gmres"
        return LinAlgError(
            f"linalg.{self.name}: {self.method} did not reach tolerance={self.tolerance:.1e} "
            f"within max_products={self.most} for samples {listed}{more}. Singular or "
            f'ill-conditioned Jacobians do that; raise max_products, try method="{other}", '
            'or the default method if J fits, or pass on_singular="nan"',
            at, worst,
        )  # fmt: skip


class _Gate(torch.autograd.Function):
    """The same tensor, behind which a gradient goes on only while the gate is open."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, closed: list[bool]) -> Tensor:
        ctx.closed = closed
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None if ctx.closed else gradients[0], None


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, task: Task, b: Tensor, *sources: Tensor) -> tuple[Tensor, Tensor]:
        x, bad = task.solve(b)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *sources)
        ctx.task = task
        ctx.mark_non_differentiable(bad)
        return x, bad

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *sources = ctx.saved_tensors
        g = gradients[0]
        if g is None:
            return None, None, *(None for _ in sources)
        wanted = ctx.needs_input_grad[2:]
        # products call nodes of their graph
        w, found = aside(lambda: _pulled(ctx.task, x, g, sources, wanted))
        return None, w, *found


def _pulled(
    task: Task, x: Tensor, g: Tensor, sources: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradients by b, ``w = J^-T g``, and by what J depends on, that of ``-<w, J x>``."""
    w = implicit(task.flipped, g)
    found: list[Tensor | None] = [None] * len(sources)
    at = [k for k, want in enumerate(wanted) if want]
    if at:
        history = torch.is_grad_enabled()
        closed = [True]  # x stands for itself here, and for what made it in later derivatives
        with torch.enable_grad():
            product = task.products.times(_applied(_Gate, x, closed))
        parts = torch.autograd.grad(
            product, [sources[k] for k in at], -w, retain_graph=True, create_graph=history,
            allow_unused=True,
        )  # fmt: skip
        closed.clear()
        for k, part in zip(at, parts, strict=True):
            found[k] = part
    return w, found


def implicit(task: Task, b: Tensor) -> Tensor:
    """``J^-1 b`` for columns ``[N, n, k]``, differentiable by b and by all that J depends on."""
    with torch.enable_grad():
        product = task.products.times(torch.ones_like(b[:, :, :1]))
    sources = read_by(product, task.ends)
    x, bad = _applied(_Implicit, task, b, *sources)
    return marked(x, bad)


def marked(x: Tensor, bad: Tensor) -> Tensor:
    """NaN in the places of samples without a solution, from which no gradient comes."""
    return torch.where(bad[:, None, None], float("nan"), x) if bad.any() else x


def _applied(function: type[torch.autograd.Function], *given: Any) -> Any:
    return function.apply(*given)
