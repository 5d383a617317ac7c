"""Gradients added in place to what a walk has made: the same sums, and nothing else written to."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

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


def projected(x):
    """The packed projection of ``nn.MultiheadAttention``: parts of a tensor that was permuted."""
    h = x.sin().repeat(1, 2, 3).unflatten(-1, (3, 4)).unsqueeze(0).transpose(0, -2).squeeze(-2)
    q, k, v = h.contiguous()
    return q * k.tanh() + v.sin()


def selected(x):
    """The same, one part after the other."""
    h = x.sin().repeat(1, 2, 3).unflatten(-1, (3, 4)).unsqueeze(0).transpose(0, -2).squeeze(-2)
    h = h.contiguous()
    return h[0] * h[2].tanh()


def heads(x):
    """The parts of an attention whose heads come before its tokens."""
    q, k, v = x.sin().repeat(1, 1, 3).view(3, 3, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
    return (q * k.tanh() + v.sin()).flatten(1)


def normalised(x):
    """Constant statistics only scale: in place on rows of its own, not on those of the sum."""
    h = x.sin()
    mean, variance = torch.arange(3.0).double(), torch.arange(1.0, 4.0).double()
    y = functional.batch_norm(h, mean, variance)
    return functional.batch_norm((y + h).relu(), mean, variance).exp() + h


CASES: list[Case] = []  # a way of adding up, no rule
FUNCTIONS = [
    packed, same_part_twice, whole_and_parts, first_shared, last_shared, projected, selected, heads,
    normalised,
]  # fmt: skip


READ = {projected: (1, 2, 0, 3), selected: (1, 2, 0, 3), heads: (1, 3, 0, 2, 4)}


@pytest.mark.parametrize("f", FUNCTIONS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_parts_of_one_tensor(f, create_graph, caplog):
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    found = batchjac.jacobian(f, x, create_graph=create_graph)
    torch.testing.assert_close(found, reference.jacobian(f, x))
    assert not caplog.records  # a walk that is wrong is noticed, and autograd takes over


@pytest.mark.parametrize("f", [projected, selected, heads])
def test_parts_are_put_together_in_the_order_in_which_they_are_read(f, monkeypatch):
    """What follows only permutes and merges axes, so that nothing needs to be copied there."""
    seen = []
    for name in ("SelectBackward0", "UnbindBackward0"):
        rule = registry._RULES[name]

        def reverse(step, blocks, rule=rule):
            (made,) = found = rule.reverse(step, blocks)
            order = [0, *(d + 1 for d in READ[f])]
            seen.append(made.data.permute(order).is_contiguous())
            return found

        monkeypatch.setitem(registry._RULES, name, replace(rule, reverse=reverse))
    batchjac.jacobian(f, torch.randn(3, 3, 4, dtype=torch.float64))
    assert seen
    assert all(seen)


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


class Joined(torch.nn.Module):
    """A parameter and what has samples meet in one node, on the way to both."""

    def __init__(self, join):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)
        self.p = torch.nn.Parameter(torch.rand(5) + 0.5)
        self.join = join

    def forward(self, x):
        return self.b(torch.tanh(self.join(self.a(x), self.p)))


def terms(kind):
    """A layer used again, whose bias gets rows from every use."""

    class Terms(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.o = kind(), torch.nn.Linear(5, 2)

        def forward(self, x):
            h = self.l(x) + self.l(2 * x) + self.l(3 * x)
            return self.o(torch.tanh(h).reshape(len(x), 5))

    return Terms()


def conv():
    return torch.nn.Sequential(torch.nn.Unflatten(1, (5, 1, 1)), torch.nn.Conv2d(5, 5, 1))


SHARED = {
    **{
        f.__name__: (lambda f=f: Joined(f), ["inputs", "p"])
        for f in (torch.logaddexp, torch.hypot, torch.atan2, torch.copysign, torch.fmod)
    },
    "linear": (lambda: terms(lambda: torch.nn.Linear(5, 5)), ["l.bias"]),
    "layer norm": (lambda: terms(lambda: torch.nn.LayerNorm(5)), ["l.bias"]),
    "group norm": (lambda: terms(lambda: torch.nn.GroupNorm(1, 5)), ["l.bias"]),
    "convolution": (lambda: terms(conv), ["l.1.bias"]),
    "recurrent": (
        lambda: torch.nn.Sequential(torch.nn.RNN(5, 4, 2, batch_first=True), Last()),
        ["0.bias_ih_l0", "0.bias_hh_l0", "0.bias_hh_l1"],
    ),
}


class Last(torch.nn.Module):
    def forward(self, found):
        return found[0][:, -1]


@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("name", SHARED)
def test_rows_that_are_read_twice_are_not_written_into(name, samples, caplog):
    """What all samples share gets a view of the rows, or reads them after its neighbour."""
    make, names = SHARED[name]
    torch.manual_seed(0)
    model = make().double().eval()
    width = 4 if isinstance(model, Joined) else 5
    shape = (samples, 3, width) if name == "recurrent" else (samples, width)
    x = torch.randn(shape).double()
    expected = reference.jacobian(model, x, wrt=names)
    for coupling in ("error", "frozen"):
        found = batchjac.jacobian(model, x, wrt=names, coupling=coupling)
        for part in names:
            torch.testing.assert_close(found[part], expected[part])
    assert not caplog.records  # autograd would have put a wrong walk right
