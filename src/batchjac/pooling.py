"""Max pooling in a recorded forward, by comparing slices instead of walking windows.

torch's kernel looks at one window after the other and takes 10 to 15 ns for each, which is two
thirds of the forward of a small convolutional network. Comparing whole strided slices gives the
same values and places at a third of the time. Only the kernel changes: autograd records the node
that it always does, and saves the same places.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_LARGE = 1 << 13  # entries of the input, below which a call costs more than its windows
_WIDEST = 4  # entries of a window; of larger ones torch's kernel is as fast


@contextlib.contextmanager
def quick_pooling() -> Iterator[None]:
    """In this block ``torch.max_pool1d`` and ``max_pool2d`` use the quicker kernel where it fits.

    ``torch.nn.functional`` and the layers call these two by name.
    """
    originals = {name: getattr(torch, name) for name in ("max_pool1d", "max_pool2d")}
    for name, original in originals.items():
        setattr(torch, name, _instead(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def _instead(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def pool(*args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else None
        if not (type(x) is Tensor and _fits(x)):
            return original(*args, **kwargs)
        with _Slices():  # type: ignore[no-untyped-call]  # torch leaves the mode's init untyped
            return original(*args, **kwargs)

    return pool


def _fits(x: Tensor) -> bool:
    return (
        x.requires_grad
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() >= _LARGE
        and x.is_contiguous()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )


class _Slices(TorchDispatchMode):
    """Below autograd: the pooling operator by slices, every other as it is."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten.max_pool2d_with_indices.default and not kwargs:
            found = _pooled(*args)
            if found is not None:
                return found
        return function(*args, **(kwargs or {}))


def _pooled(
    x: Tensor, kernel: list[int], stride: Any = (), padding: Any = 0, *others: Any
) -> tuple[Tensor, Tensor] | None:
    """Values and places, or None where windows overlap, are padded, dilated, cut off or large."""
    if len(kernel) != 2 or list(stride or kernel) != list(kernel):
        return None
    plain = (padding, *others) in (([0, 0],), ([0, 0], [1, 1]), ([0, 0], [1, 1], False))
    if not (plain or (padding, *others) == (0,)) or not 1 < kernel[0] * kernel[1] <= _WIDEST:
        return None
    values, places = slices(x, kernel[0], kernel[1])
    # a nan wins its window and is not seen by comparing; their sum shows whether there is one
    return None if values.sum().isnan() else (values, places)


def slices(x: Tensor, high: int, wide: int) -> tuple[Tensor, Tensor]:
    """The largest entry of each ``high x wide`` window of ``x [..., h, w]``, and its flat place.

    Slice ``p`` holds entry ``p`` of every window, so that the first of equal entries wins.
    """
    height, width = x.shape[-2] // high, x.shape[-1] // wide
    parts = [
        x[..., p // wide : height * high : high, p % wide : width * wide : wide]
        for p in range(high * wide)
    ]
    values, winner = parts[0], torch.zeros((), dtype=torch.uint8)
    for p, part in enumerate(parts[1:], 1):
        later = torch.gt(part, values).view(torch.uint8)
        values = torch.maximum(values, part)
        winner = later if p == 1 else torch.maximum(winner, later.mul_(p))
    rows = torch.arange(0, height * high, high).unsqueeze(1) * x.shape[-1]
    corner = rows + torch.arange(0, width * wide, wide)
    if high == 1:
        return values, corner + winner
    down, right = winner // wide, winner % wide
    return values, torch.add(corner, right).add_(down, alpha=x.shape[-1])
