"""Every case of the zoo: right, or the error it documents; and nothing left changed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import batchjac
from batchjac.engines import reference
from batchjac.errors import CouplingError
from tests.zoo import CASES, Case, mixing, registry, rowloop, seeded
from tests.zoo.arrangements import ARRANGEMENTS, MIXERS, REDUCERS
from tests.zoo.rowloop import differentiable, tree_map
from tests.zoo.verdict import Snapshot, difference, judge

pytestmark = [
    # tracers, forward mode and inductor load scripts of torch's own that warn about their age
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def names(case: Case) -> str:
    return case.name


# What changes gradients where the walk cannot look: autograd's own engine is asked instead.
BY_ENGINE = {"function_straight_through_clamped", "function_unit_gradient"}
BY_ENGINE |= {"deep_equilibrium_with_hook"} | {c.name for c in CASES if c.group == "hooks"}


@pytest.mark.parametrize("case", CASES, ids=names)
def test_right_or_documented_error(
    case: Case, record_property: Callable[[str, object], None]
) -> None:
    verdict = judge(case)
    record_property("tally", f"zoo: {verdict.outcome}")
    assert verdict.outcome != "wrong", verdict.detail
    assert (verdict.outcome == "documented error") == (case.expects is not None)
    # no wrong rule hides behind the comparison with autograd, which would mend its result
    assert not verdict.by_engine or case.name in BY_ENGINE


PLAIN = [c for c in CASES if not (c.options or c.expected or c.expects)]


@pytest.mark.parametrize("case", PLAIN, ids=names)
def test_reference_is_the_row_loop(case: Case) -> None:
    f, inputs = case.build()
    with case.around(), seeded(case.seed):
        loop = rowloop.jacobian(f, inputs)
    f, inputs = case.build()
    before = Snapshot.of(f, inputs)
    with case.around(), seeded(case.seed):
        found = reference.jacobian(f, inputs)
    assert not difference(found, loop, case)
    assert not before.changes()


REFUSED = [c for c in CASES if c.expects is not None]


@pytest.mark.parametrize("case", REFUSED, ids=names)
def test_reference_refuses_the_same(case: Case) -> None:
    assert case.expects is not None
    f, inputs = case.build()
    with case.around(), seeded(case.seed), pytest.raises(case.expects) as caught:
        reference.jacobian(f, inputs, **case.options)
    assert caught.type is case.expects


BY_HAND = [c for c in CASES if c.expected is not None]


@pytest.mark.parametrize("case", BY_HAND, ids=names)
def test_reference_is_the_truth_made_by_hand(case: Case) -> None:
    assert case.expected is not None
    f, inputs = case.build()
    with seeded(case.seed):
        by_hand = case.expected(f, inputs)
    f, inputs = case.build()
    with case.around(), seeded(case.seed):
        found = reference.jacobian(f, inputs, **case.options)
    assert not difference(found, by_hand, case)


def called(f: Any, inputs: Any) -> Any:
    """The function's own value at copies of the inputs; of a compiled one, of what was compiled."""
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checkpoints and hooks that find nothing to do
        copies = tree_map(lambda x: x.detach().clone() if differentiable(x) else x, inputs)
        return rowloop.call(getattr(f, "plain", f), copies)


ANSWERED = [c for c in CASES if c.expects is None and c.group != mixing.GROUP]


@pytest.mark.parametrize("case", ANSWERED, ids=names)
def test_the_value_comes_along(case: Case) -> None:
    f, inputs = case.build()
    options = {k: v for k, v in case.options.items() if k != "of"}
    with case.around(), seeded(case.seed):
        value, _ = batchjac.value_and_jacobian(f, inputs, **options)
    assert not any(x.requires_grad for x in rowloop.leaves(value) if isinstance(x, torch.Tensor))
    if case.options.get("batched", True):
        f, inputs = case.build()
        with case.around(), seeded(case.seed):
            right = called(f, inputs)
        assert not difference(value, right, case)


# 0 * inf is NaN in one order of multiplying and 0 in another.
INFINITE = {"max_pool_of_infinite_slope", "honest_infinities", "infinite_slope_masked"}
FINITE = [c for c in PLAIN if c.name not in INFINITE and c.group != mixing.GROUP]


