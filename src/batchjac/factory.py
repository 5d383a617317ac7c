"""A model named on the command line, and inputs of given shapes without values."""

import copy
import importlib
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from batchjac.api import plan
from batchjac.errors import BatchjacError
from batchjac.planning import Planned


class FactoryError(ValueError):
    """What was named cannot be found, or is no model."""


def planned(
    factory: str,
    shapes: Sequence[str],
    samples: int,
    *,
    outputs: int | None = None,
    mode: str = "auto",
    memory: str | None = None,
) -> Planned:
    """The plan of ``module:name`` at inputs ``[samples, *shape]``, on the meta device.

    A function that looks at values cannot run there; then on zeros, which is one forward.
    """
    model = made(factory)
    inputs = tuple(_input(shape, samples) for shape in shapes)
    try:
        empty = tuple(x.to("meta") for x in inputs)
        return _plan(copy.deepcopy(model).to("meta"), empty, outputs, mode, memory)
    except BatchjacError:
        raise
    except Exception:  # whatever the model's own code makes of tensors without values
        pass
    try:
        return _plan(model, inputs, outputs, mode, memory)
    except BatchjacError:
        raise
    except Exception as error:  # the same of zeros: the message is the model's own
        given = ", ".join(str(list(x.shape)) for x in inputs)
        raise FactoryError(f"the model fails on inputs {given}: {error}") from error


def _plan(
    model: nn.Module, inputs: tuple[Tensor, ...], outputs: int | None, mode: str, memory: str | None
) -> Planned:
    given = inputs[0] if len(inputs) == 1 else inputs
    return plan(model, given, outputs=outputs, mode=mode, max_memory=memory)


def made(factory: str) -> nn.Module:
    """The model that ``module:name`` is or makes, in evaluation mode."""
    path, _, name = factory.partition(":")
    if not path or not name:
        raise FactoryError(f"{factory!r} must be module:name, such as models:lenet5")
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules beside the user, as `python -m` finds them
    try:
        found = importlib.import_module(path)
        for part in name.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        raise FactoryError(f"no module {error.name!r}; give module:name") from error
    except AttributeError as error:
        raise FactoryError(f"module {path!r} has no {name!r}") from error
    model = found if isinstance(found, nn.Module) else found() if callable(found) else found
    if not isinstance(model, nn.Module):
        raise FactoryError(f"{factory} gives {type(model).__name__}, and must give an nn.Module")
    return model.eval()


def _input(text: str, samples: int) -> Tensor:
    """Zeros ``[samples, *shape]`` from text such as ``1,224`` or ``16:int64``."""
    shape, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    try:
        sizes = [int(n) for n in shape.split(",") if n]
    except ValueError as error:
        raise FactoryError(f"--input {text!r} must be numbers such as 1,224") from error
    if not isinstance(dtype, torch.dtype):
        raise FactoryError(f"--input {text!r}: torch has no dtype {kind!r}")
    return torch.zeros(samples, *sizes, dtype=dtype)
