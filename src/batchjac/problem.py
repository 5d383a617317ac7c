"""What is asked: the function, its inputs, with respect to what, of which outputs. Validated."""

import contextlib
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from batchjac.errors import (
    BatchAxisError,
    InputError,
    InputTypeError,
    NameNotFoundError,
    SelectionError,
    UnsupportedError,
)
from batchjac.state import refuse_lazy
from batchjac.tree import Tree, flatten

Coupling = Literal["error", "frozen", "sum", "full"]
Mode = Literal["auto", "forward", "reverse", "mixed"]
Kind = Literal["inputs", "layer", "parameter"]
COUPLINGS = ("error", "frozen", "sum", "full")
MODES = ("auto", "forward", "reverse", "mixed")


@dataclass(frozen=True)
class Wanted:
    """One thing to differentiate with respect to, under the name the caller used."""

    kind: Kind
    name: str


@dataclass(frozen=True)
class Problem:
    """A validated question; engines read it and never change it."""

    function: Callable[..., Any]
    module: nn.Module | None
    inputs: Any
    tree: Tree
    samples: int
    wanted: tuple[Wanted, ...]
    named: bool  # the answer is a dict by name rather than the bare result
    of: str | None
    outputs: Any
    coupling: Coupling
    create_graph: bool
    batched: bool
    mode: Mode = "auto"
    vmapped: bool = True  # a function of one sample may run under torch.vmap
    compiler: str | None = None  # what walks are handed to, as torch.compile names it
    around: Callable[[], contextlib.AbstractContextManager[Any]] = (
        contextlib.nullcontext
    )  # each call

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters asked for, by name."""
        names = [w.name for w in self.wanted if w.kind == "parameter"]
        every = _parameters(self.module) if names and self.module is not None else {}
        return {name: every[name] for name in names}

    def call(self, leaves: Sequence[Any]) -> Any:
        """``f`` on these leaves in the nesting of the inputs: ``f(*x)``, ``f(**x)`` or ``f(x)``."""
        with self.around():
            if not self.batched:
                return _per_sample(self.function, self.tree, leaves, self.vmapped)
            return _apply(self.function, self.tree.build(leaves))

    def part(self, samples: slice, leaves: Sequence[Any]) -> "Problem":
        """The same question of these samples alone, whose inputs are ``leaves``."""
        outputs = self.outputs
        if isinstance(outputs, Tensor) and outputs.dim() == 1:
            outputs = outputs[samples]
        tree, count = replace(self.tree, leaves=tuple(leaves)), samples.stop - samples.start
        return replace(self, inputs=tree.build(leaves), tree=tree, samples=count, outputs=outputs)


def _apply(function: Callable[..., Any], inputs: Any) -> Any:
    if type(inputs) is tuple:
        return function(*inputs)
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(inputs)


def _per_sample(
    function: Callable[..., Any], tree: Tree, leaves: Sequence[Any], vmapped: bool
) -> Any:
    """A function of one sample on a batch: under ``torch.vmap``, else sample by sample."""
    nesting: list[Tree] = []
    axes = tuple(0 if isinstance(leaf, Tensor) else None for leaf in leaves)

    def one(*sample: Any) -> tuple[Any, ...]:
        nesting.append(flatten(_apply(function, tree.build(sample))))
        return nesting[-1].leaves

    if vmapped:
        # vmap refuses a branch on a value, an .item(), an output that is no tensor
        with contextlib.suppress(RuntimeError, ValueError, TypeError, NotImplementedError):
            columns = torch.vmap(one, in_dims=axes, randomness="different")(*leaves)
            return nesting[-1].build(columns)
    size = next(len(leaf) for leaf in leaves if isinstance(leaf, Tensor))
    rows = [
        one(*(leaf[n] if isinstance(leaf, Tensor) else leaf for leaf in leaves))
        for n in range(size)
    ]
    return nesting[-1].build([_stacked(column) for column in zip(*rows, strict=True)])


def _stacked(column: tuple[Any, ...]) -> Any:
    return torch.stack(column) if isinstance(column[0], Tensor) else column[0]


def differentiable(leaf: Any) -> bool:
    """Whether a leaf is a tensor of a floating dtype."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def pose(
    function: Callable[..., Any],
    inputs: Any,
    *,
    wrt: str | Sequence[str] | None,
    of: str | None,
    outputs: Any,
    mode: str,
    coupling: str,
    create_graph: bool,
    batched: bool,
    compile: bool = False,
) -> Problem:
    """Check the question and put it into one frozen value."""
    if not callable(function):
        raise InputTypeError(
            f"f must be an nn.Module or a callable on a batch, got {type(function).__name__}"
        )
    _check_choice("mode", mode, MODES)
    _check_choice("coupling", coupling, COUPLINGS)
    if mode in ("forward", "mixed") and coupling in ("sum", "full"):
        raise UnsupportedError(
            f'coupling="{coupling}" goes in reverse; mode="{mode}" cannot answer it, use '
            'mode="auto"'
        )
    for name, flag in (
        ("create_graph", create_graph), ("batched", batched), ("compile", compile),
    ):  # fmt: skip
        if not isinstance(flag, bool):
            raise InputTypeError(f"{name} must be True or False, got {flag!r}")
    module = module_of(function)
    if module is not None:
        refuse_lazy(module)
    if isinstance(inputs, Mapping) and not all(isinstance(key, str) for key in inputs):
        raise InputTypeError(
            f"inputs as a dict are called as f(**inputs), so keys must be names, got {list(inputs)}"
        )
    tree = flatten(inputs)
    size = _batch_size(tree)
    wanted, named = _wanted(module, wrt)
    if coupling == "sum" and any(w.kind == "parameter" for w in wanted):
        raise InputError(
            'coupling="sum" has no meaning for parameters, which all samples share; use "full"'
        )
    if not batched and (of is not None or any(w.kind == "layer" for w in wanted)):
        raise UnsupportedError(
            "of= and wrt= with a layer's name need batched=True: under batched=False a layer runs "
            "once for each sample. Let f take the batch"
        )
    if of is not None:
        if not isinstance(of, str):
            raise InputTypeError(f"of must be the dotted name of a layer, got {of!r}")
        _layer(module, of, "of")
    if any(w.kind == "inputs" for w in wanted) and not any(map(differentiable, tree.leaves)):
        kinds = sorted({str(t.dtype) for t in tree.leaves if isinstance(t, Tensor)})
        raise InputError(
            f"no input has a floating dtype (got {', '.join(kinds)}), so there is nothing to "
            "differentiate; convert it with x.float(), or name an inner layer, for instance the "
            "embedding, with wrt="
        )
    whole = isinstance(outputs, Tensor) and outputs.dtype in (torch.int64, torch.int32)
    if whole and outputs.dim() == 1 and len(outputs) != size:
        raise SelectionError(
            f"outputs has {len(outputs)} entries; as a tensor it must name one output for each "
            f"sample, {size} here. For the same outputs in every sample pass a list"
        )
    kind = cast(Coupling, coupling)  # _check_choice has let no other text through
    return Problem(
        function, module, inputs, tree, size, wanted, named, of, outputs,
        kind, create_graph, batched, cast(Mode, mode), compiler="inductor" if compile else None,
    )  # fmt: skip


