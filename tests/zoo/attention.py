"""Attention: PyTorch's layers, its fused kernel, and many written by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .registry import NOISY, case

GROUP = "attention"


@case("multihead_attention_layer", group=GROUP)
def multihead_attention_layer() -> Any:
    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    return lambda x: layer(x, x, x, need_weights=False)[0], torch.randn(3, 3, 4)


@case("multihead_attention_with_weights", group=GROUP)
def multihead_attention_with_weights() -> Any:
    """Time first, bias rows, and the attention weights are outputs as well."""
    layer = nn.MultiheadAttention(4, 2, add_bias_kv=True, kdim=3, vdim=4)

    def f(x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        out, weights = layer(x, x[..., :3], x)
        return torch.cat([out.transpose(0, 1), weights], dim=2)

    return f, torch.randn(3, 2, 4)


@case("multihead_attention_masked", group=GROUP)
def multihead_attention_masked() -> Any:
    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    causal = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.float64)
        padding[:, -1] = float("-inf")
        return layer(x, x, x, attn_mask=causal, key_padding_mask=padding)[0]

    return f, torch.randn(3, 3, 4)


class FusedAttention(nn.Module):
    def __init__(self, width: int, heads: int, **options: Any) -> None:
        super().__init__()
        self.heads, self.options = heads, options
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, **self.options)
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))


@case("fused_attention", group=GROUP)
def fused_attention() -> Any:
    return FusedAttention(4, 2), torch.randn(3, 3, 4)


@case("fused_attention_causal", group=GROUP)
def fused_attention_causal() -> Any:
    return FusedAttention(4, 2, is_causal=True, scale=0.3), torch.randn(3, 3, 4)


@case("fused_attention_masks", group=GROUP)
def fused_attention_masks() -> Any:
    keep = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    bias = torch.randn(2, 3, 3, requires_grad=True)
    first, second = FusedAttention(4, 2, attn_mask=keep), FusedAttention(4, 2, attn_mask=bias)
    return nn.Sequential(first, second), torch.randn(3, 3, 4)


# Dropout inside the attention weights.
@case("fused_attention_dropout", group=GROUP, without=NOISY)
def fused_attention_dropout() -> Any:
    return FusedAttention(4, 2, dropout_p=0.4), torch.randn(3, 3, 4)


@case("grouped_query_attention", group=GROUP)
def grouped_query_attention() -> Any:
    q, k, v = nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(4, 4)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, 2)).transpose(1, 2)

    def f(x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(
            heads(q(x)), heads(k(x)), heads(v(x)), enable_gqa=True
        )
        return mixed.transpose(1, 2).flatten(2)

    return f, torch.randn(3, 2, 4)


class HandAttention(nn.Module):
    """Heads merged into the batch axis, as many published models do it."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def merge(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        x = x.view(n, length, self.heads, -1).transpose(1, 2)
        return x.reshape(n * self.heads, length, width // self.heads)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.merge(self.q(x)), self.merge(self.k(x)), self.merge(self.v(x))
        score = torch.bmm(q, k.mT) / math.sqrt(width / self.heads)
        if self.causal:
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            score = score.masked_fill(later, float("-inf"))
        mixed = torch.bmm(score.softmax(-1), v).view(n, self.heads, length, -1)
        return mixed.transpose(1, 2).reshape(n, length, width)


@case("hand_written_attention", group=GROUP)
def hand_written_attention() -> Any:
    return HandAttention(4, 2, causal=False), torch.randn(3, 3, 4)


@case("hand_written_attention_causal", group=GROUP)
def hand_written_attention_causal() -> Any:
    return HandAttention(6, 3, causal=True), torch.randn(2, 3, 6)


def encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, **options)


@case("transformer_encoder_eval", group=GROUP)
def transformer_encoder_eval() -> Any:
    encoder = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(12, 3)).eval(), torch.randn(3, 3, 4)


@case("transformer_encoder_norm_first", group=GROUP)
def transformer_encoder_norm_first() -> Any:
    layer = encoder_layer(norm_first=True, activation="gelu", dropout=0.0)
    mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    return lambda x: layer(x, src_mask=mask, is_causal=True).mean(1), torch.randn(3, 3, 4)


