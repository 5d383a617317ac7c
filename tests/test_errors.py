"""Every bad input and what is said about it; what looks bad and is answered."""

from __future__ import annotations

import ast
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchjac
from batchjac import errors, jacobian
from batchjac.errors import (
    BatchAxisError,
    BatchjacError,
    BudgetError,
    CouplingError,
    InputError,
    InputTypeError,
    LinAlgError,
    MismatchError,
    NameNotFoundError,
    OutError,
    SelectionError,
    StateError,
    UnsupportedError,
)
from batchjac.maps import LinearMap
from tests.bad_calls import Bad, N, batch, linear, mlp
from tests.bad_inputs import EVERY

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state"),
]

BUILTIN: dict[type[BatchjacError], tuple[type[Exception], ...]] = {
    InputError: (ValueError,),
    InputTypeError: (TypeError,),
    BatchAxisError: (ValueError,),
    SelectionError: (ValueError, IndexError),
    NameNotFoundError: (ValueError, KeyError),
    OutError: (ValueError,),
    CouplingError: (RuntimeError,),
    BudgetError: (RuntimeError,),
    MismatchError: (ValueError,),
    UnsupportedError: (NotImplementedError,),
    StateError: (RuntimeError,),
    LinAlgError: (torch.linalg.LinAlgError, RuntimeError),
}


@pytest.mark.parametrize("case", EVERY, ids=lambda c: c.name)
def test_bad_input_is_named(case: Bad) -> None:
    with pytest.raises(case.error, match=case.says) as caught:
        case.call()
    assert caught.type is case.error
    assert isinstance(caught.value, BUILTIN[case.error])


def test_every_error_class_has_a_case() -> None:
    classes = {c for _, c in inspect.getmembers(errors, inspect.isclass)
               if issubclass(c, BatchjacError)} - {BatchjacError}  # fmt: skip
    # a plan refuses inputs of another kind: tests/test_planning.py; singular Jacobians:
    # tests/test_linalg_errors.py
    elsewhere = {MismatchError, LinAlgError}
    assert classes == set(BUILTIN) == {case.error for case in EVERY} | elsewhere
    assert issubclass(MismatchError, BUILTIN[MismatchError])


def test_value_and_jacobian_refuses_the_same() -> None:
    with pytest.raises(SelectionError, match="outputs=2 is out of range"):
        batchjac.value_and_jacobian(linear(), batch(), outputs=2)


def test_a_missing_name_reads_as_a_sentence() -> None:
    """A KeyError would print the repr of its message."""
    with pytest.raises(KeyError) as caught:
        jacobian(mlp(), batch(), wrt="zzz")
    assert str(caught.value).startswith("wrt='zzz' is no layer")


@pytest.mark.parametrize("options", [{}, {"wrt": "parameters"}], ids=["input", "parameters"])
def test_a_model_of_inference_mode_is_named(options: dict[str, Any]) -> None:
    with torch.inference_mode():
        model = linear()
    with pytest.raises(StateError, match=r"made under torch\.inference_mode.*outside it"):
        jacobian(model, batch(), **options)


def test_an_input_of_inference_mode_is_taken() -> None:
    model = linear()
    with torch.inference_mode():
        x = batch()
        inside = jacobian(model, x)
    assert torch.equal(jacobian(model, x), inside)
    assert torch.equal(inside[0], model.weight)
    assert not jacobian(model, x).is_inference()


@pytest.mark.parametrize("lazy", [nn.LazyLinear(2), nn.LazyBatchNorm1d(affine=False)])
def test_a_lazy_module_behind_a_function(lazy: nn.Module) -> None:
    kind = type(lazy)
    with pytest.raises(StateError, match="has no shape yet"):
        jacobian(lambda x: lazy(x), batch())
    assert type(lazy) is kind


class OwnError(Exception):
    """What a user's function may raise."""


@pytest.mark.parametrize(
    "error", [OwnError("mine"), ValueError("mine"), RuntimeError("mine"), TypeError("mine")]
)
@pytest.mark.parametrize("batched", [True, False])
def test_the_functions_own_error_passes_unchanged(error: Exception, batched: bool) -> None:
    def f(x: Tensor) -> Tensor:
        raise error

    with pytest.raises(type(error), match=r"^mine$") as caught:
        jacobian(f, batch(), batched=batched)
    assert caught.value is error


class Interrupted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt


def test_an_interruption_passes() -> None:
    with pytest.raises(KeyboardInterrupt):
        jacobian(Interrupted(), batch())


# What is no error: documented answers, some with a line in the log.


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.INFO, logger="batchjac"):
        yield lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a constant": lambda x: torch.ones(len(x), 2),
    "a recorded constant": lambda x: torch.ones(len(x), 2, requires_grad=True) * 2,
    "detached": lambda x: x.detach()[:, :2] * 3,
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_an_output_that_does_not_depend_on_the_input(
    name: str, said: Callable[[], list[str]]
) -> None:
    j = jacobian(CONSTANTS[name], batch())
    assert torch.equal(j, torch.zeros(N, 2, 3))
    assert said() == ["output does not depend on inputs: its Jacobian is zero"]


def test_only_the_independent_part_is_said(said: Callable[[], list[str]]) -> None:
    j = jacobian(lambda a, b: {"one": a * 2, "none": torch.ones(len(a), 1)}, (batch(), batch()))
    assert torch.equal(j["one"][0], 2 * torch.eye(3).expand(N, 3, 3))
    assert not any(part.any() for part in (j["one"][1], *j["none"]))
    assert said() == [
        f"output['{output}'] does not depend on inputs[{k}]: its Jacobian is zero"
        for output, k in (("one", 1), ("none", 0), ("none", 1))
    ]


