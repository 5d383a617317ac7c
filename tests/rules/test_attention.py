"""Fused attention: masks of every kind, precision, derivatives of the derivative."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from batchjac.rules import attention
from batchjac.samples import SampleAxis
from tests.rules.common import BF16, F32, F64, Case, arrived, laws, random_blocks, record, same

NAME = "ScaledDotProductFlashAttentionForCpuBackward0"
SAMPLES, HEADS, QUERIES = SampleAxis(0), SampleAxis(1), SampleAxis(2)
SHAPES = ((2, 3, 4, 2), (2, 3, 4, 2), (2, 3, 4, 2))
GROUPED = ((2, 4, 3, 2), (2, 2, 3, 2), (2, 2, 3, 2))
UNEQUAL = ((2, 1, 3, 2), (2, 1, 5, 2), (2, 1, 5, 2))

KEEP = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
BLIND = KEEP & torch.tensor([[True], [False], [True], [False]])


def attend(mask: Tensor | None = None, **options: Any) -> Callable[..., Tensor]:
    def build(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=given, **options)

    return build


def case(build: Callable[..., Tensor], note: str, **facts: Any) -> Case:
    # the node has no second derivative; the one of the rule has a test of its own
    return Case(NAME, build, **{"shapes": SHAPES, "second": False, "note": note, **facts})


CASES = [
    case(attend(), "", dtypes=(F64, F32, BF16), at=((SAMPLES, 2), (HEADS, 3)),
         mixes=((QUERIES, 4),)),
    case(attend(), "cross", shapes=UNEQUAL, at=((SAMPLES, 2), (HEADS, 1))),
    case(attend(), "merged", at=((SampleAxis(1, inner=3), 1),)),
    case(attend(is_causal=True, scale=0.3), "causal", dtypes=(F64, F32, BF16)),
    case(attend(is_causal=True), "causal, not square", shapes=UNEQUAL),
    case(attend(KEEP), "mask", at=((SAMPLES, 2),)),
    case(attend(BLIND), "blind queries", dtypes=(F64, F32, BF16)),
    case(attend(BLIND.expand(2, 1, 4, 4)), "mask with samples"),
    case(attend(torch.randn(4, 4)), "bias"),
    case(attend(torch.randn(2, 3, 4, 4)), "bias for each head"),
    case(attend(), "only values", wants=(False, False, True)),
    case(attend(), "one key", shapes=((1, 1, 1, 1),) * 3, at=((SAMPLES, 1),)),
    case(attend(enable_gqa=True), "grouped heads", shapes=GROUPED, at=((SAMPLES, 2),)),
]  # fmt: skip

(
    test_equals_the_node_row_by_row,
    test_claims_about_samples_are_true,
    test_each_sample_alone,
    _,
) = laws(CASES)


@pytest.mark.parametrize(
    "build",
    [c.build for c in CASES if c.shapes == SHAPES],
    ids=[c.note or "plain" for c in CASES if c.shapes == SHAPES],
)
def test_differentiable_again_as_the_plain_formula_is(build: Callable[..., Tensor]):
    again_as_the_plain_formula_is(build, SHAPES)


def test_grouped_heads_are_differentiable_again():
    again_as_the_plain_formula_is(attend(enable_gqa=True), GROUPED)


def again_as_the_plain_formula_is(build: Callable[..., Tensor], shapes: Any) -> None:
    """The fused node has one derivative only; the same attention from bmm and softmax has all."""
    recorded = record(case(build, "", shapes=shapes))
    (block, *_) = random_blocks(recorded.step, ())
    assert block is not None
    cotangent = block.data.requires_grad_()
    found = arrived(recorded.step, recorded.rule.reverse(recorded.step, [block]))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = build(*recorded.inputs)
    want = [
        torch.stack(rows)
        for rows in zip(
            *(torch.autograd.grad(plain, recorded.inputs, c, create_graph=True) for c in cotangent),
            strict=True,
        )
    ]
    same(found, want, F64)
    weights = [torch.randn_like(w) for w in want]
    leaves = [*recorded.inputs, cotangent]
    second = [torch.autograd.grad(r, leaves, weights, create_graph=True) for r in (found, want)]
    same(*second, F64)
    third = [torch.autograd.grad(sum(x.square().sum() for x in s), leaves) for s in second]
    same(*third, F64)


def test_groups_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch):
    recorded = record(CASES[0])
    blocks = random_blocks(recorded.step, (), rows=5)
    with torch.no_grad():
        at_once = recorded.rule.reverse(recorded.step, blocks)
        monkeypatch.setitem(attention.GROUP, "cpu", 2 * 2 * 3 * 4 * 4 * 8)
        assert [len(g) for g in attention._groups(recorded.step, blocks[0])] == [2, 2, 1]
        grouped = recorded.rule.reverse(recorded.step, blocks)
    same(arrived(recorded.step, grouped), arrived(recorded.step, at_once), F64)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("ScaledDotProductFlashAttentionBackward0", None),
        ("ScaledDotProductEfficientAttentionBackward0", "attn_bias"),
        ("ScaledDotProductCudnnAttentionBackward0", "attn_bias"),
    ],
)
def test_the_nodes_of_other_devices_keep_the_same_things_by_other_names(
    name: str, mask: str | None
):
    """Without the device: the names exist on the node's type, and the formula reads no others."""
    kind = getattr(torch._C._functions, name)
    recorded = record(case(attend(torch.randn(4, 4)), ""))
    kept = {n: recorded.step.saved(n) for n in ("query", "key", "value", "is_causal", "dropout_p")}
    kept["scale"] = None
    if mask is not None:
        kept[mask] = recorded.step.saved("attn_mask")
    assert all(hasattr(kind, f"_saved_{n}") for n in kept)
    edges = recorded.step.edges
    if name == "ScaledDotProductEfficientAttentionBackward0":
        meta = replace(edges[0].meta, shape=(4, 4))
        edges = (*edges, replace(edges[0], meta=meta))
    node = type(name, (SimpleNamespace,), {f"_saved_{n}": value for n, value in kept.items()})()
    step = replace(recorded.step, node=node, name=name, edges=edges)
    (block, *_) = random_blocks(step, ())
    found = arrived(step, attention.attention(step, [block]))
    q, k, v = recorded.inputs
    bias = recorded.step.saved("attn_mask") if mask else torch.zeros(4, 4, dtype=F64)
    bias = bias.detach().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    rows = [torch.autograd.grad(plain, (q, k, v, bias), c, retain_graph=True) for c in block.data]
    want = [torch.stack(column) for column in zip(*rows, strict=True)]
    same(found, want[: len(found)], F64)


def test_dropout_is_left_to_the_node():
    recorded = record(CASES[0])
    kept = {n: recorded.step.saved(n) for n in ("query", "key", "value", "is_causal")}
    kept["dropout_p"] = 0.5
    node = type("Node", (SimpleNamespace,), {f"_saved_{n}": value for n, value in kept.items()})()
    step = replace(recorded.step, node=node)
    assert attention.attention(step, random_blocks(step, ())) is NotImplemented
