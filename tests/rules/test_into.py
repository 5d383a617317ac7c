"""Gradients added in place to what a walk has made: the same sums, and nothing else written to."""

import pytest
import torch

import batchjac
from batchjac.block import Block
from batchjac.engines import reference
from batchjac.graph import prune
from batchjac.rules import registry
from tests.rules.common import Case


def packed(x):
    q, k, v = x[:, 0], x[:, 1], x[:, 2]
    return q * k.tanh() + v.sin()


def same_part_twice(x):
    return x[:, 1].sin() * x[:, 1].exp() + x[:, -1]


def whole_and_parts(x):
    h = x * 2
    return h.sum(1) + (h + x).tanh().sum(1) * h[:, 0] + h[:, 2]


def first_shared(x):
    """The rows of a sum go on unchanged to both its terms, and to a part of one of them."""
    h, t = x * 2, x.sin()
    return (h + t).flatten(1)[:, :4] + h[:, 0] + t[:, 1] + h[:, 2]


def last_shared(x):
    h, t = x * 2, x.sin()
    return t[:, 1] + h[:, 0] + h[:, 2] + (h + t).flatten(1)[:, :4]


CASES: list[Case] = []  # a way of adding up, no rule
FUNCTIONS = [packed, same_part_twice, whole_and_parts, first_shared, last_shared]


@pytest.mark.parametrize("f", FUNCTIONS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_parts_of_one_tensor(f, create_graph, caplog):
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    found = batchjac.jacobian(f, x, create_graph=create_graph)
    torch.testing.assert_close(found, reference.jacobian(f, x))
    assert not caplog.records  # a walk that is wrong is noticed, and autograd takes over


def step_of(build, *shape):
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y = build(x)
    (edge,) = [torch.autograd.graph.get_gradient_edge(x)]
    return prune([y.grad_fn], [(edge.node, edge.output_nr)]).steps[0], y


@pytest.mark.parametrize("sizes", [(2, 3, 4), (2, 1, 4), (2, 1, 1)])
@pytest.mark.parametrize("before", [(2, 3, 5, 4), (2, 1, 5, 4), (2, 3, 1, 4)])
def test_select_adds_what_it_returns(sizes, before):
    step, _y = step_of(lambda x: x[:, -2], 3, 5, 4)
    rule = registry.find(step)
    g = Block(torch.randn(sizes, dtype=torch.float64), (3, 4))
    rows = Block(torch.randn(before, dtype=torch.float64), (3, 5, 4))
    (alone,) = rule.reverse(step, [g])
    expected, untouched = rows.plus(alone).full(), rows.data.clone()
    if rule.into(step, [g], rows):
        assert sizes == (before[0], before[1], before[3])
        torch.testing.assert_close(rows.full(), expected)
    else:
        torch.testing.assert_close(rows.data, untouched)
        assert sizes != (before[0], before[1], before[3]) or before[2] == 1


def test_rules_that_add_in_place_return_new_memory():
    named = [name for name in registry.names() if registry._RULES[name].into is not None]
    assert named == ["SelectBackward0"]
    step, _y = step_of(lambda x: x.select(1, 0), 3, 1, 4)
    g = Block(torch.randn(2, 3, 4, dtype=torch.float64), (3, 4))
    (alone,) = registry.find(step).reverse(step, [g])
    assert alone.data.data_ptr() != g.data.data_ptr()


@pytest.mark.parametrize("kind", [torch.nn.ReLU, torch.nn.Tanh, torch.nn.Hardtanh])
def test_what_is_asked_for_on_the_way_is_not_overwritten(kind, caplog):
    """The rows that arrive at an activation are an answer, and go on into it."""
    layers = [torch.nn.Linear(3, 5), kind(), torch.nn.Linear(5, 4), kind(), torch.nn.Linear(4, 2)]
    model, x = torch.nn.Sequential(*layers).double(), torch.randn(6, 3).double()
    names = ["1", "3", "inputs"]
    found = batchjac.jacobian(model, x, wrt=names)
    expected = reference.jacobian(model, x, wrt=names)
    for name in names:
        torch.testing.assert_close(found[name], expected[name])
    assert not caplog.records  # autograd would have put a wrong walk right