def without_routes(problem: Problem, reason: str) -> Problem:
    """The same question in plain reverse, unless another direction was asked for by name."""
    if problem.mode in ("forward", "mixed"):
        raise UnsupportedError(
            f'mode="{problem.mode}": this function has {reason}, which run in reverse only; use '
            'mode="auto"'
        )
    return replace(problem, mode="reverse")


def _check_choice(name: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise InputError(f"{name} must be one of {', '.join(map(repr, valid))}, got {value!r}")


def module_of(function: Callable[..., Any]) -> nn.Module | None:
    """The module whose layers and parameters can be named, when there is one."""
    if isinstance(function, functools.partial):
        return module_of(function.func)
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    if not isinstance(owner, nn.Module):
        return None
    # torch.compile wraps a module and prefixes every name with _orig_mod
    original = getattr(owner, "_orig_mod", owner)
    return original if isinstance(original, nn.Module) else owner


def _batch_size(tree: Tree) -> int:
    tensors = [(p, t) for p, t in zip(tree.paths, tree.leaves, strict=True) if _is_tensor(p, t)]
    if not tensors:
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in tree.leaves})) or "nothing"
        raise InputTypeError(
            f"inputs must hold at least one torch tensor, got {kinds}; "
            "convert arrays with torch.as_tensor"
        )
    for path, tensor in tensors:
        if tensor.dim() == 0:
            raise BatchAxisError(
                f"inputs{path} is a tensor without axes; every input tensor needs the batch axis "
                "first. Bind what all samples share with functools.partial or a lambda"
            )
    sizes = {int(t.shape[0]) for _, t in tensors}
    if len(sizes) > 1:
        listed = ", ".join(f"inputs{p} {tuple(t.shape)}" for p, t in tensors)
        raise BatchAxisError(
            f"the inputs disagree on the number of samples: {listed}. Every input tensor needs the "
            "batch axis first; bind what all samples share with functools.partial or a lambda"
        )
    size = sizes.pop()
    if size == 0:
        raise InputError("the batch is empty (N = 0); there is no sample to differentiate")
    return size


