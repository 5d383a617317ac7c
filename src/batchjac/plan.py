"""How a question is computed, in a form to print: chunks, engine, proof, kernel of each node."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Plan:
    """What a call did, and what the next one on the same function and shapes will do.

    ``samples`` of one forward and ``rows`` of one walk, of ``batch`` and ``width`` in all;
    ``engine`` is ``"walk"`` or ``"rows"``; ``independence`` says how samples were seen to be apart;
    ``kernels`` maps each kind of node to ``"rule"``, ``"vmap"`` or ``"rows"``.
    """

    samples: int
    batch: int
    rows: int
    width: int
    engine: str
    independence: str
    kernels: Mapping[str, str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernels", MappingProxyType(dict(self.kernels)))

    @property
    def slow(self) -> dict[str, str]:
        """The nodes that have no rule, and the way they took instead."""
        return {name: way for name, way in self.kernels.items() if way != "rule"}

    def __str__(self) -> str:
        lines = [
            f"samples       {self.samples} of {self.batch} in one forward",
            f"rows          {self.rows} of {self.width} in one walk",
            f"engine        {self.engine}",
            f"independence  {self.independence}",
            f"rules         {', '.join(sorted(set(self.kernels) - set(self.slow))) or 'none'}",
        ]
        lines += [f"without rule  {name}: {way}" for name, way in sorted(self.slow.items())]
        return "\n".join(lines)
