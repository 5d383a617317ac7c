"""Nested tuples, lists, dicts and dataclasses, seen as a list of leaves and a way back."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from batchjac.errors import InputError


@dataclasses.dataclass(frozen=True)
class Tree:
    """The leaves of a nested value in order, where each one sits, and how to put others there.

    Law: ``flatten(v).build(flatten(v).leaves)`` equals ``v``.
    """

    leaves: tuple[Any, ...]
    paths: tuple[str, ...]
    build: Callable[[Sequence[Any]], Any]

    def map(self, change: Callable[[Any], Any]) -> Any:
        """The same nesting with ``change`` applied to every leaf."""
        return self.build([change(leaf) for leaf in self.leaves])


def flatten(value: Any) -> Tree:
    """Take a nested value apart; anything that is no container is a leaf."""
    try:
        return _flatten(value, "", ())
    except RecursionError as error:
        raise InputError(
            "containers are nested too deeply to be taken apart; pass fewer levels"
        ) from error


def _flatten(value: Any, path: str, inside: tuple[int, ...]) -> Tree:
    """The same at ``path``, in the containers of these identities."""
    parts = _children(value)
    if parts is None:
        return Tree((value,), (path,), lambda leaves: leaves[0])
    if id(value) in inside:
        raise InputError(
            f"a {type(value).__name__} contains itself, at {path}; pass or return containers that "
            "end in tensors"
        )
    keys, children, rebuild = parts
    within = (*inside, id(value))
    trees = [_flatten(c, path + k, within) for k, c in zip(keys, children, strict=True)]
    parts_of = [(len(tree.leaves), tree.build) for tree in trees]  # and not the leaves themselves

    def build(leaves: Sequence[Any]) -> Any:
        built, start = [], 0
        for count, part in parts_of:
            built.append(part(leaves[start : start + count]))
            start += count
        return rebuild(built)

    return Tree(
        tuple(leaf for tree in trees for leaf in tree.leaves),
        tuple(p for tree in trees for p in tree.paths),
        build,
    )


_Parts = tuple[list[str], list[Any], Callable[[list[Any]], Any]]


def _children(value: Any) -> _Parts | None:
    """The keys, the children and the rebuilder of a container; None for a leaf."""
    if isinstance(value, Mapping):
        keys = list(value)
        return [f"[{k!r}]" for k in keys], list(value.values()), lambda new: _mapping(value, new)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [f".{k}" for k in value._fields], list(value), lambda new: type(value)(*new)
    if isinstance(value, tuple | list):
        # torch.return_types and torch.Size rebuild from one sequence, as tuple and list do
        kind = type(value)
        return [f"[{k}]" for k in range(len(value))], list(value), lambda new: kind(new)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
        return (
            [f".{k}" for k in names],
            [getattr(value, k) for k in names],
            lambda new: _dataclass(value, names, new),
        )
    return None


def emptied(tree: Tree, leaf: Callable[[Any], Any]) -> Tree:
    """The same nesting with ``leaf`` of each leaf, which keeps nothing else of the old value.

    A container that has to be copied to be built again keeps what it once held.
    """
    made = flatten(tree.map(leaf))
    return Tree(made.leaves, tree.paths, made.build)


def _mapping(old: Mapping[Any, Any], children: list[Any]) -> Any:
    if type(old) is dict:
        return dict(zip(old, children, strict=True))
    try:
        new: Any = copy.copy(old)  # an OrderedDict, a UserDict, a model's own output class
        for key, child in zip(old, children, strict=True):
            new[key] = child
    except TypeError:  # a read-only view
        return dict(zip(old, children, strict=True))
    return new


def _dataclass(old: Any, names: list[str], children: list[Any]) -> Any:
    new = copy.copy(old)
    for name, child in zip(names, children, strict=True):
        object.__setattr__(new, name, child)  # frozen dataclasses too; no __init__ runs
    return new
