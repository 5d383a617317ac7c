"""The laws of forward rules, over the cases of the reverse rules."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from batchjac import kernels
from batchjac.block import Block
from batchjac.engines import forward
from batchjac.graph import Step, prune
from batchjac.rules import attention, registry
from tests.rules import common, test_attention, test_norm
from tests.rules.common import F64, ROWS, Case, Recorded, record

HERE = Path(__file__)
MODULES = [
    importlib.import_module(f"tests.rules.{path.stem}")
    for path in sorted(HERE.parent.glob("test_*.py"))
    if path.stem not in ("test_every_rule", HERE.stem)
]
CASES: list[Case] = []  # none beside those of the other files

# Reverse rules of nodes that have no forward rule.
WITHOUT = {
    "CumprodBackward0",
    "LogcumsumexpBackward0",
    "ViewAsComplexBackward0",
    "ViewAsRealBackward0",
}
FROZEN = [
    Case(f"{name}:frozen", build, ((4, 3, 2), (3,), (3,)))
    for name, build in [
        ("NativeBatchNormBackward0", test_norm.trained),
        ("NativeBatchNormLegitBackward1", test_norm.without_running_statistics),
    ]
]
REAL = [
    case
    for case in [*FROZEN, *(case for module in MODULES for case in module.CASES)]
    if case.name not in WITHOUT and any(not d.is_complex for d in case.dtypes)
]
Blocks = Sequence[Block | None]


def real(case: Case) -> torch.dtype:
    """The first of the case's dtypes, which is float64 unless it is about another."""
    return next(d for d in case.dtypes if not d.is_complex)


def jacobians(recorded: Recorded, step: Step, outputs: int) -> list[list[Tensor | None]]:
    """For each output and each edge ``[entries of the output, *edge]``, by the node itself."""
    found: list[list[Tensor | None]] = []
    for k, meta in enumerate(step.outputs[:outputs]):
        count = math.prod(meta.shape)
        seed = torch.eye(count, dtype=meta.dtype).reshape(count, *meta.shape)
        blocks: list[Block | None] = [None] * len(step.outputs)
        blocks[k] = Block(seed, meta.shape)
        if not count:
            found.append([e and seed.new_zeros(0, *e.shape) for e in step.edges])
        elif step.name.endswith(":frozen"):  # the node itself knows nothing of that
            found.append(common.arrived(step, recorded.rule.reverse(step, blocks)))
        else:
            found.append(common.by_rows(step, blocks))
    return found


def pushed(step: Step, jacobians: list[list[Tensor | None]], blocks: Blocks) -> list[Tensor]:
    """The specification: ``sum_k J_k t_k`` for each output, ``[V, *output]``."""
    rows = next(b.rows for b in blocks if b is not None)
    found = []
    for meta, edges in zip(step.outputs, jacobians, strict=False):
        total = torch.zeros(rows, math.prod(meta.shape), dtype=meta.dtype)
        for j, t in zip(edges, blocks, strict=True):
            if j is not None and t is not None:
                size = math.prod(t.shape)
                flat = t.full().reshape(rows, size).to(meta.dtype)
                total = total + flat @ j.to(meta.dtype).reshape(len(j), size).mT
        found.append(total.reshape(rows, *meta.shape))
    return found


def tangents(step: Step, repeated: Sequence[int], rows: int = ROWS) -> list[Block | None]:
    """Random rows for every wanted edge, its axes ``repeated`` of size 1."""
    return [
        e and Block(
            torch.randn(
                rows, *(1 if d in repeated else s for d, s in enumerate(e.shape)),
                dtype=e.meta.dtype,
            ),
            e.shape,
        )
        for e in step.edges
    ]  # fmt: skip


