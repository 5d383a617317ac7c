"""Work done in the middle of a backward pass, as if there were none."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def aside(act: Callable[[], T]) -> T:
    """What ``act`` returns; in it, calling a node of a graph gives its gradients.

    A node that is called asks the pass that is under way which of its gradients are needed. The
    pass of ``autograd.grad`` knows its own nodes alone and says none of any other, so that ``None``
    comes back. A pass of ``backward`` needs all, so the work is done in one of those.
    """
    if torch._C._current_graph_task_id() == -1:
        return act()
    found: list[T] = []
    mode = torch.is_grad_enabled()

    def work() -> None:
        with torch.set_grad_enabled(mode):
            found.append(act())

    with torch.enable_grad():
        leaf = torch.zeros((), requires_grad=True)
        # torch leaves its apply untyped
        torch.autograd.backward(_Aside.apply(leaf, work))  # type: ignore[no-untyped-call]
    return found[0]


class _Aside(torch.autograd.Function):
    """Does some work in its backward, and has no gradient."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, work: Callable[[], None]) -> Tensor:
        ctx.work = work
        return leaf.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        ctx.work()
        return None, None