@pytest.mark.parametrize("case", FINITE, ids=names)
def test_differentiable_jacobian(case: Case) -> None:
    """With ``create_graph`` the derivative of a weighted sum of the Jacobian is the row loop's."""

    def second(jacobian: Callable[..., Any]) -> list[torch.Tensor]:
        f, x = case.build()
        x = tree_map(lambda t: t.detach().clone().requires_grad_() if differentiable(t) else t, x)
        with case.around(), seeded(case.seed):
            found = jacobian(f, x, create_graph=True)
        with torch.inference_mode(False), torch.enable_grad(), seeded(1):
            blocks = [b for b in rowloop.leaves(found) if b is not None]
            total = sum((b * torch.randn_like(b)).sum() for b in blocks)
        starts = [t for t in rowloop.leaves(x) if differentiable(t)]
        if not total.requires_grad:
            return [torch.zeros_like(t) for t in starts]
        grads = torch.autograd.grad(total, starts, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(starts, grads, strict=True)]

    try:
        right = second(rowloop.jacobian)
    except RuntimeError:  # a backward that PyTorch cannot differentiate; a rule of ours may
        with contextlib.suppress(RuntimeError):
            second(batchjac.jacobian)
    else:
        assert not difference(second(batchjac.jacobian), right, case)


# PyTorch warns when a full backward hook fires and no input needs a gradient.
MODULES = [
    c for c in PLAIN
    if isinstance(c.build()[0], torch.nn.Module) and any(True for _ in c.build()[0].parameters())
    and c.name != "module_backward_hooks_that_look"
]  # fmt: skip


@pytest.mark.parametrize("case", MODULES, ids=names)
def test_derivative_by_every_parameter(case: Case) -> None:
    def found(jacobian: Callable[..., Any]) -> Any:
        f, inputs = case.build()
        before = Snapshot.of(f, inputs)
        with case.around(), seeded(case.seed):
            answer = jacobian(f, inputs, wrt="parameters")
        assert not before.changes()
        return answer

    assert not difference(found(batchjac.jacobian), found(reference.jacobian), case)


