"""The same operations along the right axis and along the wrong one.

Every axis has as many entries as there are samples, so nothing but the meaning of an operation can
tell which axis holds them. A claim that samples stay apart must be refuted on each coupled one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchjac.errors import CouplingError

from .registry import LAWS, NOT_ITS_SLOPE, case

GROUP = "samples mixed or apart"
N = 4
Function = Callable[[Tensor], Tensor]


def layer(make: Callable[[], nn.Module]) -> Callable[[], Function]:
    """A layer that is made anew for every build."""
    return lambda: make()


def plain(f: Function) -> Callable[[], Function]:
    return lambda: f


def with_weight(f: Callable[[Tensor, Tensor], Tensor], *shape: int) -> Callable[[], Function]:
    def make() -> Function:
        weight = torch.randn(*shape)
        return lambda x: f(x, weight)

    return make


ORDER = torch.tensor([2, 0, 3, 1])
OWNER = torch.tensor([0, 1, 1, 3])
MASK = torch.tensor([True, False, True, True])


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def written(x: Tensor, where: Any, what: Tensor) -> Tensor:
    y = x.sin()
    y[where] = what
    return y


# On [N, N]
SQUARE_COUPLED: dict[str, Callable[[], Function]] = {
    "transpose": plain(lambda x: x.t().sin()),
    "transpose_then_linear": layer(lambda: nn.Sequential(Transpose(), nn.Linear(N, N))),
    "weight_on_the_left": with_weight(lambda x, w: w @ x, N, N),
    "gram": plain(lambda x: x @ x.t()),
    "gram_other_side": plain(lambda x: x.t() @ x),
    "sum_over_samples": plain(lambda x: x + x.sum(0)),
    "sum_over_all": plain(lambda x: x * x.sum()),
    "mean_over_samples_kept": plain(lambda x: x * x.mean(0, keepdim=True)),
    "softmax_over_samples": plain(lambda x: x.softmax(0)),
    "log_softmax_over_samples": plain(lambda x: x.log_softmax(0)),
    "logsumexp_over_samples": plain(lambda x: x - x.logsumexp(0)),
    "cumsum_over_samples": plain(lambda x: x.cumsum(0)),
    "cumprod_over_samples": plain(lambda x: x.cumprod(0)),
    "sort_over_samples": plain(lambda x: x.sort(0).values),
    "max_over_samples": plain(lambda x: x - x.max(0).values),
    "amax_over_samples": plain(lambda x: x - x.amax(0)),
    "max_of_all": plain(lambda x: x - x.max()),
    "norm_over_samples": plain(lambda x: F.normalize(x, dim=0)),
    "variance_over_samples": plain(lambda x: x / x.var(0)),
    "flip": plain(lambda x: x.flip(0)),
    "roll": plain(lambda x: x.roll(1, 0)),
    "roll_flat": plain(lambda x: x.roll(1)),
    "permuted_by_index": plain(lambda x: x[ORDER]),
    "permuted_by_index_select": plain(lambda x: x.index_select(0, ORDER)),
    "permuted_by_gather": plain(lambda x: x.gather(0, ORDER.unsqueeze(1).expand(N, N))),
    "permuted_by_take_along": plain(lambda x: torch.take_along_dim(x, ORDER.unsqueeze(1), 0)),
    "gathered_by_owner": plain(lambda x: x[OWNER]),
    "index_add_to_others": plain(lambda x: x.index_add(0, ORDER, x)),
    "scattered_to_others": plain(lambda x: x.scatter(0, ORDER.unsqueeze(1), x[:, :1].sin())),
    "scatter_added_to_others": plain(lambda x: x.scatter_add(0, ORDER.unsqueeze(1), x[:, :1])),
    "put_by_index_to_others": plain(lambda x: torch.zeros_like(x).index_put((ORDER,), x)),
    "written_into_another": plain(lambda x: written(x, slice(1, 2), x[:1])),
    "written_by_mask": plain(lambda x: written(x, MASK, x[:3].cos())),
    "masked_scatter": plain(lambda x: x.masked_scatter(~MASK.unsqueeze(1), x)),
    "slices_joined_the_other_way": plain(lambda x: torch.cat([x[2:], x[:2]])),
    "stacked_columns_as_rows": plain(lambda x: torch.stack(x.unbind(1), 0)),
    "reshaped_in_another_order": plain(lambda x: x.t().reshape(N, N).sin()),
    "viewed_with_an_offset": plain(
        lambda x: torch.cat([x.flatten()[1:], x.flatten()[:1]]).view(N, N)
    ),
    "broadcast_against_itself": plain(lambda x: x[:, 0] * x[:, :1]),
    "einsum_over_samples": plain(lambda x: torch.einsum("ni,mi->nm", x, x)),
    "einsum_transposed": plain(lambda x: torch.einsum("ni->in", x)),
    "outer_product_of_columns": plain(lambda x: torch.outer(x[:, 0], x[:, 1])),
    "distances_between_samples": plain(lambda x: torch.exp(-torch.cdist(x, x + 1))),
    "difference_between_samples": plain(lambda x: x.diff(dim=0, prepend=x[:1])),
    "fourier_over_samples": plain(lambda x: torch.fft.fft(x, dim=0).real),
    "layer_norm_of_the_whole": plain(lambda x: F.layer_norm(x, [N, N])),
    "group_norm_of_the_transpose": plain(lambda x: F.group_norm(x.t(), 2).t()),
    "batch_norm_in_training": plain(lambda x: F.batch_norm(x, None, None, training=True)),
    "unbatched_convolution": layer(lambda: nn.Conv1d(N, N, 3, padding=1)),
    "unbatched_conv_transpose": layer(lambda: nn.ConvTranspose1d(N, N, 3, padding=1)),
    "attention_between_samples": plain(attend),
    "linear_algebra_of_the_batch": plain(lambda x: torch.linalg.inv(x + 5 * torch.eye(N).to(x))),
    "pooled_over_samples": plain(lambda x: F.avg_pool1d(x.t(), 3, 1, 1).t()),
    "max_pooled_over_samples": plain(lambda x: F.max_pool1d(x.t(), 3, 1, 1).t()),
    "upsampled_over_samples": plain(
        lambda x: F.interpolate(x.t()[None], scale_factor=2)[0].t()[1:5]
    ),
    "folded_over_samples": plain(lambda x: x.unfold(0, 2, 1).sum(-1).repeat(2, 1)[:N]),
    "lower_triangle_times": plain(lambda x: torch.ones_like(x).tril() @ x),
    "where_with_a_neighbour": plain(lambda x: torch.where(x > 0, x, x.roll(1, 0))),
    "maximum_with_a_neighbour": plain(lambda x: torch.maximum(x, x.flip(0))),
    "lerp_toward_a_neighbour": plain(lambda x: torch.lerp(x, x[ORDER], 0.3)),
    "diagonal_shared": plain(lambda x: x + x.diagonal()),
    "trace_shared": plain(lambda x: x * x.trace()),
    "strided_over_samples": plain(lambda x: x.as_strided((N, N), (1, N)).exp()),
    "rotated": plain(lambda x: x.rot90(1, (0, 1))),
    "repeated_then_cut": plain(lambda x: x.repeat(2, 1)[1 : N + 1]),
    "interleaved_then_cut": plain(lambda x: x.repeat_interleave(2, 0)[:N]),
}

SQUARE_APART: dict[str, Callable[[], Function]] = {
    "weight_on_the_right": with_weight(lambda x, w: x @ w, N, N),
    "weight_on_the_left_of_the_transpose": with_weight(lambda x, w: (w @ x.t()).t(), N, N),
    "sum_over_entries": plain(lambda x: x * x.sum(1, keepdim=True)),
    "softmax_over_entries": plain(lambda x: x.t().softmax(0).t()),
    "log_softmax_over_entries": plain(lambda x: x.log_softmax(1)),
    "cumsum_over_entries": plain(lambda x: x.t().cumsum(0).mT),
    "sort_over_entries": plain(lambda x: x.sort(1).values),
    "max_over_entries": plain(lambda x: x - x.max(1, keepdim=True).values),
    "amax_over_entries": plain(lambda x: (x.t() - x.amax(1)).t()),
    "norm_over_entries": plain(lambda x: x / x.norm(dim=1, keepdim=True)),
    "variance_over_entries": plain(lambda x: x / x.var(1, keepdim=True)),
    "flipped_entries": plain(lambda x: x.t().flip(0).t()),
    "permuted_entries": plain(lambda x: x[:, ORDER]),
    "permuted_and_put_back": plain(lambda x: x[ORDER].sin()[ORDER.argsort()]),
    "gathered_entries": plain(lambda x: x.gather(1, ORDER.unsqueeze(0).expand(N, N))),
    "index_add_of_entries": plain(lambda x: x.index_add(1, ORDER, x)),
    "scattered_entries": plain(lambda x: x.scatter_add(1, ORDER.expand(N, N), x.cos())),
    "written_into_a_column": plain(lambda x: written(x, (slice(None), 1), x[:, 0] ** 2)),
    "written_by_mask": plain(lambda x: written(x, MASK, x[MASK].cos())),
    "slices_joined": plain(lambda x: torch.cat([x[:1].sin(), x[1:3], x[3:].cos()])),
    "halves_swapped_twice": plain(
        lambda x: torch.cat([*torch.cat([x[2:], x[:2]]).sin().chunk(2)][::-1])
    ),
    "unbound_and_stacked": plain(lambda x: torch.stack([r.sin() for r in x.unbind(0)])),
    "unbound_columns_stacked": plain(lambda x: torch.stack([c.sin() for c in x.unbind(1)], 1)),
    "reshaped_and_back": plain(lambda x: x.reshape(2, 2, N).sin().reshape(N, N)),
    "transposed_and_back": plain(lambda x: x.t().contiguous().exp().t()),
    "broadcast_against_a_column": plain(lambda x: x * x[:, :1]),
    "broadcast_through_a_new_axis": plain(lambda x: (x.unsqueeze(1) * x.unsqueeze(2)).sum(2)),
    "einsum_over_entries": plain(lambda x: torch.einsum("ni,nj->ni", x, x)),
    "einsum_with_the_samples_last": plain(lambda x: torch.einsum("in,in->n", x.t(), x.t().sin())),
    "outer_product_of_rows": plain(lambda x: torch.einsum("ni,nj->nij", x, x)),
    "fourier_over_entries": plain(lambda x: torch.fft.fft(x, dim=1).real),
    "layer_norm_of_rows": plain(lambda x: F.layer_norm(x, [N])),
    "group_norm_of_rows": plain(lambda x: F.group_norm(x, 2)),
    "convolution_with_one_channel": layer(
        lambda: nn.Sequential(nn.Unflatten(1, (1, N)), nn.Conv1d(1, N, 3))
    ),
    "samples_as_groups": with_weight(lambda x, w: F.conv1d(x, w, padding=1, groups=N), N, 1, 3),
    "pooled_over_entries": plain(lambda x: F.avg_pool1d(x, 3, 1, 1)),
    "max_pooled_over_entries": plain(lambda x: F.max_pool1d(x, 3, 1, 1)),
    "batched_products": plain(lambda x: torch.bmm(x.view(N, 2, 2), x.view(N, 2, 2).mT)),
    "strided_over_entries": plain(lambda x: x.as_strided((N, 2), (N, 2)).exp()),
    "stretched_and_cut_back": plain(lambda x: x.repeat_interleave(2, 0).sin()[::2]),
    "padded_and_cut_back": plain(lambda x: F.pad(x, (0, 0, 1, 1)).sin()[1:-1]),
    "detached_statistics": plain(lambda x: x * x.detach().sum(0)),
    "diagonal_block_of_a_gram": plain(lambda x: (x @ x.t()).diagonal().sin()),
    "sum_of_a_block_diagonal": plain(lambda x: torch.block_diag(*[r[None] for r in x]).sum(1)),
}


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


def heads_merged(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """Attention over entries after some reshuffling of [N, T, C] into [N * heads, T, C / heads]."""
    merged = x.view(N, N, 2, 2).permute(*order).reshape(N * 2, N, 2)
    mixed = attend(merged)
    back = [0] * 4
    for place, axis in enumerate(order):
        back[axis] = place
    sizes = [(N, N, 2, 2)[axis] for axis in order]
    return mixed.view(sizes).permute(*back).reshape(N, N, 4)


# On [N, N, N]
CUBE_COUPLED: dict[str, Callable[[], Function]] = {
    "samples_and_tokens_swapped": plain(lambda x: x.transpose(0, 1).sin()),
    "samples_and_channels_swapped": plain(lambda x: x.transpose(0, 2).cumsum(0)),
    "recurrent_over_samples": layer(lambda: First(nn.GRU(N, 3))),
    "attention_over_samples": plain(lambda x: attend(x.transpose(0, 1)).transpose(0, 1)),
    "attention_layer_over_samples": layer(lambda: First(nn.MultiheadAttention(N, 2), 3)),
    "heads_merged_with_tokens": plain(lambda x: heads_merged(x, (1, 2, 0, 3))),
    "product_with_the_swapped": plain(lambda x: x @ x.transpose(0, 1)),
    "sum_over_samples_and_tokens": plain(lambda x: x * x.sum((0, 1))),
    "softmax_over_samples": plain(lambda x: x.softmax(0)),
    "convolution_over_samples": with_weight(
        lambda x, w: F.conv1d(x.transpose(0, 1), w).transpose(0, 1), N, N, 1
    ),
    "unbatched_convolution_2d": layer(lambda: nn.Conv2d(N, N, 3, padding=1)),
    "unbatched_pool_3d": plain(lambda x: F.avg_pool3d(x[None], 3, 1, 1)[0]),
    "tokens_of_all_samples_shifted": plain(lambda x: x.flatten(0, 1).roll(1, 0).view_as(x)),
    "tokens_of_all_samples_cumulated": plain(lambda x: x.flatten(0, 1).cumsum(0).view_as(x)),
    "flattened_in_another_order": plain(lambda x: x.transpose(0, 1).reshape(N, -1).sin()),
    "batch_norm_in_training": plain(lambda x: F.batch_norm(x, None, None, training=True)),
    "instance_norm_of_the_swapped": plain(
        lambda x: F.instance_norm(x.transpose(0, 2)).transpose(0, 2)
    ),
    "einsum_swaps": plain(lambda x: torch.einsum("ntc,tnd->ntd", x, x)),
    "addmm_over_samples": plain(lambda x: torch.baddbmm(x, x, x.flip(0))),
}

CUBE_APART: dict[str, Callable[[], Function]] = {
    "samples_and_tokens_swapped_twice": plain(lambda x: x.transpose(0, 1).sin().transpose(0, 1)),
    "samples_last_and_back": plain(lambda x: x.movedim(0, 2).softmax(0).movedim(2, 0)),
    "recurrent_over_tokens": layer(lambda: First(nn.GRU(N, 3, batch_first=True))),
    "recurrent_time_first": layer(
        lambda: nn.Sequential(Transpose(), First(nn.LSTM(N, 3)), Transpose())
    ),
    "attention_over_tokens": plain(attend),
    "heads_merged_with_samples": plain(lambda x: heads_merged(x, (0, 2, 1, 3))),
    "heads_before_samples": plain(lambda x: heads_merged(x, (2, 0, 1, 3))),
    "products_of_own_matrices": plain(lambda x: x @ x.mT),
    "sum_over_tokens_and_channels": plain(lambda x: x * x.sum((1, 2), keepdim=True)),
    "convolution_over_tokens": layer(lambda: nn.Conv1d(N, 2, 3)),
    "convolution_with_samples_in_depth": layer(lambda: Depth()),
    "tokens_as_one_batch": layer(
        lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(N, 3), nn.Tanh(), nn.Unflatten(0, (N, N)))
    ),
    "tokens_as_one_batch_time_first": plain(
        lambda x: x.transpose(0, 1).flatten(0, 1).softmax(1).view(N, N, N).transpose(0, 1)
    ),
    "instance_norm": plain(lambda x: F.instance_norm(x)),
    "group_norm": plain(lambda x: F.group_norm(x, 2)),
    "layer_norm_of_samples_last": plain(
        lambda x: F.layer_norm(x.movedim(0, 1).flatten(0, 1), [N]).view(N, N, N).movedim(1, 0)
    ),
    "samples_in_the_channels": plain(
        lambda x: F.avg_pool1d(x.flatten(0, 1)[None], 2)[0].view(N, N, 2)
    ),
    "max_pool_with_samples_in_the_channels": plain(
        lambda x: F.max_pool1d(x.flatten(0, 1)[None], 2)[0].view(N, N, 2)
    ),
    "batch_norm_of_samples_in_channels": plain(
        lambda x: F.batch_norm(x.flatten(0, 1)[None], None, None, training=True)[0].view(N, N, N)
    ),
    "einsum_keeps": plain(lambda x: torch.einsum("ntc,nsc->nts", x, x.sin())),
    "matrices_inverted_one_by_one": plain(lambda x: torch.linalg.inv(x + 5 * torch.eye(N).to(x))),
    "loop_over_samples": plain(lambda x: torch.stack([torch.linalg.det(m) + m.sum() for m in x])),
}


class First(nn.Module):
    """The first of the outputs of a layer that is given the same tensor several times."""

    def __init__(self, inner: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(*[x] * self.times)[0]


class Depth(nn.Module):
    """The samples as the depth of one volume, under a kernel one deep."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, (1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[None, None])[0].transpose(0, 1)


def register(table: dict[str, Callable[[], Function]], axes: int, coupled: bool) -> None:
    for name, make in table.items():
        # most of them hold the number of samples and tell places apart
        facts: dict[str, Any] = {"without": LAWS - {"directional", "out"}}
        if coupled:
            facts["expects"] = CouplingError
        title = f"{'mixed' if coupled else 'apart'}_{axes}d_{name}"

        if name == "detached_statistics":
            facts["without"] |= NOT_ITS_SLOPE

        def build(make: Callable[[], Function] = make) -> Any:
            f = make()
            return f, torch.randn(*[N] * axes)

        case(title, group=GROUP, **facts)(build)


register(SQUARE_COUPLED, 2, coupled=True)
register(SQUARE_APART, 2, coupled=False)
register(CUBE_COUPLED, 3, coupled=True)
register(CUBE_APART, 3, coupled=False)
