"""A module and all below it, with their tensors, in the order in which torch names them.

Law: the same as ``named_modules()``, ``named_parameters()`` and ``named_buffers()``. Torch's own go
through one generator for each level of nesting, and every call asks several times; they are asked
where a module has methods of its own.
"""

from collections.abc import Mapping

from torch import Tensor, nn

Named = list[tuple[str, Tensor]]
_GENERIC = nn.Module


def modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module once, by the first of its names; its own is empty."""
    found: list[tuple[str, nn.Module]] = []
    if _gather("", module, found, set()):
        return found
    return list(module.named_modules())


def _gather(
    name: str, module: nn.Module, found: list[tuple[str, nn.Module]], known: set[int]
) -> bool:
    """Add a module and those below; False where one names them in its own way."""
    if type(module).named_modules is not _GENERIC.named_modules:
        return False
    known.add(id(module))
    found.append((name, module))
    for key, child in module._modules.items():
        if child is not None and id(child) not in known:
            below = f"{name}.{key}" if name else key
            if not _gather(below, child, found, known):
                return False
    return True


def tensors(module: nn.Module) -> tuple[Named, Named]:
    """The parameters and the buffers, each once, by the first of its names."""
    if not _plain(type(module)):
        return list(module.named_parameters()), list(module.named_buffers())
    parameters: Named = []
    buffers: Named = []
    known: set[int] = set()
    every = modules(module)
    for name, child in every:
        if child._parameters:
            _add(parameters, name, child._parameters, known)
    known.clear()  # what is both is in both
    for name, child in every:
        if child._buffers:
            _add(buffers, name, child._buffers, known)
    return parameters, buffers


def parameters(module: nn.Module) -> list[Tensor]:
    """The parameters, each once."""
    kind = type(module)
    if not _plain(kind) or kind.parameters is not _GENERIC.parameters:
        return list(module.parameters())
    found = {id(p): p for _, child in modules(module) for p in child._parameters.values()}
    return [p for p in found.values() if p is not None]


def _plain(kind: type[nn.Module]) -> bool:
    """Whether tensors are named as torch does."""
    return (
        kind.named_parameters is _GENERIC.named_parameters
        and kind.named_buffers is _GENERIC.named_buffers
        and kind._named_members is _GENERIC._named_members
    )


def _add(found: Named, name: str, table: Mapping[str, Tensor | None], known: set[int]) -> None:
    for key, tensor in table.items():
        if tensor is not None and id(tensor) not in known:
            known.add(id(tensor))
            found.append((f"{name}.{key}" if name else key, tensor))