@pytest.mark.parametrize("case", [c for c in FINITE if c.group != "hooks"], ids=names)
def test_every_coupling_says_the_same_of_independent_samples(case: Case) -> None:
    def answers(coupling: str) -> list[torch.Tensor]:
        f, inputs = case.build()
        with case.around(), seeded(case.seed):
            found = batchjac.jacobian(f, inputs, coupling=coupling)
        return [block for block in rowloop.leaves(found) if block is not None]

    f, inputs = case.build()
    with seeded(case.seed), torch.inference_mode(False), torch.enable_grad():
        outputs = [
            y
            for y in rowloop.leaves(
                rowloop.call(f, tree_map(lambda x: x.clone() if differentiable(x) else x, inputs))
            )
            if differentiable(y)
        ]
    blocks = answers("error")
    assert not difference(answers("sum"), blocks, case)
    assert not difference(answers("frozen"), blocks, case)
    each = len(blocks) // len(outputs)
    for k, (whole, block) in enumerate(zip(answers("full"), blocks, strict=True)):
        axis = outputs[k // each].dim()
        spread = torch.zeros_like(whole)
        for n in range(len(block)):
            spread[n].select(axis - 1, n).copy_(block[n])
        assert not difference(whole, spread, case)


def test_a_hook_that_comes_later_counts() -> None:
    """A function that was compared once with autograd is not trusted for ever."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    x = torch.randn(4, 3)
    before = batchjac.jacobian(model, x)

    def halve(module: torch.nn.Module, args: Any, out: torch.Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda grad: grad * 0.5)

    handle = model[1].register_forward_hook(halve)
    torch.testing.assert_close(batchjac.jacobian(model, x), before / 2)
    handle.remove()
    torch.testing.assert_close(batchjac.jacobian(model, x), before)


@pytest.mark.parametrize("one", range(5))
@pytest.mark.parametrize("other", range(5))
def test_coupling_that_comes_with_the_data_is_seen(one: int, other: int) -> None:
    """The same operations, once apart and once not: which samples meet is a value, not a graph."""

    class Partners(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("partner", torch.arange(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() + x[self.partner].cos()

    model, x = Partners(), torch.randn(5, 2)
    apart = batchjac.jacobian(model, x)
    torch.testing.assert_close(apart, torch.diag_embed(x.cos() - x.sin()))
    model.partner[one] = other
    if one == other:
        torch.testing.assert_close(batchjac.jacobian(model, x), apart)
    else:
        with pytest.raises(CouplingError):
            batchjac.jacobian(model, x)


def check_against_gradients(f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> bool:
    """Coupled exactly if some gradient says so, and right if none does; which of the two."""
    start = x.clone().requires_grad_()
    y = f(start * 1)
    weights = torch.randn_like(y[0])
    each = [torch.autograd.grad((row * weights).sum(), start, retain_graph=True)[0] for row in y]
    others = ~torch.eye(len(x), dtype=torch.bool)
    grads = torch.stack(each)  # [output's sample, input's sample, ...]
    coupled = bool(grads[others].any())
    try:
        found = batchjac.jacobian(f, x)
    except CouplingError:
        assert coupled, "refused, though no gradient crosses samples"
    else:
        assert not coupled, "not refused, though a gradient crosses samples"
        contracted = torch.einsum(
            "no,no...->n...", weights.expand_as(y).flatten(1), found.flatten(1, y.dim() - 1)
        )
        torch.testing.assert_close(contracted, grads[~others])
    return coupled


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_coupling_along_every_axis(arrangement: str, mixer: str) -> None:
    axes, there, back = ARRANGEMENTS[arrangement]
    x = torch.randn(*[4] * axes, dtype=torch.float64)
    longer = [dim for dim, size in enumerate(there(x).shape) if size > 1]  # nothing mixes in one
    for dim in longer:
        check_against_gradients(lambda x, dim=dim: back(MIXERS[mixer](there(x), dim)), x)


@pytest.mark.parametrize("reducer", REDUCERS)
def test_coupling_of_what_takes_an_axis_away(reducer: str) -> None:
    x = torch.randn(4, 4, 4, dtype=torch.float64)
    found = [
        check_against_gradients(lambda x, dim=dim: REDUCERS[reducer](x.sin(), dim), x)
        for dim in range(3)
    ]
    assert found[0]
    assert not all(found) or reducer == "diagonal with the next"


def test_the_zoo_is_large_and_names_are_unique() -> None:
    assert len({c.name for c in CASES}) == len(CASES) > 300
    assert len({c.group for c in CASES}) > 15
    with pytest.raises(ValueError, match="registered twice"):
        registry.case(CASES[0].name, group="any")
    with pytest.raises(ValueError, match="no such laws"):
        registry.case("new", group="any", without={"gravity"})


def test_builds_are_fresh_and_the_same() -> None:
    for case in CASES[::10]:
        (f, x), (g, y) = case.build(), case.build()
        facts = [Snapshot.of(f, x), Snapshot.of(g, y)]
        assert f is not g or not isinstance(f, torch.nn.Module)
        assert facts[0].seen.keys() == facts[1].seen.keys()
        for a, b in zip(rowloop.leaves(x), rowloop.leaves(y), strict=True):
            assert torch.equal(a, b)


def test_a_wrong_answer_is_seen() -> None:
    case = next(c for c in CASES if c.name == "affine")
    right = torch.ones(2, 3, dtype=torch.float64)
    assert not difference(right, right.clone(), case)
    wrong = right.clone()
    wrong[1, 2] += 1e-7
    assert "differs most at (1, 2)" in difference(wrong, right, case)
    assert "came as" in difference(right.float(), right, case)
    assert "came as" in difference((right,), right, case)
    assert "came as" in difference(None, right, case)


def test_a_change_is_seen() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    x = torch.randn(3, 2)
    before = Snapshot.of(model, x)
    assert before.changes() == ""
    model(x)
    assert "running_mean" in before.changes()
    before = Snapshot.of(lambda x: model(x), x)
    x.requires_grad_()
    model[0].register_forward_hook(lambda m, i, o: None)
    model[1].eval()
    assert all(word in before.changes() for word in ("requires_grad", "_forward_hooks", "training"))
