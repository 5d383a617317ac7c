"""Reentrant checkpoints, ``torch.utils.checkpoint(..., use_reentrant=True)``.

Their node records nothing of what ran inside: its backward runs the function again and starts a
backward of its own, once for every row. Here the function runs again once, and the rows of all
outputs walk through what that records.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

from batchjac.block import Block
from batchjac.errors import UnsupportedError
from batchjac.graph import Graph, Slot, Step, edge_of, prune

Walk = Callable[[Graph, Mapping[Slot, Block]], dict[Slot, Block]]

_REMEDY = "pass use_reentrant=False to torch.utils.checkpoint"


def is_reentrant(step: Step) -> bool:
    """Whether this is PyTorch's own checkpoint; other libraries have Functions of that name."""
    return getattr(type(step.node), "_forward_cls", None) is checkpoint.CheckpointFunction


def through(
    step: Step, blocks: Sequence[Block | None], outer: frozenset[Slot], walk: Walk
) -> list[Block | None]:
    """The rows of a checkpoint's outputs, walked to its inputs; ``outer`` are the walk's targets.

    Assumes that the function does the same when it runs again, as every checkpoint does.
    """
    if torch.is_grad_enabled():
        raise UnsupportedError(
            "create_graph=True: a reentrant checkpoint cannot be differentiated twice, because it "
            f"records nothing of what runs inside; {_REMEDY}"
        )
    inputs, outputs = _again(step.node)
    seeds: dict[Slot, Block] = {}
    for output, block in zip(outputs, blocks, strict=True):
        if block is not None and isinstance(output, Tensor) and output.requires_grad:
            slot = _slot(output)
            seeds[slot] = seeds[slot].plus(block) if slot in seeds else block
    places = [_slot(x) if x.requires_grad else None for x in inputs]
    roots = [node for node, _ in seeds]
    if prune(roots, list(outer)).steps:
        raise UnsupportedError(
            "what is differentiated by is used inside a reentrant checkpoint, which hides it from "
            f"the recorded graph; {_REMEDY}"
        )
    found = walk(prune(roots, [p for p in places if p is not None]), seeds)
    return [
        None if edge is None or place is None else found.get(place)
        for edge, place in zip(step.edges, places, strict=True)
    ]


def _slot(tensor: Tensor) -> Slot:
    edge = edge_of(tensor)
    return edge.node, edge.output_nr


def _again(node: Any) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Run the checkpointed function again: its tensor inputs, cut off, and its outputs, recorded.

    Source: ``torch.utils.checkpoint.CheckpointFunction.backward``.
    """
    arguments = list(node.inputs)
    tensors = []
    for place, saved in zip(node.tensor_indices, node.saved_tensors, strict=True):
        arguments[place] = saved.detach().requires_grad_(saved.requires_grad)
        tensors.append(arguments[place])
    with _as_it_was(node), torch.enable_grad():
        outputs = node.run_function(*arguments)
    return tensors, outputs if isinstance(outputs, tuple) else (outputs,)


@contextlib.contextmanager
def _as_it_was(node: Any) -> Iterator[None]:
    """The random state and the autocast settings of the forward."""
    kept = node.preserve_rng_state
    devices = node.fwd_devices if kept and node.had_device_in_fwd else []
    kind = node.device_type
    with contextlib.ExitStack() as stack:
        if kept:
            stack.enter_context(torch.random.fork_rng(devices=devices, device_type=kind))
            torch.set_rng_state(node.fwd_cpu_state)
            if node.had_device_in_fwd:
                states = node.fwd_device_states
                checkpoint.set_device_states(devices, states, device_type=kind)
        if torch.amp.is_autocast_available(kind):
            stack.enter_context(torch.amp.autocast(kind, **node.device_autocast_kwargs))
        stack.enter_context(torch.amp.autocast("cpu", **node.cpu_autocast_kwargs))
        yield
