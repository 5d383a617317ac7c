"""How a question is computed, in a form to print: chunks, engine, proof, kernel of each node."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from batchjac.route import Chain, Down, Forward, Join, Reverse, Route, Up, Weight, passes


@dataclass(frozen=True)
class Forecast:
    """The route to one target, and what it was predicted to take beside plain reverse.

    ``names`` are the nodes of each stage. ``finish`` is the time to write the result, which is the
    same whichever way it is computed.
    """

    chain: Chain
    route: Route
    names: tuple[str, ...]
    plain: float = field(compare=False)  # seconds, without what is below
    finish: float = field(compare=False)

    @property
    def seconds(self) -> float:
        """Of the route, the result written."""
        return self.route.seconds + self.finish

    def lines(self, taken: bool) -> list[str]:
        """The route in words: each stage with its direction and why, and the cost of it all."""
        plain = f"{_time(self.plain + self.finish)} in plain reverse"
        if not taken:
            if isinstance(self.route, Reverse):
                return [f"plain reverse: predicted {_time(self.seconds)}, and nothing is faster"]
            best = f"{_time(self.seconds)} by the best other way"
            return [f"plain reverse: predicted {_time(self.plain + self.finish)}, {best}"]
        done = passes(self.route, self.chain)
        said = [f"predicted {_time(self.seconds)}, {plain}"]
        said.append(
            f"passes: {done.rows} rows of a stage down, {done.columns} columns up, "
            f"{done.multiply_adds} multiply-adds a sample in joins"
        )
        widths = self.chain.widths
        for k, (stage, why) in enumerate(sorted(self._stages(self.route))):
            assert k == stage
            said.append(f"{widths[k]} <- {widths[k + 1]}  {why}  [{self.names[k]}]")
        for node in self.route:
            if isinstance(node, Join):
                sizes = (
                    self.chain.height(node.upper),
                    widths[node.above.lower],
                    widths[node.lower],
                )
                said.append("joined: {} x {} x {}".format(*sizes))
        return said

    def _stages(self, route: Route) -> Iterator[tuple[int, str]]:
        """Each stage below a route's upper cut, and what is done there."""
        for part in route.parts:
            yield from self._stages(part)
        rows, columns = self.chain.height(route.upper), self.chain.widths[route.lower]
        down = f"reverse: {rows} rows down"
        up = f"forward: {columns} columns up"
        match route:
            case Weight():
                yield route.upper, "its weight: one linear layer"
            case Reverse():
                why = f"{down}, {columns} columns otherwise"
                yield from ((k, why) for k in range(route.upper, route.lower))
            case Forward():
                why = f"{up}, {rows} rows otherwise"
                yield from ((k, why) for k in range(route.upper, route.lower))
            case Down():
                why = f"{down}, which come from above"
                yield from ((k, why) for k in range(route.above.lower, route.lower))
            case Up():
                why = f"{up}, which come from below"
                yield from ((k, why) for k in range(route.upper, route.below.upper))


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


@dataclass(frozen=True)
class Prediction:
    """What a plan will take: from shapes and measured rates, without the function's own forward.

    ``rows`` go down and ``columns`` up, each through one stage or the whole graph; ``bytes`` are
    held at the most; ``naive`` is one backward pass for each output. ``attainable`` is the share of
    the rate that the best kernel of this machine reaches, the writing of the result included.
    """

    rows: int
    columns: int
    multiply_adds: int
    bytes: int
    seconds: float
    naive: float
    attainable: float

    def lines(self) -> list[str]:
        """The same in words."""
        return [
            f"passes        {self.rows} rows down, {self.columns} columns up",
            f"operations    {self.multiply_adds:.3g} multiply-adds",
            f"memory        {self.bytes / (1 << 20):.3g} MiB at the most",
            f"time          {_time(self.seconds)} beside the forward, at "
            f"{self.attainable:.0%} of the attainable limit",
            f"naive         {_time(self.naive)}, one backward pass for each output",
        ]


@dataclass(frozen=True)
class Plan:
    """What a call did, and what the next one on the same function and shapes will do.

    ``samples`` of one forward and ``rows`` of one walk, of ``batch`` and ``width`` in all;
    ``engine`` is ``"walk"``, or ``"rows"``, each by itself through autograd's own; ``independence``
    says how samples were seen to be apart; ``kernels`` maps each kind of node to ``"rule"``,
    ``"vmap"`` or ``"rows"``. ``directions`` says in words how each Jacobian is reached, where more
    than plain reverse was thought of. ``axes`` and ``prediction`` are there when it was made before
    the call, by ``batchjac.plan``; ``mapped``: for a result in memory that the caller brings.
    ``compiled`` says how the walks were computed where they were to be compiled.
    ``chosen`` are the kernels of nodes that have several, one line for each kind and shape; of
    those with a rule, by ``batchjac.plan``.
    """

    samples: int
    batch: int
    rows: int
    width: int
    engine: str
    independence: str
    kernels: Mapping[str, str]
    directions: tuple[str, ...] = ("plain reverse",)
    axes: tuple[str, ...] = ()
    prediction: Prediction | None = None
    mapped: bool = False
    compiled: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernels", MappingProxyType(dict(self.kernels)))

    @property
    def slow(self) -> dict[str, str]:
        """The nodes that have no rule, and the way they took instead."""
        return {name: way for name, way in self.kernels.items() if way != "rule"}

    def __str__(self) -> str:
        lines = [f"axes          {line}" for line in self.axes]
        lines += [
            f"samples       {self.samples} of {self.batch} in one forward",
            f"rows          {self.rows} of {self.width} in one walk",
            f"engine        {self.engine}",
            f"independence  {self.independence}",
            *(f"directions    {line}" for line in self.directions),
            *(f"compiled      {line}" for line in self.compiled),
            f"rules         {', '.join(sorted(set(self.kernels) - set(self.slow))) or 'none'}",
        ]
        lines += [f"kernel        {line}" for line in self.chosen]
        lines += [f"without rule  {name}: {way}" for name, way in sorted(self.slow.items())]
        lines += self.prediction.lines() if self.prediction else []
        return "\n".join(lines)
