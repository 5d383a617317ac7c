"""In which directions to go: the dynamic programme over the stages between cuts, in seconds.

With ``w`` the width of a cut, stages numbered from the output down, and ``J(a, b)`` the Jacobian of
cut ``a`` by cut ``b`` below it::

    best(a, b) = call                                         one linear layer: its weight
               | down(w_a, a, b)                              reverse: the identity pushed down
               | up(w_b, a, b)                                forward: the identity pushed up
               | best(a, k) + best(k, b) + w_a * w_k * w_b    two Jacobians joined at cut k
               | best(a, k) + down(w_a, k, b)                 the rows of the upper pushed down
               | best(k, b) + up(w_b, a, k)                   the columns of the lower pushed up

At the top ``w_0`` is the number of rows that are asked for wherever rows are what is computed.
Integers and rates go in, a tree of integers comes out: no tensor is seen here.

Source: Naumann, matrix-free Jacobian chaining, arXiv 2003.05755 and 2406.11862.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from batchjac.cost import Rates, Work, joined, read, seconds

# A route through no cut is taken where the best other one gains less than what is not counted.
SIMPLER = 1.1


@dataclass(frozen=True)
class Stage:
    """What lies between a cut and the next.

    ``live`` bytes of blocks for one row of one sample at a time, ``widest`` of the largest of them.

    ``constant``: its Jacobian is the same for all samples. ``weight``: it is one linear layer,
    whose Jacobian is there. ``forward`` and ``reverse``: its nodes can push tangents up, rows down.
    """

    work: Work
    live: int = 0
    widest: int = 0
    constant: bool = False
    weight: bool = False
    forward: bool = True
    reverse: bool = True


@dataclass(frozen=True)
class Chain:
    """A graph as the planner sees it: ``widths`` of the cuts, and a stage between each two.

    ``rows`` of the output are asked for; ``own``: each sample has rows of its own.
    """

    widths: tuple[int, ...]
    stages: tuple[Stage, ...]
    samples: int
    rows: int
    own: bool = False
    itemsize: int = 4

    def height(self, a: int) -> int:
        """How many rows the Jacobian of cut ``a`` has."""
        return self.rows if a == 0 else self.widths[a]

    def shared(self, a: int, b: int) -> bool:
        """Whether the Jacobian of cut ``a`` by cut ``b`` is the same for all samples."""
        return all(s.constant for s in self.stages[a:b]) and not (self.own and a == 0)


@dataclass(frozen=True)
class Route:
    """A way to the Jacobian of cut ``upper`` by cut ``lower``; ``seconds`` with all its parts."""

    upper: int
    lower: int
    seconds: float = field(compare=False)

    @property
    def parts(self) -> "tuple[Route, ...]":
        """What is computed before."""
        return ()

    def __iter__(self) -> "Iterator[Route]":
        """This and all that is computed before it."""
        for part in self.parts:
            yield from part
        yield self


@dataclass(frozen=True)
class Weight(Route):
    """One linear layer: nothing to compute."""


@dataclass(frozen=True)
class Reverse(Route):
    """The identity of the upper cut pushed down."""


@dataclass(frozen=True)
class Forward(Route):
    """The identity of the lower cut pushed up."""


@dataclass(frozen=True)
class Join(Route):
    """Two Jacobians multiplied at a cut."""

    above: Route
    below: Route

    @property
    def parts(self) -> tuple[Route, ...]:
        return (self.above, self.below)


@dataclass(frozen=True)
class Down(Route):
    """The rows of an upper Jacobian pushed on down."""

    above: Route

    @property
    def parts(self) -> tuple[Route, ...]:
        return (self.above,)


@dataclass(frozen=True)
class Up(Route):
    """The columns of a lower Jacobian pushed on up."""

    below: Route

    @property
    def parts(self) -> tuple[Route, ...]:
        return (self.below,)


@dataclass(frozen=True)
class Passes:
    """What a route does: rows and columns times the stages each is pushed through, and products."""

    rows: int
    columns: int
    multiply_adds: int  # of the joins, for one sample


def passes(route: Route, chain: Chain) -> Passes:
    """What following the route takes; the executor's own counts must come out the same."""
    rows = columns = products = 0
    for node in route:
        match node:
            case Reverse():
                rows += chain.height(node.upper) * (node.lower - node.upper)
            case Down():
                rows += chain.height(node.upper) * (node.lower - node.above.lower)
            case Forward():
                columns += chain.widths[node.lower] * (node.lower - node.upper)
            case Up():
                columns += chain.widths[node.lower] * (node.below.upper - node.upper)
            case Join():
                inner = chain.widths[node.above.lower]
                products += chain.height(node.upper) * inner * chain.widths[node.lower]
    return Passes(rows, columns, products)


