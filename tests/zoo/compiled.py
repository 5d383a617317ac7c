"""Models that went through a compiler or a tracer; the plain model is the truth for each."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import rowloop
from .registry import case

GROUP = "compiled and traced"
HAS_COMPILER = shutil.which("g++") is not None or shutil.which("clang++") is not None


@contextmanager
def quiet() -> Iterator[None]:
    """The tracers warn about their own age; what they make is still in use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 2)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).flatten(1)
        return torch.softmax(self.head(x), dim=1) + x[:, :3].sin()


class Made:
    """A made thing to call, with the plain model it was made of."""

    def __init__(self, plain: nn.Module, make: Callable[[nn.Module], Callable[..., Any]]) -> None:
        self.plain = plain
        with quiet():
            self.made = make(plain)

    def __call__(self, *args: Tensor) -> Any:
        with quiet():
            return self.made(*args)


def of_the_plain(f: Any, x: Any) -> Any:
    return rowloop.jacobian(f.plain, x)


@case("compile_backend_eager", group=GROUP, expected=of_the_plain)
def compile_backend_eager() -> Any:
    return Made(Net(), lambda net: torch.compile(net, backend="eager")), torch.randn(4, 1, 5)


@case("compile_backend_aot_eager", group=GROUP, expected=of_the_plain)
def compile_backend_aot_eager() -> Any:
    return Made(Net(), lambda net: torch.compile(net, backend="aot_eager")), torch.randn(4, 1, 5)


class PartlyCompiled(nn.Module):
    """One compiled block in the middle of an ordinary model."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(4, 5), nn.Sequential(), nn.Linear(5, 2)
        self.block = nn.Sequential(nn.Linear(5, 5), nn.GELU(), nn.LayerNorm(5))
        self.compiled = torch.compile(self.block, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        with quiet():
            return self.last(self.compiled(self.first(x)).tanh())

    def plain(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)).tanh())


@case("compile_one_block", group=GROUP, expected=of_the_plain)
def compile_one_block() -> Any:
    return PartlyCompiled("aot_eager"), torch.randn(4, 4)


if HAS_COMPILER:

    @case("compile_inductor", group=GROUP, expected=of_the_plain)
    def compile_inductor() -> Any:
        return PartlyCompiled("inductor"), torch.randn(4, 4)


@case("compile_with_graph_break", group=GROUP, expected=of_the_plain)
def compile_with_graph_break() -> Any:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).tanh()
            torch._dynamo.graph_break()
            return self.second(x)

    return Made(Breaks(), lambda net: torch.compile(net, backend="aot_eager")), torch.randn(4, 3)


@case("exported_module", group=GROUP, expected=of_the_plain)
def exported_module() -> Any:
    x = torch.randn(4, 1, 5)
    batch = torch.export.Dim("batch", min=1, max=64)

    def make(net: nn.Module) -> Callable[..., Any]:
        return torch.export.export(net, (x,), dynamic_shapes=({0: batch},)).module()

    return Made(Net(), make), x


@case("exported_and_decomposed", group=GROUP, expected=of_the_plain)
def exported_and_decomposed() -> Any:
    """Lowered to core ATen: convolutions and softmax are spelt in other operators."""
    x = torch.randn(3, 1, 5)

    def make(net: nn.Module) -> Callable[..., Any]:
        program = torch.export.export(net.eval(), (x,), strict=False)
        return program.run_decompositions().module()

    return Made(Net(), make), x


@case("jit_traced", group=GROUP, expected=of_the_plain)
def jit_traced() -> Any:
    x = torch.randn(4, 1, 5)
    return Made(Net(), lambda net: torch.jit.trace(net, x)), x


class Scripted(nn.Module):
    """Control flow that only a script keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.net(x)) if float(x.detach().abs().max()) > 0.5 else x * 2
        return x


@case("jit_scripted", group=GROUP, expected=of_the_plain)
def jit_scripted() -> Any:
    return Made(Scripted(), torch.jit.script), torch.randn(4, 3)


# torch caches the frozen forward as an attribute at the first call, before any hook can look
@case("jit_frozen", group=GROUP, expected=of_the_plain, may_change="attributes")
def jit_frozen() -> Any:
    """Weights folded into constants of the graph."""

    def make(net: nn.Module) -> Any:
        return torch.jit.freeze(torch.jit.script(net.eval()))

    return Made(Net(), make), torch.randn(4, 1, 5)


@case("fx_traced", group=GROUP, expected=of_the_plain)
def fx_traced() -> Any:
    return Made(Net(), fx.symbolic_trace), torch.randn(4, 1, 5)


@case("fx_made_by_make_fx", group=GROUP, expected=of_the_plain)
def fx_made_by_make_fx() -> Any:
    """A graph of ATen calls recorded from one run."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.randn(4, 1, 5)
    return Made(Net(), lambda net: make_fx(net)(x)), x