def questions(step: Step) -> Iterator[list[Block | None]]:
    """Tangents with axes repeated in every way, in several rows and in one, at some edges only."""
    widest = max(len(e.shape) for e in step.edges if e is not None)
    for repeated in common.patterns(widest):
        yield tangents(step, repeated)
    yield tangents(step, (), rows=1)
    every = tangents(step, ())
    wanted = [k for k, e in enumerate(step.edges) if e is not None]
    for k in wanted if len(wanted) > 1 else []:
        yield [b if j == k else None for j, b in enumerate(every)]


def check(case: Case, recorded: Recorded) -> None:
    """Law: the rule is ``sum_k J_k t_k`` with the Jacobians of the node called once per row."""
    for step in common.subsets(recorded.step):
        expected = jacobians(recorded, step, case.outputs)
        numbers = [*recorded.inputs, *(j for edges in expected for j in edges if j is not None)]
        finite = all(x.isfinite().all() for x in numbers)
        for blocks in questions(step):
            before = [b and b.data.clone() for b in blocks]
            found = [b and b.full() for b in forward.through(step, blocks)]
            if finite:
                common.same(found[: case.outputs], pushed(step, expected, blocks), real(case))
            else:
                check_symmetric(step, blocks, found, real(case))
            for old, block in zip(before, blocks, strict=True):
                assert block is None or torch.equal(old, block.data), "its argument has changed"


def check_symmetric(
    step: Step, blocks: Blocks, found: list[Tensor | None], dtype: torch.dtype
) -> None:
    """Law: a derivative that is its own transpose takes tangents to what cotangents go to.

    A product with inf or nan in the matrix would spread them over the sum, and at a nan some of
    torch's kernels give another slope to an expanded cotangent than to a whole one. What has them
    among these cases are functions of entries, and softmax.
    """
    (k, block), *more = [(k, b) for k, b in enumerate(blocks) if b is not None]
    if more or block.shape != step.shape:  # no product of one matrix, or not a square one
        return
    same_way = common.by_rows(step, [block])[k]
    common.same(found, [same_way], dtype)


def complex_numbers(step: Step) -> bool:
    """Whether something beside the node is complex: forward rules are for real tensors."""
    metas = [*step.outputs, *(e.meta for e in step.edges if e is not None)]
    return any(meta.dtype.is_complex for meta in metas)


@pytest.mark.parametrize("case", [c for c in REAL if not c.declines], ids=str)
@pytest.mark.parametrize("recording", [False, True], ids=["plain", "recording"])
def test_equals_the_node_transposed(case: Case, recording: bool):
    recorded = record(case, real(case))
    if complex_numbers(recorded.step):
        assert registry.find_forward(recorded.step) is None
        return
    with torch.set_grad_enabled(recording):
        check(case, recorded)


@pytest.mark.parametrize("case", [c for c in REAL if c.declines], ids=str)
def test_declines_what_the_reverse_rule_declines(case: Case):
    step = record(case, real(case)).step
    with pytest.raises(forward.NoForwardRule, match=step.name):
        forward.through(step, tangents(step, ()))


@pytest.mark.parametrize("case", [c for c in REAL if c.second and not c.declines], ids=str)
def test_differentiable_again(case: Case):
    """Law: recorded, the tangents have the derivatives that the node's own Jacobian gives them."""
    recorded = record(case, real(case))
    if complex_numbers(recorded.step):
        return
    step = recorded.step
    for repeated in [(), (0,)]:
        blocks = tangents(step, repeated)
        leaves = [x for x in recorded.inputs if x.requires_grad]
        leaves += [b.data.requires_grad_() for b in blocks if b is not None]
        found = [b and b.full() for b in forward.through(step, blocks)][: case.outputs]
        want = pushed(step, jacobians(recorded, step, case.outputs), blocks)
        weights = [torch.randn_like(w) for w in want]
        first, second = (common._derivatives(rows, weights, leaves) for rows in (found, want))
        common.same(first, second, real(case), least=1.0)


