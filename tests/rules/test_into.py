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
from batchjac.rules.parts import Slices
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

    def watched(function, of):
        def found(*given):
            made = function(*given)
            order = [0, *(d + 1 for d in READ[f])]
            seen.append(of(made).data.permute(order).is_contiguous())
            return made

        return found

    unbind = registry._RULES["UnbindBackward0"]
    reverse = watched(unbind.reverse, lambda found: found[0])
    monkeypatch.setitem(registry._RULES, unbind.name, replace(unbind, reverse=reverse))
    monkeypatch.setattr(Slices, "block", watched(Slices.block, lambda found: found))
    batchjac.jacobian(f, torch.randn(3, 3, 4, dtype=torch.float64))
    assert seen
    assert all(seen)


def step_of(build, *shape):
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y = build(x)
    (edge,) = [torch.autograd.graph.get_gradient_edge(x)]
    return prune([y.grad_fn], [(edge.node, edge.output_nr)]).steps[0], y


def shares(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


PARTS = [(2, 3, 4), (2, 1, 4), (2, 1, 1)]
WHOLES = [None, (2, 3, 5, 4), (2, 1, 5, 4), (2, 3, 1, 4)]


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("whole", WHOLES)
@pytest.mark.parametrize("sizes", PARTS)
@pytest.mark.parametrize("indices", [(3,), (0, 2), (1, 1), (0, 1, 2, 3, 4), (4, 3, 2, 1, 0, 0)])
@pytest.mark.parametrize("place", ["first", "between", "last"])
def test_slices_add_up_to_what_each_alone_would_give(place, indices, sizes, whole, owned):
    """In any order, beside rows of the whole tensor, which are written into only where owned."""
    expected = torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    arrived = []
    for index in indices:
        step, _y = step_of(lambda x, k=index: x[:, k], 3, 5, 4)
        g = Block(torch.randn(sizes, dtype=torch.float64), (3, 4))
        expected += registry.find(step).reverse(step, [g])[0].full()
        arrived.append(registry.find(step).gather(step, [g]))
    kept = None
    if whole is not None:
        block = Block(torch.randn(whole, dtype=torch.float64), (3, 5, 4), owned)
        expected += block.full()
        kept, data = block.data.clone(), block.data
        arrived.insert({"first": 1, "between": 1 + len(indices) // 2, "last": 99}[place], block)
    parts = [p.found[k].data for p in arrived if isinstance(p, Slices) for k in p.found]
    before = [part.clone() for part in parts]
    gathered, *others = arrived
    for other in others:
        gathered.take(other)
    found = gathered.block()
    torch.testing.assert_close(found.full(), expected)
    for part, then in zip(parts, before, strict=True):
        assert torch.equal(part, then)
        assert not shares(found.data, part)
    if kept is not None and not (owned and whole == (2, 3, 5, 4)):
        assert torch.equal(data, kept)


def test_a_slice_that_waits_holds_nothing_but_itself():
    """A view of much else would keep all of that."""
    step, _y = step_of(lambda x: x[:, 1], 3, 5, 4)
    whole = torch.randn(2, 3, 400, dtype=torch.float64)
    with torch.no_grad():
        part = registry.find(step).gather(step, [Block(whole[..., :4], (3, 4))])
    assert part.found[1].data.untyped_storage().nbytes() == 2 * 3 * 4 * 8
    assert torch.equal(part.found[1].data, whole[..., :4])
    own = torch.randn(2, 3, 4, dtype=torch.float64)
    assert shares(registry.find(step).gather(step, [Block(own, (3, 4))]).found[1].data, own)


def test_a_slice_by_another_axis_is_a_part_too():
    steps = [step_of(build, 3, 5, 4)[0] for build in (lambda x: x[:, 1], lambda x: x[..., 2])]
    blocks = [Block(torch.randn(2, 3, n, dtype=torch.float64), (3, n)) for n in (4, 5)]
    rules = [registry.find(step) for step in steps]
    first, second = (r.gather(s, [b]) for r, s, b in zip(rules, steps, blocks, strict=True))
    first.take(second)
    alone = [r.reverse(s, [b])[0].full() for r, s, b in zip(rules, steps, blocks, strict=True)]
    torch.testing.assert_close(first.block().full(), alone[0] + alone[1])


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
