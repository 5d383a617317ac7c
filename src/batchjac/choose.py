"""From a recorded graph to the route of each Jacobian: what the planner is told, and its answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from batchjac import cost, memory
from batchjac.answer import Part
from batchjac.cuts import Places, between, covered, cuts, slots
from batchjac.engines.forward import forward_ready
from batchjac.engines.mixed import weight
from batchjac.engines.sweep import per_sample_ready
from batchjac.errors import UnsupportedError
from batchjac.graph import Graph, Slot, Step, metas
from batchjac.route import Chain, Route, Stage, cheapest, stops
from batchjac.samples import SHARED
from batchjac.seeds import Seeds

# A route must promise this much more speed than plain reverse, whose kernels are known best.
MARGIN = 1.3
# So few rows, or so short a time, and looking for a better route costs more than it can gain.
FEW_ROWS = 4
SHORT = 1e-3  # seconds
MOST_DECLINED = 10_000
MOST_STAGES = 16  # the programme is cubic; the narrowest cuts are kept


@dataclass(frozen=True)
class Choice:
    """The route to one target, what it was chosen from, and plain reverse beside it."""

    cuts: tuple[Slot, ...]
    places: Places | None  # of a target that all samples share
    chain: Chain
    route: Route
    names: tuple[str, ...]  # of each stage's nodes
    plain: float  # seconds
    finish: float  # seconds to write the result, whichever way

    @property
    def key(self) -> int:
        """The same for the same question, whichever graph it was recorded in."""
        return hash((self.names, self.chain, self.route))

    @property
    def pays(self) -> bool:
        """Whether it is clearly the faster one, as far as can be predicted."""
        return MARGIN * (self.route.seconds + self.finish) < self.plain + self.finish


_declined: set[int] = set()


def decline(choice: Choice) -> None:
    """Remember that a rule on this route declined, so that it is not tried again."""
    if len(_declined) < MOST_DECLINED:
        _declined.add(choice.key)


def choices(
    graph: Graph, root: Slot, targets: Mapping[Part, Slot], places: Places, seeds: Seeds, mode: str
) -> dict[Part, Choice]:
    """The targets that have a route of their own; the others are reached by one plain walk."""
    if mode == "auto" and seeds.width <= FEW_ROWS:
        return {}
    found = {}
    for part, target in targets.items():
        alone = graph if len(targets) == 1 else between(graph, root, target)
        choice = choose(alone, root, target, places, seeds, mode)
        if choice is not None and (mode != "auto" or (choice.pays and choice.key not in _declined)):
            found[part] = choice
    if mode == "auto" and found and len(targets) > 1:
        return found if _pay_together(graph, targets, found, seeds) else {}
    return found


def _pay_together(
    graph: Graph, targets: Mapping[Part, Slot], found: Mapping[Part, Choice], seeds: Seeds
) -> bool:
    """Whether routes of their own beat the one walk that serves all targets."""
    n = seeds.output[0]
    work = cost.work(graph.steps, n)
    rates = _rates(work)
    one_walk = cost.seconds(work, seeds.width, n, rates)
    rest = one_walk if len(found) < len(targets) else 0.0
    written = sum(c.finish for c in found.values())
    total = rest + sum(c.route.seconds for c in found.values()) + written
    return MARGIN * total < one_walk + written


def _rates(work: cost.Work) -> cost.Rates:
    return cost.rates(torch.get_num_threads(), work.convolutions + work.thin > 0)


def choose(
    graph: Graph, root: Slot, target: Slot, places: Places, seeds: Seeds, mode: str
) -> Choice | None:
    """The best route from ``root`` to ``target`` that ``mode`` allows; None for plain reverse."""
    if mode == "auto" and seeds.width <= FEW_ROWS:
        return None
    n = seeds.output[0]
    work = cost.work(graph.steps, n)
    short = cost.seconds(work, seeds.width, n, cost.NOMINAL) < SHORT
    if mode == "auto" and short:
        return None
    found = _narrowest(cuts(graph, root, target, places))
    if len(found) < 2 or not seeds.width or not _entries(target, places.get(target) is SHARED):
        return None
    if mode == "forward":
        missing = forward_ready(between(graph, root, target))
        if missing is not None:
            raise UnsupportedError(
                f'mode="forward": node {missing} has no forward rule; use mode="auto"'
            )
    if mode == "mixed" and len(found) == 2:
        raise UnsupportedError(
            'mode="mixed" needs a tensor inside the function through which every path to '
            'what is differentiated by passes, and there is none; use mode="auto"'
        )
    chain, names = _chain(graph, found, places, seeds)
    rates = cost.NOMINAL if short else _rates(work)
    route = cheapest(chain, rates, mode)
    if route is None:
        _refuse(mode, graph, found, chain)
        return None
    # proved again by another way, since a path past a cut would be lost without a sound
    assert all(covered(graph, root, found[k], target) for k in stops(route)), "a path past a cut"
    shared = places.get(target) is SHARED
    plain = cheapest(chain, rates, "reverse")
    whole = cost.seconds(work, seeds.width, n, rates)
    finish = n * seeds.width * chain.widths[-1] * chain.itemsize / rates.fresh
    seconds = plain.seconds if plain is not None else n * whole  # every sample seeded by itself
    return Choice(found, places if shared else None, chain, route, names, seconds, finish)


def _refuse(mode: str, graph: Graph, found: Sequence[Slot], chain: Chain) -> None:
    """No route although there are cuts: neither rows nor columns go through some stage."""
    if mode == "auto":
        return
    for k, stage in enumerate(chain.stages):
        if not stage.reverse and not stage.forward:
            node = forward_ready(between(graph, found[k], found[k + 1]))
            raise UnsupportedError(
                f'mode="{mode}": node {node} has no forward rule, and none that keeps samples '
                'apart on the way to a parameter; use mode="auto"'
            )


def _narrowest(found: tuple[Slot, ...]) -> tuple[Slot, ...]:
    """The ends and the narrowest cuts between them, in their order."""
    if len(found) <= MOST_STAGES + 1:
        return found
    inner = sorted(range(1, len(found) - 1), key=lambda k: (_entries(found[k]), k))
    kept = {0, len(found) - 1, *inner[: MOST_STAGES - 1]}
    return tuple(slot for k, slot in enumerate(found) if k in kept)


def _entries(slot: Slot, shared: bool = False) -> int:
    """Entries of one sample of a tensor of the graph."""
    shape = torch.Size(metas(slot[0])[slot[1]].shape)
    return (shape if shared else shape[1:]).numel()


def _chain(
    graph: Graph, found: tuple[Slot, ...], places: Places, seeds: Seeds
) -> tuple[Chain, tuple[str, ...]]:
    """The graph as the planner sees it, and the names of the nodes of each stage."""
    n, shared = seeds.output[0], places.get(found[-1]) is SHARED
    last = len(found) - 1
    widths = tuple(_entries(slot, shared and k == last) for k, slot in enumerate(found))
    stages, names = [], []
    for k, steps in enumerate(_staged(graph, found)):
        part = Graph(tuple(steps), frozenset({found[k + 1]}))
        crossing = shared and k + 1 == last
        need = memory.need(
            [part], n, [s for s in places if places[s] is SHARED] if crossing else ()
        )
        inner = [s for s in steps if any(s.edges)]
        single = len(inner) == 1 and not crossing
        stages.append(
            Stage(
                work=cost.work(steps, n),
                live=need.live,
                constant=not crossing and all(map(cost.constant, inner)),
                weight=single and weight(inner[0]) is not None,
                forward=forward_ready(part) is None,
                reverse=not crossing or per_sample_ready(part, places),
            )
        )
        kinds = dict.fromkeys(s.name.removesuffix("0").removesuffix("Backward") for s in inner)
        names.append(", ".join(kinds))
    own = seeds.entries.dim() == 2
    size = metas(found[-1][0])[found[-1][1]].dtype.itemsize
    return Chain(widths, tuple(stages), n, seeds.width, own, size), tuple(names)


def _staged(graph: Graph, found: tuple[Slot, ...]) -> list[list[Step]]:
    """The steps of each stage; what comes after a cut in topological order lies below it."""
    stages: list[list[Step]] = []
    starts = set(found[:-1])
    for step in between(graph, found[0], found[-1]).steps:
        if any(slot in starts for slot in slots(step)):
            stages.append([])
        stages[-1].append(step)
    assert len(stages) == len(found) - 1
    return stages