def stops(route: Route) -> set[int]:
    """The cuts inside that the route stops at, and that every path must therefore pass."""
    ends = {end for node in route for end in (node.upper, node.lower)}
    return ends - {route.upper, route.lower}


@dataclass(frozen=True)
class Held:
    """Bytes for one sample: ``kept`` all the while, and ``live`` for each row or column at a time.

    ``widest`` is the largest block, and ``units`` rows or columns are what the longest step has.
    """

    kept: int
    live: int
    widest: int
    units: int


def span(route: Route) -> range:
    """The stages that this step alone pushes something through."""
    match route:
        case Reverse() | Forward():
            return range(route.upper, route.lower)
        case Down():
            return range(route.above.lower, route.lower)
        case Up():
            return range(route.upper, route.below.upper)
    return range(0)


def _passed(route: Route, chain: Chain) -> tuple[Stage, ...]:
    return tuple(chain.stages[k] for k in span(route))


def _result(route: Route, chain: Chain) -> int:
    """Bytes of one row, or of one column where columns are what is pushed."""
    end = route.upper if isinstance(route, Forward | Up) else route.lower
    return max(1, chain.widths[end] * chain.itemsize)


def live(route: Route, chain: Chain) -> int:
    """Bytes for one row or column of one sample while this step is computed."""
    return max([2 * _result(route, chain), *(s.live for s in _passed(route, chain))])


def held(route: Route, chain: Chain) -> Held:
    """What following the route takes beside the result."""
    kept, most, widest, units = 0, 1, 1, 1
    for node in route:
        rows, columns = chain.height(node.upper), chain.widths[node.lower]
        if node is not route and not isinstance(node, Weight):
            kept += 2 * rows * columns * chain.itemsize  # its pieces, and they together
        most = max(most, live(node, chain))
        widest = max([widest, _result(node, chain), *(s.widest for s in _passed(node, chain))])
        units = max(units, columns if isinstance(node, Forward | Up) else rows)
    return Held(kept, most, widest, units)


class Prices:
    """Seconds of every step that a route can take, each stage priced once for a number of rows."""

    def __init__(self, chain: Chain, rates: Rates) -> None:
        self.chain = chain
        self.rates = rates
        self._sums: dict[tuple[int, int, bool], list[float]] = {}
        self._free: dict[tuple[int, bool], int] = {}

    def _prefix(self, rows: int, samples: int, up: bool) -> list[float]:
        """Seconds of all stages above each cut."""
        key = (rows, samples, up)
        if key not in self._sums:
            sums = [0.0]
            for stage in self.chain.stages:
                sums.append(sums[-1] + seconds(stage.work, rows, samples, self.rates, up))
            self._sums[key] = sums
        return self._sums[key]

    def down(self, a: int, start: int, end: int) -> float:
        """The rows of ``J(a, start)``, pushed on to cut ``end``; ``start == a`` is the identity."""
        rows, turn = self.chain.height(a), start
        if self.chain.shared(a, start):
            while turn < end and self.chain.stages[turn].constant:
                turn += 1
        once = self._prefix(rows, 1, False)
        each = self._prefix(rows, self.chain.samples, False)
        return once[turn] - once[start] + each[end] - each[turn]

    def up(self, b: int, start: int, end: int) -> float:
        """The columns of ``J(start, b)``, pushed on to cut ``end`` above it."""
        columns, turn = self.chain.widths[b], start
        if start == b or all(s.constant for s in self.chain.stages[start:b]):
            while turn > end and self.chain.stages[turn - 1].constant:
                turn -= 1
        once = self._prefix(columns, 1, True)
        each = self._prefix(columns, self.chain.samples, True)
        return once[start] - once[turn] + each[turn] - each[end]

    def join(self, a: int, k: int, b: int) -> float:
        """The product of ``J(a, k)`` and ``J(k, b)``."""
        chain = self.chain
        shared = chain.shared(a, k) + chain.shared(k, b)
        rows, inner, columns = chain.height(a), chain.widths[k], chain.widths[b]
        return joined(rows, inner, columns, chain.samples, shared, chain.itemsize, self.rates)