def test_nan_passes_through_and_is_counted(said: Callable[[], list[str]]) -> None:
    x = batch()
    x[1, 2] = x[3, 0] = x[3, 1] = torch.nan
    j = jacobian(lambda a, b: a * a + b, (x, batch()))[0]
    diagonal = j.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal, 2 * x, equal_nan=True)
    assert torch.equal(diagonal.isnan(), x.isnan())
    assert not j[[0, 2]].isnan().any()
    assert said() == ["inputs[0]: 2 of 4 samples hold NaN, which passes through to their Jacobians"]


def test_infinities_pass_without_a_word(said: Callable[[], list[str]]) -> None:
    x = batch()
    x[0, 0] = torch.inf
    assert torch.equal(jacobian(torch.relu, x)[0, 0], torch.tensor([1.0, 0.0, 0.0]))
    assert said() == []


@pytest.mark.parametrize("selection", [[], slice(2, 2), slice(9, None)])
def test_no_outputs_give_no_rows(selection: Any) -> None:
    assert jacobian(linear(), batch(), outputs=selection).shape == (N, 0, 3)


@pytest.mark.parametrize("selection", [-1, [1, 1], slice(None, None, -1), np.int64(1), range(2)])
def test_unusual_selections_that_work(selection: Any) -> None:
    model = linear()
    rows = list(selection) if isinstance(selection, range) else selection
    expected = model.weight.detach().numpy()[rows]
    np.testing.assert_array_equal(jacobian(model, batch(), outputs=selection)[2], expected)


# The budget: the least that would do, and that it does.


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(50, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(),
                         nn.Linear(300, 40))  # fmt: skip


def perceptron_and_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(50, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 10))


BUDGETS: list[tuple[str, Callable[[], nn.Module], dict[str, Any]]] = [
    ("inputs", deep, {}),
    ("a layer", deep, {"wrt": "2"}),
    ("parameters", deep, {"wrt": ["4.weight", "0.bias"], "outputs": [0, 3]}),
    ("the whole batch", perceptron_and_batch_norm, {"coupling": "full"}),
    ("out", deep, {"out": torch.empty(30, 40, 50)}),
]


@pytest.mark.parametrize(("make", "options"), [b[1:] for b in BUDGETS], ids=[b[0] for b in BUDGETS])
def test_a_budget_too_small_says_the_least_that_does(
    make: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    model, x = make(), torch.randn(30, 50)
    expected = jacobian(model, x, **options)
    if isinstance(expected, Tensor):
        expected = expected.clone()
    least = least_of(model, x, 1, options)
    if least > 2:
        assert least_of(model, x, least - 2, options) == least
    found = jacobian(model, x, max_memory=least, **options)
    torch.testing.assert_close(found, expected)


def least_of(model: nn.Module, x: Tensor, allowed: int, options: dict[str, Any]) -> int:
    with pytest.raises(BudgetError, match="the least that would do is max_memory=") as caught:
        jacobian(model, x, max_memory=allowed, **options)
    return int(re.findall(r"max_memory=(\d+)", str(caught.value))[0])


@pytest.mark.parametrize("number", [10**6, 1e6, np.int64(10**6), np.float32(1e6)])
def test_budgets_as_numbers(number: Any) -> None:
    assert jacobian(linear(), batch(), max_memory=number).shape == (N, 2, 3)


@pytest.mark.parametrize("text", ["1 MB", "1MB", "0.5GiB", "300 KiB", "1m", "  2 mib ", "900000"])
def test_budgets_as_text(text: str) -> None:
    assert jacobian(linear(), batch(), max_memory=text).shape == (N, 2, 3)


# What the messages quote.

SRC = Path(batchjac.__file__).parent
OF_TORCH = set(inspect.signature(torch.utils.checkpoint.checkpoint).parameters)
OF_THE_PUBLIC = set(inspect.signature(batchjac.jacobian).parameters)


def keywords(owner: Any) -> set[str]:
    """What can only be given by name to any of the functions of a module, or methods of a class."""
    return {
        name
        for _, function in inspect.getmembers(owner, inspect.isfunction)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


# What only these files may quote: no other function takes it.
OF_MAPS, OF_LINALG = keywords(LinearMap), keywords(batchjac.linalg)
OWN = {"maps.py": OF_MAPS, "measures.py": OF_MAPS, "lazy.py": OF_MAPS, "linalg": OF_LINALG}
QUOTED = re.compile(r"""(?<![\w.<>=!])([a-z_]+)=(?![=>])""")


def messages(tree: ast.AST) -> Iterator[str]:
    """Texts of a module that may reach a user: all literals but docstrings."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def core() -> list[Path]:
    """The modules behind ``jacobian``; command line, doctor and demo quote options of their own."""
    outside = {"cli.py", "doctor.py", "demo", "testing.py"}
    return [p for p in sorted(SRC.rglob("*.py")) if p.relative_to(SRC).parts[0] not in outside]


def test_messages_quote_only_arguments_that_exist() -> None:
    seen: set[str] = set()
    wrong: list[str] = []
    for path in core():
        file = path.relative_to(SRC)
        allowed = OF_THE_PUBLIC | OF_TORCH | OWN.get(file.parts[0], set())
        for text in messages(ast.parse(path.read_text())):
            names = set(QUOTED.findall(text))
            seen |= names
            wrong += [f"{file}: {name}= in {text!r}" for name in names - allowed]
    assert wrong == []
    assert {"of", "wrt", "outputs", "coupling", "max_memory", "out", "batched"} <= seen
    assert {"across", "regularisation", "method"} <= seen


def test_every_argument_has_a_case() -> None:
    """Each keyword is wrong in some case above; so are ``f`` and ``inputs``."""
    wrong = {name for case in EVERY for name in case.options}
    assert wrong == OF_THE_PUBLIC - {"f", "inputs"}
