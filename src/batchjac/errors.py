"""Every error batchjac raises on purpose.

    BatchjacError
    ├── InputError (ValueError)                what was asked for cannot be, and why
    │   ├── BatchAxisError                     the output has no batch axis, or another batch size
    │   ├── SelectionError (IndexError)        outputs= names an output that does not exist
    │   ├── NameNotFoundError (KeyError)       of= or wrt= names no layer and no parameter
    │   ├── OutError                           out= cannot take the result
    │   └── MismatchError                      inputs of another kind than a plan was made for
    ├── InputTypeError (TypeError)             an argument of the wrong kind
    ├── CouplingError (RuntimeError)           outputs of one sample depend on another sample
    ├── BudgetError (RuntimeError)             max_memory is too small even for one row
    ├── StateError (RuntimeError)              the function did something the walk cannot undo
    ├── LinAlgError (torch.linalg.LinAlgError) a Jacobian has no inverse, or a solution did not come
    └── UnsupportedError (NotImplementedError) not built yet, and what to use instead

An exception raised by the user's own function is not wrapped: it arrives as it was thrown.
"""

import torch
from torch import Tensor


class BatchjacError(Exception):
    """The base of every error on this page."""


class InputError(BatchjacError, ValueError):
    """An argument has a value that cannot be used."""


class BatchAxisError(InputError):
    """The first axis of an output is not the batch axis of the inputs."""


class SelectionError(InputError, IndexError):
    """``outputs=`` asks for an output that the function does not have."""


class NameNotFoundError(InputError, KeyError):
    """``of=`` or ``wrt=`` names neither a layer nor a parameter of the module."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0]) if self.args else ""


class OutError(InputError):
    """``out=`` has another shape, dtype or device than the result, or cannot be written."""


class MismatchError(InputError):
    """Inputs differ in kind from those that a plan was made for; one line for each field."""


class InputTypeError(BatchjacError, TypeError):
    """An argument is of a kind that has no Jacobian here."""


class CouplingError(BatchjacError, RuntimeError):
    """Outputs of one sample depend on another sample, so a per-sample Jacobian does not exist."""


class BudgetError(BatchjacError, RuntimeError):
    """``max_memory`` does not hold the least that the computation needs."""


class StateError(BatchjacError, RuntimeError):
    """The function changed something, or ran in a way, that cannot be followed or undone."""


# torch's stubs do not know its own error
class LinAlgError(BatchjacError, torch.linalg.LinAlgError):  # type: ignore[name-defined,misc]
    """Jacobians of some samples have no answer: singular, not finite, or not converged.

    ``samples`` are their numbers in the batch and ``measures`` what was found for each: condition
    numbers, or residuals. NaN stands for a Jacobian that is not finite.
    """

    def __init__(self, message: str, samples: Tensor, measures: Tensor) -> None:
        super().__init__(message)
        self.samples: list[int] = samples.tolist()
        self.measures: list[float] = measures.tolist()


class UnsupportedError(BatchjacError, NotImplementedError):
    """A documented name whose work is not built yet; the message says what to use instead."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