def _is_tensor(path: str, leaf: Any) -> bool:
    if not isinstance(leaf, Tensor):
        return False
    check_boundary(f"inputs{path}", leaf)
    return True


def check_boundary(where: str, tensor: Tensor) -> None:
    """Refuse tensors whose Jacobian has no dense real form."""
    if tensor.is_nested:
        raise InputTypeError(
            f"{where} is a nested tensor; pad it with torch.nested.to_padded_tensor and mask"
        )
    if isinstance(tensor, torch.masked.MaskedTensor):
        raise InputTypeError(
            f"{where} is a masked tensor, of which autograd records too little; pass its "
            ".to_tensor(0.0) and the mask, and let f use torch.where"
        )
    if tensor.layout != torch.strided:
        raise InputTypeError(
            f"{where} has the sparse layout {tensor.layout}; pass its .to_dense() form"
        )
    if tensor.is_complex():
        raise InputTypeError(
            f"{where} is complex ({tensor.dtype}); a Jacobian is returned for real tensors only. "
            "Pass torch.view_as_real(z) and call torch.view_as_complex inside f, or return "
            "torch.view_as_real(y); complex numbers inside f need nothing"
        )


def _wanted(
    module: nn.Module | None, wrt: str | Sequence[str] | None
) -> tuple[tuple[Wanted, ...], bool]:
    if wrt is None or wrt == "inputs":
        return (Wanted("inputs", "inputs"),), False
    if wrt == "parameters":
        names = [n for n, p in _parameters(module, "wrt").items() if p.is_floating_point()]
        first = dict(module.named_parameters()) if module is not None else {}
        found = tuple(Wanted("parameter", n) for n in names if n in first)
        if not found:
            raise InputError(f"wrt='parameters': {type(module).__name__} has no parameters")
        return found, True
    if isinstance(wrt, str):
        return (_resolve(module, wrt),), False
    if not isinstance(wrt, Sequence) or not all(isinstance(name, str) for name in wrt):
        raise InputTypeError(
            "wrt must be None, 'inputs', 'parameters', a layer or parameter name, or a list of "
            f"names, got {type(wrt).__name__}; a tensor is named as in model.named_parameters()"
        )
    if not wrt:
        raise InputError("wrt is an empty list; name at least one layer or parameter")
    groups = [_wanted(module, name)[0] for name in dict.fromkeys(wrt)]
    return tuple(dict.fromkeys(w for group in groups for w in group)), True


def _resolve(module: nn.Module | None, name: str) -> Wanted:
    if name in _parameters(module, "wrt"):
        return Wanted("parameter", name)
    _layer(module, name, "wrt")
    return Wanted("layer", name)


def _parameters(module: nn.Module | None, argument: str = "wrt") -> dict[str, nn.Parameter]:
    return dict(_named(module, argument).named_parameters(remove_duplicate=False))


def _modules(module: nn.Module | None, argument: str) -> dict[str, nn.Module]:
    return dict(_named(module, argument).named_modules(remove_duplicate=False))


def _named(module: nn.Module | None, argument: str) -> nn.Module:
    if module is None:
        raise NameNotFoundError(
            f"{argument}= names a layer or parameters, but f is a plain function or other object; "
            "pass the nn.Module itself"
        )
    return module


def _layer(module: nn.Module | None, name: str, argument: str) -> nn.Module:
    layers = {n: m for n, m in _modules(module, argument).items() if n}
    if name in layers:
        return layers[name]
    # of= takes layers only, so it suggests no parameters
    known = [*layers, *(_parameters(module, argument) if argument == "wrt" else ())]
    kind = "layer or parameter" if argument == "wrt" else "layer"
    raise NameNotFoundError(
        f"{argument}={name!r} is no {kind} of {type(module).__name__}{_hint(str(name), known)}"
    )


def _hint(name: str, known: Sequence[str]) -> str:
    """The nearest names, or the first ones when none is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    if not known:
        return ", which has none"
    shown = ", ".join(map(repr, known[:6]))
    return f"; it has {shown}{' and more' if len(known) > 6 else ''}"


def layer(problem: Problem, name: str) -> nn.Module:
    """The layer of this name; it was found when the problem was posed."""
    return _layer(problem.module, name, "wrt")
