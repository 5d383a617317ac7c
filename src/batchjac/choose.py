"""From a recorded graph to the route of each Jacobian: what the planner is told, and its answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import get_num_threads as threads

from batchjac import cost, memory
from batchjac.answer import Part
from batchjac.cost import NOMINAL, Rates
from batchjac.cuts import Places, between, covered, cuts, slots
from batchjac.engines.forward import forward_ready
from batchjac.engines.mixed import weight
from batchjac.engines.sweep import per_sample_ready
from batchjac.errors import UnsupportedError
from batchjac.graph import Graph, Slot, Step, metas, prune
from batchjac.plan import Forecast
from batchjac.route import Chain, Route, Stage, cheapest, stops
from batchjac.samples import SHARED
from batchjac.seeds import Seeds

# A route must promise this much more speed than plain reverse, whose kernels are known best.
MARGIN = 1.3
# So few rows, or so short a time, and looking for a better route costs more than it can gain.
FEW_ROWS = 4
SHORT = 1e-3  # seconds
MOST_REMEMBERED = 10_000
MOST_STAGES = 16  # the programme is cubic; the narrowest cuts are kept


@dataclass(frozen=True)
class Target:
    """What is differentiated by: its place in the graph, and whether all samples share it."""

    slot: Slot
    shared: bool


@dataclass(frozen=True)
class Choice:
    """The route to one target and what it was chosen from; ``taken`` unless plain reverse is."""

    cuts: tuple[Slot, ...]
    places: Places | None  # of a target that all samples share
    forecast: Forecast
    taken: bool

    @property
    def route(self) -> Route:
        """The route that was chosen."""
        return self.forecast.route

    @property
    def chain(self) -> Chain:
        """What it was chosen from."""
        return self.forecast.chain


_declined: set[int] = set()


def decline(choice: Choice) -> None:
    """Remember that a rule on this route declined, so that it is not tried again."""
    if len(_declined) < MOST_REMEMBERED:
        _declined.add(hash(choice.forecast))


def choices(
    graph: Graph,
    root: Slot,
    targets: Mapping[Part, Target],
    places: Places,
    seeds: Seeds,
    mode: str,
) -> dict[Part, Choice]:
    """For each target that a route was looked for, the best one, and whether it is to be taken."""
    if not seeds.width or (mode == "auto" and seeds.width <= FEW_ROWS):
        return {}
    targets = {part: t for part, t in targets.items() if _entries(t.slot, t.shared)}
    if mode != "auto":
        return _choices(graph, root, targets, places, seeds, mode)
    key = question(graph, tuple(targets), seeds)
    if key not in _left:
        found = _choices(graph, root, targets, places, seeds, mode)
        if any(choice.taken for choice in found.values()):
            return found
        if len(_left) >= MOST_REMEMBERED:
            _left.clear()
        _left[key] = {part: choice.forecast for part, choice in found.items()}
    return {part: Choice((), None, forecast, False) for part, forecast in _left[key].items()}


# Questions that were left to plain reverse: to find that out again would cost small calls a tenth.
_left: dict[int, dict[Part, Forecast]] = {}


def question(graph: Graph, parts: tuple[Part, ...], seeds: Seeds) -> int:
    """What a plan depends on, but for how the nodes are wired: an old answer is at worst slow."""
    steps = graph.form.fact(
        "question", lambda: hash(tuple((step.name, step.shape) for step in graph.steps))
    )
    return hash((steps, parts, seeds.width, seeds.output, threads()))


def _choices(
    graph: Graph,
    root: Slot,
    targets: Mapping[Part, Target],
    places: Places,
    seeds: Seeds,
    mode: str,
) -> dict[Part, Choice]:
    """The same, found out anew."""
    n, width = seeds.output[0], seeds.width
    work = cost.work(graph.steps, n)
    short = cost.seconds(work, width, n, cost.NOMINAL) < SHORT
    if mode == "auto" and short:
        return {}
    # another device has not been measured: there the proportions of a CPU are assumed
    known = not short and seeds.device.type == "cpu"
    rates = cost.rates(threads(), work.convolutions + work.thin > 0) if known else NOMINAL
    found = {}
    for part, target in targets.items():
        alone = graph if len(targets) == 1 else between(graph, root, target.slot)
        choice = _choose(alone, root, target, places, seeds, mode, rates)
        if choice is not None:
            found[part] = choice
    if mode == "mixed" and targets and not found:
        raise UnsupportedError(
            'mode="mixed" needs a tensor inside the function through which every path to '
            'what is differentiated by passes, and there is none; use mode="auto"'
        )
    taken = [c.forecast for c in found.values() if c.taken]
    if mode == "auto" and taken and len(targets) > 1:
        # one plain walk serves all other targets, and ends at the deepest of them
        walk = cost.seconds(work, width, n, rates)
        others = [
            t.slot for part, t in targets.items() if part not in found or not found[part].taken
        ]
        rest = cost.seconds(cost.work(prune([root[0]], others).steps, n), width, n, rates)
        written = sum(f.finish for f in taken)
        if MARGIN * (rest + sum(f.route.seconds for f in taken) + written) >= walk + written:
            found = {part: replace(c, taken=False) for part, c in found.items()}
    return found


def _choose(
    graph: Graph,
    root: Slot,
    target: Target,
    places: Places,
    seeds: Seeds,
    mode: str,
    rates: Rates,
) -> Choice | None:
    """The best route from ``root`` to ``target`` that ``mode`` allows; None where there is none."""
    found = _narrowest(cuts(graph, root, target.slot, places))
    if len(found) < 2:
        return None
    if mode == "forward":
        missing = forward_ready(between(graph, root, target.slot))
        if missing is not None:
            raise UnsupportedError(
                f'mode="forward": node {missing} has no forward rule; use mode="auto"'
            )
    chain, names = _chain(graph, found, target.shared, places, seeds)
    route, plain = cheapest(chain, rates, mode), cheapest(chain, rates, "reverse")
    if route is None:
        _refuse(mode, graph, found, chain)
        return None
    # proved again by another way, since a path past a cut would be lost without a sound
    passed = all(covered(graph, root, found[k], target.slot) for k in stops(route))
    assert passed, "a path past a cut"
    n, width = seeds.output[0], seeds.width
    # where samples cannot be kept apart, every one is seeded by itself
    apart = n * cost.seconds(cost.work(graph.steps, n), width, n, rates)
    forecast = Forecast(
        chain, route, names,
        plain=apart if plain is None else plain.seconds,
        finish=cost.written(n * width * chain.widths[-1] * chain.itemsize, rates),
    )  # fmt: skip
    gains = MARGIN * forecast.seconds < forecast.plain + forecast.finish
    taken = mode != "auto" or (gains and hash(forecast) not in _declined)
    return Choice(found, places if target.shared else None, forecast, taken)


def _refuse(mode: str, graph: Graph, found: Sequence[Slot], chain: Chain) -> None:
    """No route: neither rows nor columns go through some stage, as ``mode`` must be told."""
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
    graph: Graph, found: tuple[Slot, ...], shared: bool, places: Places, seeds: Seeds
) -> tuple[Chain, tuple[str, ...]]:
    """The graph as the planner sees it, and the names of the nodes of each stage."""
    n, last = seeds.output[0], len(found) - 1
    widths = tuple(_entries(slot, shared and k == last) for k, slot in enumerate(found))
    stages, names = [], []
    for k, steps in enumerate(staged(graph, found)):
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
                widest=need.widest,
                constant=not crossing and all(map(cost.constant, inner)),
                weight=single and weight(inner[0]) is not None,
                forward=forward_ready(part) is None,
                reverse=not crossing
                or (places.get(found[-1]) is SHARED and per_sample_ready(part, places)),
            )
        )
        kinds = dict.fromkeys(s.name.removesuffix("0").removesuffix("Backward") for s in inner)
        names.append(", ".join(kinds))
    own = seeds.entries.dim() == 2
    size = metas(found[-1][0])[found[-1][1]].dtype.itemsize
    return Chain(widths, tuple(stages), n, seeds.width, own, size), tuple(names)


def staged(graph: Graph, found: tuple[Slot, ...]) -> list[list[Step]]:
    """The steps of each stage; what comes after a cut in topological order lies below it."""
    stages: list[list[Step]] = []
    starts = set(found[:-1])
    for step in between(graph, found[0], found[-1]).steps:
        if any(slot in starts for slot in slots(step)):
            stages.append([])
        stages[-1].append(step)
    assert len(stages) == len(found) - 1
    return stages
