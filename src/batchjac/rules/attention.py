"""Fused scaled dot-product attention, whose own backward takes one row at a time.

For one head, with ``l`` queries, ``s`` keys and ``e``, ``d`` features::

    P[l,s] = softmax_s(c sum_e q[l,e] k[s,e] + mask[l,s])        y[l,d] = sum_s P[l,s] v[s,d]

    dv[s,d] = sum_l P[l,s] g[l,d]
    dS[l,s] = P[l,s] (sum_d g[l,d] v[s,d] - sum_d g[l,d] y[l,d])
    dq[l,e] = c sum_s dS[l,s] k[s,e]        dk[s,e] = c sum_l dS[l,s] q[l,e]

and for tangents ``tq``, ``tk``, ``tv``, ``tm`` of the four::

    tS[l,s] = c sum_e (tq[l,e] k[s,e] + q[l,e] tk[s,e]) + tm[l,s]
    tP[l,s] = P[l,s] (tS[l,s] - sum_s P[l,s] tS[l,s])
    ty[l,d] = sum_s (tP[l,s] v[s,d] + P[l,s] tv[s,d])

``P`` and ``y`` have no rows. ``P``, and for a result that can be differentiated any number of times
``y`` too, is computed again from what the node saved; the node itself can be only once. With the
rows beside the queries or the features, ``g[l,v,d]`` and ``dS[l,v,s]``, each line is one matrix
product for each head, which reads what the rows share once.

Source: Dao et al., FlashAttention (arXiv 2205.14135), appendix B.2.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchjac import kernels
from batchjac.block import Block
from batchjac.graph import Step
from batchjac.rules.registry import Blocks, first, forward, rule
from batchjac.samples import Place, SampleAxis

# Bytes of dS for one group of rows: on a CPU they should stay in the cache. Measured on torch 2.13
# with one thread, 100 rows of 4 x 8 heads of 64 x 64: 160 ms, 212 ms all at once, 231 by the node.
GROUP = {"cpu": 1 << 23, "cuda": 1 << 28}


def _samples(step: Step, at: SampleAxis) -> list[Place]:
    """Samples and heads stay apart, in the mask too unless it was broadcast over them."""
    size = step.shape[at.dim]
    return [
        at if e and at.dim < 2 and len(e.shape) == 4 and e.shape[at.dim] == size else None
        for e in step.edges
    ]


NODES = (
    "ScaledDotProductFlashAttentionForCpuBackward0",
    "ScaledDotProductFlashAttentionBackward0",
    "ScaledDotProductEfficientAttentionBackward0",
    "ScaledDotProductCudnnAttentionBackward0",
)


@rule(*NODES, samples=_samples)
def attention(step: Step, blocks: Blocks) -> Any:
    """The four products above for each row; a fourth edge, if any, is the mask: ``dS``."""
    g = blocks[0]
    assert g is not None
    if not _covered(step):
        return NotImplemented
    shared = _shared(step)
    found: list[list[Tensor]] = [[] for _ in step.edges]
    heads = step.saved("key").shape[1]
    for rows in _groups(step, g):
        for k, part in enumerate(_products(step, shared, rows)):
            if part is not None:
                # queries that read one key's head, side by side
                one_each = k not in (1, 2) or part.shape[2] == heads
                found[k].append(part if one_each else part.unflatten(2, (heads, -1)).sum(3))
    return [
        None if e is None else _joined(parts).sum_to(e.shape)
        for e, parts in zip(step.edges, found, strict=True)
    ]


def _joined(groups: list[Tensor]) -> Block:
    """All rows; a mask's are still those of the scores it was broadcast to."""
    data = groups[0] if len(groups) == 1 else torch.cat(groups)
    return Block(data, tuple(data.shape[1:]))


def _covered(step: Step) -> bool:
    """Dropout is left to the node; so are causal masks that are not square.

    (The node for CPU anchors them at the first key; other kernels do not all agree.)
    """
    query, key = step.saved("query"), step.saved("key")
    square = step.name.endswith("ForCpuBackward0") or query.shape[-2] == key.shape[-2]
    heads = query.dim() == 4 and query.shape[1] % key.shape[1] == 0
    same = heads and query.shape[0] == key.shape[0]
    return same and step.saved("dropout_p") == 0 and (square or not step.saved("is_causal"))


@dataclass(frozen=True)
class _Shared:
    """What all rows share, in the precision of the computation, ``[heads of all samples, ., .]``.

    Scaled q and k, v, and the transposed P; P and y once more with an axis for rows before the
    last.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    transposed: Tensor
    weights: Tensor
    output: Tensor


def _shared(step: Step) -> _Shared:
    q, k, v = (_wide(step.saved(name)) for name in ("query", "key", "value"))
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scale = step.saved("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    weights = _softmax(torch.matmul(q * scale, k.mT), _mask(step, q, k)).flatten(0, 1)
    q, k, v = (x.flatten(0, 1) for x in (q * scale, k * scale, v))
    if torch.is_grad_enabled():
        output = kernels.batched(weights, v)
    else:
        output = _wide(step.saved("output")).flatten(0, 1)
    return _Shared(q, k, v, weights.mT, weights.unsqueeze(2), output.unsqueeze(2))


def _wide(x: Tensor) -> Tensor:
    """Half precision is summed in single, as the kernels do."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _mask(step: Step, q: Tensor, k: Tensor) -> Tensor | None:
    """What is added to the scores: 0 to keep, -inf to leave out, or any bias."""
    if step.saved("is_causal"):
        later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        return torch.zeros_like(later, dtype=q.dtype).masked_fill(later, -math.inf)
    name = next((n for n in ("attn_mask", "attn_bias") if step.has(n)), None)
    mask = None if name is None else step.saved(name)
    return mask if mask is None else _wide(mask)


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """A query that may look at no key gets weights 0, as the kernels do, and not nan."""
    if mask is None:
        return scores.softmax(-1)
    blind = (mask == -math.inf).all(-1, keepdim=True)
    return (scores + mask.masked_fill(blind, 0)).softmax(-1).masked_fill(blind, 0)