def pure(chain: Chain, prices: Prices, a: int, b: int) -> list[Route]:
    """The ways from one cut to another that stop at none between them."""
    found: list[Route] = []
    stages = chain.stages[a:b]
    if all(s.reverse for s in stages):
        found.append(Reverse(a, b, prices.down(a, a, b)))
    if all(s.forward for s in stages):
        found.append(Forward(a, b, prices.up(b, b, a)))
    if b == a + 1 and stages[0].weight:
        found.append(Weight(a, b, read(prices.rates)))
    return found


Table = dict[tuple[int, int], Route]


def _cheapest(routes: Sequence[Route]) -> Route | None:
    return min(routes, key=lambda r: r.seconds, default=None)


def _mixes(chain: Chain, prices: Prices, a: int, b: int, best: Table, joins: Table) -> list[Route]:
    """The ways from one cut to another that stop on the way and join two Jacobians somewhere."""
    found: list[Route] = []
    for k in range(a + 1, b):
        above, below = best.get((a, k)), best.get((k, b))
        if above is not None and below is not None:
            total = above.seconds + below.seconds + prices.join(a, k, b)
            found.append(Join(a, b, total, above, below))
        found += _pushes(chain, prices, a, b, k, joins)
    return found


def _pushes(chain: Chain, prices: Prices, a: int, b: int, k: int, table: Table) -> Iterator[Route]:
    """What a table holds to or from cut ``k``, its rows pushed down or its columns up."""
    above, below = table.get((a, k)), table.get((k, b))
    if above is not None and all(s.reverse for s in chain.stages[k:b]):
        yield Down(a, b, above.seconds + prices.down(a, k, b), above)
    if below is not None and all(s.forward for s in chain.stages[a:k]):
        yield Up(a, b, below.seconds + prices.up(b, k, a), below)


@lru_cache(maxsize=256)
def cheapest(chain: Chain, rates: Rates, mode: str) -> Route | None:
    """The fastest route that ``mode`` allows; None where there is none.

    ``"reverse"`` and ``"forward"`` stop at no cut, ``"mixed"`` joins two Jacobians at one cut at
    least, ``"auto"`` is the best of all.
    Cost: cubic in the number of cuts.
    """
    prices, last = Prices(chain, rates), len(chain.stages)
    if mode in ("reverse", "forward"):
        kind = Reverse if mode == "reverse" else Forward
        return _cheapest([r for r in pure(chain, prices, 0, last) if type(r) is kind])
    best: Table = {}
    joins: Table = {}
    for span in range(1, last + 1):
        for a in range(last - span + 1):
            b = a + span
            mixed = _cheapest(_mixes(chain, prices, a, b, best, joins))
            if mixed is not None:
                joins[a, b] = mixed
            routes = pure(chain, prices, a, b) + ([] if mixed is None else [mixed])
            for k in range(a + 1, b):
                routes += _pushes(chain, prices, a, b, k, best)
            found = _cheapest(routes)
            if found is not None:
                best[a, b] = found
    if mode == "mixed":
        return joins.get((0, last))
    simple, found = _cheapest(pure(chain, prices, 0, last)), best.get((0, last))
    if simple is not None and found is not None and simple.seconds <= SIMPLER * found.seconds:
        return simple
    return found
