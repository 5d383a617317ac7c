"""Every module of ``module_db`` in double precision, in evaluation and, where it differs, training.

batch       the module itself on the inputs of torch's tests, first axis the samples. Losses
            that reduce and layers that mix samples must be refused by both engines
parameters  as ``batch``, by every parameter, each sample by itself
frozen, sum, full   as ``batch``, with that ``coupling``
single      the module on one sample, ``batched=False``; the truth is the reference on the loop
loop        the module on one sample, stacked over the samples in a Python loop
lazy        the module before its first call, when its parameters have no shape: refused
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from batchjac.tree import flatten

from .batch import OUTPUT_NUMBERS, Batch, Function, Looped, N, OneSample, Whole, batch, picked
from .databases import module_db, seeded
from .operators import is_random
from .verdict import Case, forward

INPUT_NUMBERS = 400  # samples with more numbers than this only where the module has no smaller
INPUTS_SEEN = 900


def modules() -> list[Any]:
    """Every module that takes double precision."""
    return [info for info in module_db() if torch.float64 in info.dtypes]


@dataclass(frozen=True)
class Setting:
    """A module as torch's tests make it, and its inputs from every seed."""

    info: Any
    training: bool
    inputs: tuple[Any, ...]  # one ModuleInput per seed

    @property
    def arguments(self) -> list[Any]:
        """What ``forward`` gets, from every seed."""
        return [(i.forward_input.args, i.forward_input.kwargs) for i in self.inputs]

    @property
    def numbers(self) -> int:
        """How large the module's input is."""
        tensors = [t for t in flatten(self.arguments[0]).leaves if isinstance(t, Tensor)]
        return sum(t.numel() for t in tensors)

    @property
    def detail(self) -> str:
        """What the module is made with, and its mode."""
        made = self.inputs[0].constructor_input
        words = [*map(_word, made.args), *(f"{k}={_word(v)}" for k, v in made.kwargs.items())]
        return f"({', '.join(words)}) {'training' if self.training else 'evaluation'}"

    def make(self) -> nn.Module:
        """The module, its parameters drawn afresh."""
        made = copy.deepcopy(self.inputs[0].constructor_input)
        module: nn.Module = self.info.module_cls(*made.args, **made.kwargs).to(torch.float64)
        return module.train(self.training)

    def called(self) -> nn.Module:
        """The module after a first call where that gives its parameters their shapes."""
        module = self.make()
        if self.info.is_lazy:
            args, kwargs = self.arguments[0]
            with torch.no_grad():
                module(*args, **kwargs)
        return module


def _word(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else repr(value)[:60]


def cases(info: Any, samples: int) -> Iterator[Case]:
    """At most ``samples`` of the module's inputs in each mode, on every route they allow."""
    for training in (False, True) if info.train_and_eval_differ else (False,):
        for index, setting in enumerate(settings(info, training, samples)):
            yield from _alone(setting)
            yield from _together(setting, thorough=index == 0)
            if info.is_lazy and index == 0:
                yield _lazy(setting)


def _lazy(setting: Setting) -> Case:
    inputs = tuple(setting.arguments[0][0])
    return Case(setting.info.name, "lazy", setting.detail, lambda: (setting.make(), inputs))


def settings(info: Any, training: bool, count: int) -> list[Setting]:
    """``count`` of the module's settings, small ones, spread over all."""
    columns = zip(*(_inputs(info, training, seed) for seed in range(N)), strict=True)
    found = [Setting(info, training, column) for column in columns]
    small = [s for s in found if s.numbers <= INPUT_NUMBERS]
    return picked(small or sorted(found, key=lambda s: s.numbers)[:1], count)


def _inputs(info: Any, training: bool, seed: int) -> list[Any]:
    with seeded(seed):
        made = info.module_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
        )
        return [m for m in made if m.forward_input is not None]


def _alone(setting: Setting) -> Iterator[Case]:
    """The module on one sample."""
    given = batch(setting.arguments)
    if given is None:
        return
    loop = _case(setting, "loop", given, Looped)
    if isinstance(forward(loop), Exception):
        return
    single = _case(setting, "single", given, OneSample, batched=False)
    yield single if is_random(single) else replace(single, truth=loop)
    yield loop


def _together(setting: Setting, thorough: bool) -> Iterator[Case]:
    """The module on a batch."""
    given = _batch(setting)
    if given is None:
        return
    kind = Whole if _needs_words(setting, given) else None
    case = _case(setting, "batch", given, kind)
    if isinstance(forward(case), Exception):
        return
    yield case
    if any(p.is_floating_point() for p in setting.called().parameters()):
        yield _case(setting, "parameters", given, kind, wrt="parameters")
    if thorough:
        for coupling in ("frozen", "sum", "full"):
            yield _case(setting, coupling, given, kind, coupling=coupling)


def _batch(setting: Setting) -> Batch | None:
    """The tensors with samples along their first axis; those of all seeds if it has length 1."""
    tree = flatten(setting.arguments[0])
    tensors = {k: t for k, t in enumerate(tree.leaves) if isinstance(t, Tensor)}
    places = [k for k, t in tensors.items() if t.requires_grad] or list(tensors)
    sizes = {tensors[k].shape[:1] for k in places}
    if sizes == {(1,)}:
        return batch(setting.arguments, torch.cat)
    if len(sizes) != 1 or sizes == {()}:
        return None
    return Batch(tree, tuple(places), tuple(tensors[k].detach() for k in places))


def _needs_words(setting: Setting, given: Batch) -> bool:
    """Whether the module cannot itself be f: bound arguments, or more outputs than we look at."""
    if len(given.places) != len(given.tree.leaves):
        return True
    result = forward(Case("", "", "", lambda: (setting.called(), given.inputs)))
    if isinstance(result, Exception):
        return True
    leaves = [t for t in flatten(result).leaves if isinstance(t, Tensor)]
    return any(math.prod(t.shape[1:]) > OUTPUT_NUMBERS for t in leaves)


def _case(
    setting: Setting, route: str, given: Batch, kind: Function | None, **options: Any
) -> Case:
    def build() -> tuple[Function, Sequence[Tensor]]:
        module = setting.called()
        return (module if kind is None else kind(module, given)), given.inputs

    detail = f"{setting.detail} on ({given.detail})"
    return Case(setting.info.name, route, detail, build, options)