def _groups(step: Step, g: Block) -> Iterator[Tensor]:
    """The rows a few at a time; all at once where the result is recorded."""
    for rows in g.full().split(g.rows if torch.is_grad_enabled() else _at_once(step)):
        yield _wide(rows)


def _at_once(step: Step) -> int:
    query, key = step.saved("query"), step.saved("key")
    size = int(math.prod(query.shape[:-1]) * key.shape[-2] * max(4, query.element_size()))
    return max(1, GROUP.get(query.device.type, GROUP["cuda"]) // max(1, size))


def _products(step: Step, s: _Shared, g: Tensor) -> list[Tensor | None]:
    """The gradients of a group of rows toward the wanted ones of q, k, v and the mask."""
    v, n = g.shape[:2]
    g = g.permute(1, 2, 3, 0, 4).flatten(0, 1).contiguous()  # b l v d, with b all n and h
    found: list[Tensor | None] = [None] * len(step.edges)
    if step.edges[2] is not None:
        found[2] = kernels.batched(s.transposed, g.flatten(2)).unflatten(2, (v, -1))  # b s v d
    if any(e is not None for k, e in enumerate(step.edges) if k != 2):
        scores = _change(s, g)  # b l v s
        if step.edges[0] is not None:
            found[0] = kernels.batched(scores.flatten(1, 2), s.k).unflatten(1, (-1, v))
        if step.edges[1] is not None:
            toward_key = kernels.batched(scores.flatten(2).mT, s.q)
            found[1] = toward_key.unflatten(1, (v, -1)).transpose(1, 2)
        if step.wanted(3) is not None:
            found[3] = scores
    return [None if f is None else f.unflatten(0, (n, -1)).permute(3, 0, 1, 2, 4) for f in found]


def _change(s: _Shared, g: Tensor) -> Tensor:
    """``dS[b,l,v,s]``."""
    change = kernels.batched(g.flatten(1, 2), s.v.mT).view(*g.shape[:3], -1)
    mean = (g * s.output).sum(-1, keepdim=True)
    if torch.is_grad_enabled():
        return s.weights * (change - mean)
    return change.sub_(mean).mul_(s.weights)


@forward(*NODES)
def attention_forward(step: Step, blocks: Blocks) -> Any:
    """``ty`` of the equations above for each row."""
    if not _covered(step):
        return NotImplemented
    shared = _shared(step)
    lead = (*step.saved("query").shape[:-1], step.saved("key").shape[-2])
    whole = [
        None if b is None else _each_query((b if k < 3 else b.broadcast_to(lead)).full(), lead[1])
        for k, b in enumerate(blocks)
    ]
    rows = next(b.rows for b in blocks if b is not None)
    size = rows if torch.is_grad_enabled() else _at_once(step)
    found = [
        _tangent(shared, [None if t is None else _wide(t[v : v + size]) for t in whole])
        for v in range(0, rows, size)
    ]
    data = (found[0] if len(found) == 1 else torch.cat(found, 2)).unflatten(0, lead[:2])
    return first(step, Block(data.permute(3, 0, 1, 2, 4), step.shape))


def _each_query(t: Tensor, heads: int) -> Tensor:
    """Rows ``[v, n, h, ...]`` for every head of the queries: several may read one key's."""
    return t if t.shape[2] == heads else t.repeat_interleave(heads // t.shape[2], 2)


def _tangent(s: _Shared, tangents: list[Tensor | None]) -> Tensor:
    """``ty[b,l,v,d]`` for a group of rows, with ``b`` all samples and heads."""
    tq, tk, tv, mask = (
        None if t is None else t.permute(1, 2, 3, 0, 4).flatten(0, 1)  # b l v e
        for t in (*tangents, *[None] * (4 - len(tangents)))
    )
    scores = [] if mask is None else [mask]
    if tq is not None:
        scores.append(kernels.batched(tq.flatten(1, 2), s.k.mT).unflatten(1, tq.shape[1:3]))
    if tk is not None:
        products = kernels.batched(s.q, tk.flatten(1, 2).mT)  # b l (s v)
        scores.append(products.unflatten(2, tk.shape[1:3]).transpose(2, 3))
    found: Tensor | None = None
    if scores:
        change = s.weights * sum(scores[1:], scores[0])  # b l v s
        change = change - s.weights * change.sum(-1, keepdim=True)
        found = kernels.batched(change.flatten(1, 2), s.v).unflatten(1, change.shape[1:3])
    if tv is not None:
        part = kernels.batched(s.transposed.mT, tv.flatten(2)).unflatten(2, tv.shape[2:])
        found = part if found is None else found + part
    assert found is not None
    return found
