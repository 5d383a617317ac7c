"""A zoo of small architectures, each a case that the engines must get right.

Every module of this package holds one family. A case is a builder that returns a function and its
inputs, seeded and small, in float64 unless it is about another precision. The names below are what
tests parametrise over.
"""

from .registry import CASES, LAWS, Case, case, seeded

__all__ = ["CASES", "LAWS", "Case", "case", "seeded"]

from . import (  # noqa: F401  (importing a family registers its cases)
    attention,
    callables,
    compiled,
    convolutional,
    coupling,
    effects,
    feedforward,
    functions,
    functions_odd,
    graphs,
    hooks,
    inplace,
    kinks,
    mathematics,
    memory,
    mixing,
    normalisation,
    pooling,
    precision,
    probability,
    recurrent,
    routing,
    sharing,
    structures,
    transforms,
)
