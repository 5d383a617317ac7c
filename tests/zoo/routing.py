"""Which branch runs is decided by the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .registry import case

GROUP = "data-dependent"


def experts(count: int, inputs: int = 4, outputs: int = 3) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs)) for _ in range(count)
    )


class DenseMixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 3), experts(3)

    def forward(self, x: Tensor) -> Tensor:
        answers = torch.stack([expert(x) for expert in self.experts], dim=1)
        return (self.gate(x).softmax(1).unsqueeze(2) * answers).sum(1)


@case("mixture_dense", group=GROUP)
def mixture_dense() -> Any:
    return DenseMixture(), torch.randn(4, 4)


class BranchPerSample(nn.Module):
    """A Python ``if`` for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), experts(2)

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for row in x:
            score = self.gate(row)
            if score[0] > score[1]:
                rows.append(self.experts[0](row) * score[0])
            else:
                rows.append(self.experts[1](row.square()) + row[:3])
        return torch.stack(rows)


@case("mixture_if_per_sample", group=GROUP)
def mixture_if_per_sample() -> Any:
    return BranchPerSample(), torch.randn(5, 4)


class RoutedTopOne(nn.Module):
    """Samples are collected per expert, computed together and put back by ``index_copy``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 3), experts(3)

    def forward(self, x: Tensor) -> Tensor:
        weight, choice = self.gate(x).softmax(1).max(dim=1)
        out = x.new_zeros(len(x), 3)
        for k, expert in enumerate(self.experts):
            members = torch.nonzero(choice == k).squeeze(1)
            if len(members):
                answer = expert(x.index_select(0, members)) * weight[members, None]
                out = out.index_copy(0, members, answer)
        return out


@case("mixture_index_select", group=GROUP)
def mixture_index_select() -> Any:
    return RoutedTopOne(), torch.randn(5, 4)


class RoutedTokens(nn.Module):
    """Top-2 over the tokens of all samples at once, by boolean masks and in-place sums."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 3), experts(3, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, choices = self.gate(tokens).topk(2, dim=1)
        weights = weights.softmax(1)
        out = torch.zeros_like(tokens)
        for k, expert in enumerate(self.experts):
            token, slot = torch.where(choices == k)
            out.index_add_(0, token, weights[token, slot, None] * expert(tokens[token]))
        return out.view_as(x)


@case("mixture_top_two_of_tokens", group=GROUP)
def mixture_top_two_of_tokens() -> Any:
    return RoutedTokens(), torch.randn(3, 2, 4)


class MaskedWrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        above = x.sum(1) > 0
        out = torch.empty_like(x)
        out[above] = self.high(x[above]).exp()
        out[~above] = self.low(x[~above])
        out[out > 2] *= 0.1
        return out


@case("boolean_masks_written_in_place", group=GROUP)
def boolean_masks_written_in_place() -> Any:
    return MaskedWrites(), torch.randn(5, 3)


@case("whole_batch_takes_one_branch", group=GROUP, without={"chunks"})
def whole_batch_takes_one_branch() -> Any:
    """The branch looks at the batch, the values do not: still independent where it stands."""
    left, right = nn.Linear(3, 2), nn.Linear(3, 2)
    return lambda x: left(x).tanh() if len(x) > 2 else right(x), torch.randn(4, 3)


@case("where_with_a_poisoned_branch", group=GROUP)
def where_with_a_poisoned_branch() -> Any:
    """The branch not taken is finite by the usual trick of two ``where``."""

    def f(x: Tensor) -> Tensor:
        positive = x > 0
        safe = torch.where(positive, x, 1.0)
        return torch.where(positive, safe.log(), x.exp())

    return f, torch.randn(4, 4)


@case("early_exit", group=GROUP)
def early_exit() -> Any:
    """Samples leave when sure; what remains is computed on a shrinking batch."""
    blocks, heads = experts(3, 4, 4), nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def f(x: Tensor) -> Tensor:
        alive, answers = torch.arange(len(x)), x.new_zeros(len(x), 3)
        for depth in range(3):
            x = x + blocks[depth](x)
            answer = heads[depth](x)
            sure = answer.softmax(1).amax(1) > 0.5 if depth < 2 else torch.ones(len(x)).bool()
            answers = answers.index_put((alive[sure],), answer[sure])
            alive, x = alive[~sure], x[~sure]
        return answers

    return f, torch.randn(5, 4)


@case("decision_tree_soft", group=GROUP)
def decision_tree_soft() -> Any:
    splits, leaves = nn.Linear(4, 3), nn.Parameter(torch.randn(4, 2))

    def f(x: Tensor) -> Tensor:
        p = splits(x).sigmoid()
        ways = [p[:, 0] * p[:, 1], p[:, 0] * (1 - p[:, 1])]
        ways += [(1 - p[:, 0]) * p[:, 2], (1 - p[:, 0]) * (1 - p[:, 2])]
        return torch.stack(ways, 1) @ leaves

    return f, torch.randn(4, 4)


@case("newton_iterations_while_loop", group=GROUP)
def newton_iterations_while_loop() -> Any:
    """Root finding by ``while`` until the whole batch has converged, differentiated through."""

    def f(x: Tensor) -> Tensor:
        y = torch.ones_like(x)
        while bool((y**3 + y - x).abs().max() > 1e-12):
            y = y - (y**3 + y - x) / (3 * y**2 + 1)
        return y

    return f, torch.randn(4, 2)