def test_which_reverse_rules_have_no_forward_rule(capsys: pytest.CaptureFixture[str]):
    missing = set(registry.names()) - set(registry.forward_names())
    with capsys.disabled():
        print(f"\n{len(registry.forward_names())} forward rules; none for {sorted(missing)}")
    assert missing == WITHOUT
    assert set(registry.forward_names()) <= set(registry.names())


def test_every_forward_rule_has_a_case_that_it_covers():
    covered = {case.name for case in REAL if not case.declines}
    only_complex = {
        "ComplexBackward0",
        "ConjBackward0",
        "ConjPhysicalBackward0",
        "ConjPhysicalBackward1",
        "NegViewBackward0",
        "PolarBackward0",
    }
    elsewhere = {name for name in registry.forward_names() if "Cudnn" in name or "Legit" in name}
    elsewhere |= set(attention.NODES[1:])
    assert set(registry.forward_names()) - covered - elsewhere <= only_complex


def test_a_rule_is_registered_once():
    with pytest.raises(ValueError, match="ReluBackward0 is registered already"):
        registry.forward("ReluBackward0")(lambda step, blocks: NotImplemented)


def test_a_users_function_of_the_same_name_has_no_forward_rule():
    class Relu(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            return g

    Relu.__name__ = "Relu"
    step = step_of("ReluBackward", Relu.apply, (3,))
    assert registry.find_forward(replace(step, name="ReluBackward0")) is None


def step_of(name: str, build: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Step:
    inputs = [torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes]
    output = build(*inputs)
    assert output.grad_fn is not None
    edges = [torch.autograd.graph.get_gradient_edge(x) for x in inputs]
    graph = prune([output.grad_fn], [(e.node, e.output_nr) for e in edges])
    return next(step for step in graph.steps if step.name == name)


@pytest.mark.parametrize(
    ("name", "build", "shape", "repeated", "sizes"),
    [
        ("TanhBackward0", torch.tanh, (4, 3), (0,), (4, 3)),  # the slope has samples
        ("MulBackward0", lambda x: x * torch.arange(1.0, 4.0), (4, 3), (0,), (1, 3)),
        ("MmBackward0", lambda x: x @ torch.randn(3, 5, dtype=F64), (4, 3), (0,), (1, 5)),
        ("ConvolutionBackward0", lambda x: F.conv1d(x, torch.randn(2, 3, 1, dtype=F64)),
         (4, 3, 5), (0, 2), (1, 2, 1)),
        ("SumBackward1", lambda x: x.sum(1), (4, 3), (0,), (1,)),
        ("ViewBackward0", lambda x: x.view(4, 6), (4, 2, 3), (0,), (1, 6)),
        ("ExpandBackward0", lambda x: x.expand(5, 4, 3), (4, 3), (1,), (1, 4, 1)),
        ("CatBackward0", lambda x: torch.cat([x, x.detach()], 1), (4, 3), (0,), (1, 6)),
        ("SelectBackward0", lambda x: x[:, 1], (4, 3), (0, 1), (1,)),
        ("SliceBackward0", lambda x: x[:, 1:], (4, 3), (0, 1), (1, 1)),
        ("IndexSelectBackward0", lambda x: x.index_select(1, torch.tensor([0, 0])),
         (4, 3), (0, 1), (1, 1)),
        ("AvgPool2DBackward0", lambda x: F.avg_pool2d(x, 2), (4, 3, 4, 4), (0,), (1, 3, 2, 2)),
        ("ConstantPadNdBackward0", lambda x: F.pad(x, (1, 1)), (4, 3), (0,), (1, 5)),
        ("EmbeddingBackward0", lambda x: F.embedding(torch.tensor([0, 2, 1]), x),
         (4, 3), (1,), (3, 1)),
    ],
)  # fmt: skip
def test_what_is_the_same_all_along_stays_so(
    name: str,
    build: Callable[..., Tensor],
    shape: tuple[int, ...],
    repeated: tuple[int, ...],
    sizes: tuple[int, ...],
):
    step = step_of(name, build, shape)
    (found, *_) = forward.through(step, tangents(step, repeated))
    assert found is not None
    assert found.data.shape == (ROWS, *sizes)


def test_a_matrix_that_all_rows_share_goes_to_its_kernel(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(5, 3, dtype=F64)
    called = []

    def linear(g: Tensor, w: Tensor) -> Tensor:
        called.append(w.data_ptr())
        return g @ w.t()

    monkeypatch.setattr(kernels, "linear", linear)
    for name, shape in (("MmBackward0", (4, 3)), ("AddmmBackward0", (4, 3))):
        bias = None if name == "MmBackward0" else torch.randn(5, dtype=F64)
        step = step_of(name, lambda x, bias=bias: F.linear(x, weight, bias), shape)
        (found,) = forward.through(step, tangents(step, ()))
        assert found is not None
    assert called == [weight.data_ptr()] * 2


def test_tangents_are_cast_on_their_way_in_as_activations_were():
    step = step_of("SumBackward1", lambda x: x.bfloat16().sum(1, dtype=F64), (4, 3))
    (t,) = blocks = tangents(step, ())
    (found,) = forward.through(step, blocks)
    assert t is not None
    assert found is not None
    assert t.data.dtype == torch.bfloat16
    assert torch.equal(found.data, t.data.double().sum(2))  # not rounded before the sum is done


def test_tangents_leave_in_the_dtype_of_the_output():
    step = step_of("NativeLayerNormBackward0", lambda x: F.layer_norm(x.bfloat16(), (3,)), (4, 3))
    found, *_ = forward.through(step, tangents(step, ()))  # computed in float32, as torch does
    assert found is not None
    assert found.data.dtype == torch.bfloat16


def test_a_letter_of_one_factor_alone_is_summed_over_at_full_size():
    """``y[a,c] = sum_b i[a,b] j[a,c] k[a]``, which ``nn.Bilinear`` never asks for."""
    j, k = torch.randn(2, 4, dtype=F64), torch.randn(2, dtype=F64)

    def product(i: Tensor) -> Tensor:
        found: Tensor = torch._trilinear(i, j, k, [2], [1], [1, 2], [1])
        return found

    step = step_of("TrilinearBackward0", product, (2, 3))
    t, *_ = blocks = tangents(step, (1,))
    (found,) = forward.through(step, blocks)
    assert t is not None
    assert found is not None
    torch.testing.assert_close(found.full(), torch.stack([product(row) for row in t.full()]))


ATTENTION = [c for c in test_attention.CASES if not c.declines and all(c.wants or (True,))]


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_is_differentiable_again_as_the_plain_formula_is(case: Case):
    """The fused node has one derivative only; the same attention from bmm and softmax has all."""
    recorded = record(case, F64)
    step = recorded.step
    blocks = tangents(step, (), rows=1)
    directions = [b.data.requires_grad_() for b in blocks if b is not None]
    (found, *_) = forward.through(step, blocks)
    assert found is not None
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, plain = torch.autograd.functional.jvp(
            case.build, recorded.inputs, tuple(d[0] for d in directions), create_graph=True
        )
    common.same([found.data[0]], [plain], F64)
    weight = torch.randn_like(plain)
    leaves = [*recorded.inputs, *directions]
    first, second = (
        torch.autograd.grad(t, leaves, weight, retain_graph=True) for t in (found.data[0], plain)
    )
    common.same(first, second, F64)


def test_attention_in_groups_of_rows(monkeypatch: pytest.MonkeyPatch):
    step = record(ATTENTION[0]).step
    blocks = tangents(step, (), rows=5)
    with torch.no_grad():
        (at_once, *_) = forward.through(step, blocks)
        monkeypatch.setitem(attention.GROUP, "cpu", 2 * 2 * 3 * 4 * 4 * 8)
        (grouped, *_) = forward.through(step, blocks)
    assert at_once is not None
    assert grouped is not None
    common.same([grouped.data], [at_once.data], F64)