# Dropout after the attention, inside it and in the feed-forward part.
@case("transformer_encoder_train", group=GROUP, without=NOISY)
def transformer_encoder_train() -> Any:
    layer = encoder_layer(dropout=0.3).train()
    return lambda x: layer(x)[:, 0], torch.randn(3, 3, 4)


@case("transformer_cross_attention", group=GROUP)
def transformer_cross_attention() -> Any:
    """A whole encoder-decoder: two inputs, a causal target, cross attention."""
    model = nn.Transformer(4, 2, 1, 1, 6, batch_first=True).eval()
    causal = nn.Transformer.generate_square_subsequent_mask(2, dtype=torch.float64)
    return lambda src, tgt: model(src, tgt, tgt_mask=causal).sum(1), (
        torch.randn(3, 3, 4),
        torch.randn(3, 2, 4),
    )


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 3, stride=3)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.places = nn.Parameter(torch.randn(1, 5, 4))
        self.block = encoder_layer(norm_first=True, dropout=0.0)
        self.head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.places
        return self.head(self.block(x)[:, 0])


@case("vision_transformer", group=GROUP)
def vision_transformer() -> Any:
    return VisionTransformer(), torch.randn(3, 1, 6, 6)


class GPT(nn.Module):
    """Fed with embeddings; the word table is also the head (tied)."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = FusedAttention(width, 2, is_causal=True)
        self.mlp = nn.Sequential(nn.Linear(width, 8), nn.GELU(approximate="tanh"))
        self.back = nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        x = x + self.back(self.mlp(self.norm2(x)))
        return x[:, -1] @ self.table.weight.T


@case("gpt_tied_embeddings", group=GROUP)
def gpt_tied_embeddings() -> Any:
    model = GPT(7, 4)
    return model, model.table(torch.randint(7, (3, 3))).detach()


@case("rotary_by_complex_numbers", group=GROUP)
def rotary_by_complex_numbers() -> Any:
    turn = torch.polar(torch.ones(3, 2), torch.outer(torch.arange(3.0), torch.tensor([1.0, 0.1])))

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (2, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    def f(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(rotate(x), rotate(x.tanh()), x)

    return f, torch.randn(3, 3, 4)


class Perceiver(nn.Module):
    """A few learnt latents read a longer input again and again with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(2, 4))
        self.read = nn.MultiheadAttention(4, 1, kdim=3, vdim=3, batch_first=True)
        self.think = encoder_layer(dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        z = self.latents.expand(len(x), -1, -1)
        for _ in range(2):
            z = self.think(z + self.read(z, x, x, need_weights=False)[0])
        return z.mean(1)


@case("perceiver", group=GROUP)
def perceiver() -> Any:
    return Perceiver(), torch.randn(3, 5, 3)


@case("linear_attention_causal", group=GROUP)
def linear_attention_causal() -> Any:
    q, k, v = (nn.Linear(3, 3) for _ in range(3))

    def f(x: Tensor) -> Tensor:
        query, key = F.elu(q(x)) + 1, F.elu(k(x)) + 1
        memory = torch.einsum("nti,ntj->ntij", key, v(x)).cumsum(1)
        scale = torch.einsum("nti,nti->nt", query, key.cumsum(1))
        return torch.einsum("nti,ntij->ntj", query, memory) / scale.unsqueeze(-1)

    return f, torch.randn(3, 3, 3)


@case("relative_position_windows", group=GROUP)
def relative_position_windows() -> Any:
    """Swin: cyclic shift, windows merged into the batch axis, a bias looked up by offset."""
    attend, table = HandAttention(4, 2, causal=False), nn.Parameter(torch.randn(7))
    offsets = torch.arange(4).unsqueeze(0) - torch.arange(4).unsqueeze(1) + 3

    def f(x: Tensor) -> Tensor:
        n = len(x)
        x = torch.roll(x, 1, dims=1).view(n * 2, 2, 4)
        x = attend(x).view(n, 4, 4)
        return torch.roll(x @ table[offsets], -1, dims=1)

    return f, torch.randn(3, 4, 4)
