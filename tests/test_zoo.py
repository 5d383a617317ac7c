"""Every case of the zoo: right, or the error it documents; and nothing left changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from batchjac.engines import reference
from tests.zoo import CASES, Case, registry, rowloop, seeded
from tests.zoo.verdict import Snapshot, difference, judge

pytestmark = [
    # tracers, forward mode and inductor load scripts of torch's own that warn about their age
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def names(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", CASES, ids=names)
def test_right_or_documented_error(
    case: Case, record_property: Callable[[str, object], None]
) -> None:
    verdict = judge(case)
    record_property("tally", f"zoo: {verdict.outcome}")
    assert verdict.outcome != "wrong", verdict.detail
    assert (verdict.outcome == "documented error") == (case.expects is not None)


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
