"""What is remembered of a graph's form: the same for graphs that are made alike, and no others."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from batchjac import memory
from batchjac.graph import Form, Graph, edge_of, prune
from batchjac.verify import _steps


def recorded(f: Callable[[Tensor], Tensor], x: Tensor, *further: Tensor) -> Graph:
    """The graph from ``f(x)`` to ``x``, and to further tensors that it reads."""
    x = x.clone().requires_grad_()
    y = f(x)
    assert y.grad_fn is not None
    edges = [edge_of(t) for t in (x, *further)]
    return prune([y.grad_fn], [(edge.node, edge.output_nr) for edge in edges])


X = torch.ones(3, 4)
W = torch.ones(4, requires_grad=True)


def plain(x: Tensor) -> Tensor:
    a, b = x.sin(), x.cos()
    return (a * 2).tanh() + b * W


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, tuple[Tensor, ...]]] = {
    "plain": (plain, X, ()),
    "another node": (lambda x: (x.sin() * 2).sigmoid() + x.cos() * W, X, ()),
    "other wiring": (lambda x: x.sin() * W + (x.cos() * 2).tanh(), X, ()),
    "to the node before": (lambda x: x.sin().sin() + x, X, ()),
    "to the one after": (lambda x: (s := x.sin()).sin() + s, X, ()),
    "other shapes": (plain, X[:2], ()),
    "another dtype": (plain, X.double(), ()),
    "another target": (plain, X, (W,)),
}


def test_graphs_made_alike_share_a_form() -> None:
    for f, x, further in FUNCTIONS.values():
        assert recorded(f, x, *further).form is recorded(f, x, *further).form


@pytest.mark.parametrize("one", FUNCTIONS)
@pytest.mark.parametrize("other", FUNCTIONS)
def test_no_others_do(one: str, other: str) -> None:
    forms = [recorded(f, x, *further).form for f, x, further in (FUNCTIONS[one], FUNCTIONS[other])]
    assert (forms[0] is forms[1]) == (one == other)


def test_a_part_of_a_graph_has_a_form_of_its_own() -> None:
    graph = recorded(plain, X)
    forms = [replace(graph, steps=graph.steps[:k]).form for k in range(1, len(graph.steps) + 1)]
    assert len(set(map(id, forms))) == len(forms)
    assert forms[-1] is graph.form


def test_targets_count_where_the_steps_are_the_same() -> None:
    graph = recorded(plain, X)
    more = replace(graph, targets=graph.targets | {(graph.steps[1].node, 0)})
    assert graph.form is not more.form


def test_parts_that_lead_to_other_shapes_differ() -> None:
    """Where edges lead out of a part, what lies there counts: it is in none of the steps."""
    graphs = [recorded(lambda x: x + torch.zeros(3, 4), torch.ones(n, 4)) for n in (1, 3)]
    one, other = (replace(graph, steps=graph.steps[:1]) for graph in graphs)
    assert one.steps[0].outputs == other.steps[0].outputs
    assert one.form is not other.form


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_remembered_is_what_would_be_found_anew(name: str) -> None:
    f, x, further = FUNCTIONS[name]
    for _ in range(2):
        graph = recorded(f, x, *further)
        for samples in (1, len(x)):
            assert memory.need([graph], samples) == memory._need([graph], samples, ())
        for ways in ({}, {"SinBackward0": "vmap"}):
            key = ("signature", *sorted(ways.items()))
            remembered = graph.form.fact(key, lambda g=graph, w=ways: _steps(g, w))
            assert remembered == _steps(graph, ways)


def scaled(factor: Tensor) -> Graph:
    return recorded(lambda x: x * factor, X)


def test_a_form_keeps_no_graph_alive() -> None:
    factor = torch.ones(3, 4)
    gone = weakref.ref(factor)
    graph = scaled(factor)
    form = graph.form
    memory.need([graph], 3)
    del graph, factor
    gc.collect()
    assert isinstance(form, Form)
    assert gone() is None


def test_facts_are_few() -> None:
    form = Form()
    for k in range(1000):
        assert form.fact(k, lambda k=k: 2 * k) == 2 * k
    assert len(form._facts) <= 64
    assert form.fact(999, lambda: -1) == 2 * 999
