"""Sets, point clouds and graphs: gathers, scatters and sums over neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .registry import BY_PLACE, case

GROUP = "graphs and sets"
EDGES = torch.tensor([[0, 1, 2, 3, 0, 2], [1, 2, 3, 0, 2, 1]])  # sources, targets; four nodes


@case("deep_sets", group=GROUP)
def deep_sets() -> Any:
    each, whole = nn.Sequential(nn.Linear(2, 5), nn.ELU()), nn.Linear(10, 3)
    return lambda x: whole(torch.cat([each(x).sum(1), each(x).logsumexp(1)], 1)), torch.randn(
        4, 3, 2
    )


@case("pointnet", group=GROUP)
def pointnet() -> Any:
    """A learnt 3x3 alignment per cloud, then a maximum over its points."""
    align, each, head = nn.Linear(3, 9), nn.Conv1d(3, 6, 1), nn.Linear(6, 2)

    def f(x: Tensor) -> Tensor:
        turn = align(x.amax(1)).view(-1, 3, 3) + torch.eye(3, dtype=x.dtype)
        return head(each((x @ turn).mT).relu().max(dim=2)[0])

    return f, torch.randn(3, 4, 3)


class MessagePassing(nn.Module):
    """One fixed graph; node features [N, nodes, width] summed into the targets by ``index_add``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(2 * width, width), nn.GRUCell(width, width)

    def forward(self, x: Tensor) -> Tensor:
        sources, targets = EDGES
        message = self.message(torch.cat([x[:, sources], x[:, targets]], dim=2)).tanh()
        gathered = torch.zeros_like(x).index_add(1, targets, message)
        return self.update(gathered.flatten(0, 1), x.flatten(0, 1)).view_as(x)


@case("message_passing_index_add", group=GROUP)
def message_passing_index_add() -> Any:
    return nn.Sequential(MessagePassing(3), MessagePassing(3)), torch.randn(3, 4, 3)


# Every sample has a graph of its own, kept by its place.
@case("graph_per_sample_scatter", group=GROUP, without=BY_PLACE)
def graph_per_sample_scatter() -> Any:
    targets = torch.randint(4, (3, 6, 1)).expand(-1, -1, 2)
    weight = nn.Linear(2, 2)

    def f(x: Tensor) -> Tensor:
        message = weight(x[:, EDGES[0]]).sigmoid()
        total = torch.zeros_like(x).scatter_add_(1, targets, message)
        best = x.scatter_reduce(1, targets, message, reduce="amax")
        mean = x.scatter_reduce(1, targets, message, reduce="mean", include_self=False)
        return total * best + mean

    return f, torch.randn(3, 4, 2)


@case("graphs_merged_into_one", group=GROUP)
def graphs_merged_into_one() -> Any:
    """All graphs of the batch as one big graph, nodes numbered through: no batch axis inside."""
    message, head = nn.Linear(2, 2), nn.Linear(2, 3)

    def f(x: Tensor) -> Tensor:
        n, nodes, width = x.shape
        flat = x.reshape(n * nodes, width)
        offsets = (torch.arange(n) * nodes).unsqueeze(1)
        sources, targets = ((EDGES[k] + offsets).flatten() for k in (0, 1))
        flat = flat.index_add(0, targets, message(flat[sources]).relu())
        owner = torch.arange(n).repeat_interleave(nodes)
        return head(x.new_zeros(n, width).index_add_(0, owner, flat))

    return f, torch.randn(3, 4, 2)


@case("graph_convolution_sparse_adjacency", group=GROUP)
def graph_convolution_sparse_adjacency() -> Any:
    """A sparse constant matrix multiplies the features of all samples laid side by side."""
    adjacency = torch.sparse_coo_tensor(EDGES, torch.rand(6), (4, 4), check_invariants=True)
    adjacency = adjacency.coalesce()

    def f(x: Tensor) -> Tensor:
        wide = x.transpose(0, 1).flatten(1)
        return torch.sparse.mm(adjacency, wide).tanh().unflatten(1, (len(x), -1)).transpose(0, 1)

    return f, torch.randn(3, 4, 2)


class GraphAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.score = nn.Linear(2, 3, bias=False), nn.Linear(6, 1)
        self.register_buffer(
            "linked", torch.zeros(4, 4).bool().index_put((*EDGES,), torch.tensor(True))
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        pairs = torch.cat(
            [h.unsqueeze(2).expand(-1, -1, 4, -1), h.unsqueeze(1).expand(-1, 4, -1, -1)], -1
        )
        score = F.leaky_relu(self.score(pairs).squeeze(-1), 0.2)
        return torch.where(self.linked, score, -torch.inf).softmax(-1) @ h


@case("graph_attention", group=GROUP)
def graph_attention() -> Any:
    return GraphAttention(), torch.randn(3, 4, 2)


@case("relation_network_einsum", group=GROUP)
def relation_network_einsum() -> Any:
    weight = nn.Parameter(torch.randn(3, 2, 2))
    return lambda x: torch.einsum("nai,oij,nbj->no", x.sin(), weight, x), torch.randn(3, 4, 2)


@case("point_distances", group=GROUP)
def point_distances() -> Any:
    """Distances between the points of a sample, by three roads, as a smooth descriptor."""

    def f(x: Tensor) -> Tensor:
        euclid = torch.cdist(x, x + 1)
        city = torch.cdist(x, x * 2, p=1)
        by_hand = (x.unsqueeze(1) - x.unsqueeze(2) + 0.1).norm(dim=-1)
        return torch.stack([torch.exp(-d).sum(2) for d in (euclid, city, by_hand)], dim=1)

    return f, torch.randn(3, 3, 2)


@case("pairwise_distances_pdist", group=GROUP)
def pairwise_distances_pdist() -> Any:
    return lambda x: torch.stack([F.pdist(sample) for sample in x]), torch.randn(3, 4, 2)


@case("nearest_neighbours_gather", group=GROUP)
def nearest_neighbours_gather() -> Any:
    """DGCNN: the edges are chosen by the data, the gather index has a gradient on neither side."""
    edge = nn.Linear(4, 3)

    def f(x: Tensor) -> Tensor:
        near = torch.cdist(x, x).topk(2, dim=2, largest=False).indices
        picked = x.unsqueeze(1).expand(-1, 4, -1, -1)
        picked = picked.gather(2, near.unsqueeze(-1).expand(-1, -1, -1, 2))
        centre = x.unsqueeze(2).expand_as(picked)
        return edge(torch.cat([centre, picked - centre], -1)).amax(2).mean(1)

    return f, torch.randn(3, 4, 2)


@case("take_along_and_index_put", group=GROUP)
def take_along_and_index_put() -> Any:
    def f(x: Tensor) -> Tensor:
        order = x.argsort(dim=1, descending=True)
        ranked = torch.take_along_dim(x, order, 1)
        put = torch.zeros_like(x).index_put((torch.arange(len(x))[:, None], order), ranked**2)
        return torch.cat([ranked, put, x.index_select(1, torch.tensor([2, 0, 2]))], 1)

    return f, torch.randn(3, 4)
