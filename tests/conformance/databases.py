"""Torch's own databases of operators and modules, imported late and without their side effects.

Importing them takes seconds, reads ``sys.argv`` and freezes torch's backend flags for the whole
process. So it happens on first use, with the arguments hidden and the flags free again.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@functools.cache
def op_db() -> list[Any]:
    """Every operator torch tests, with makers of sample inputs."""
    with _quietly():
        from torch.testing._internal.common_methods_invocations import op_db
    return list(op_db)


@functools.cache
def module_db() -> list[Any]:
    """Every module torch tests, with makers of constructor and forward inputs."""
    with _quietly():
        from torch.testing._internal.common_modules import module_db
    return list(module_db)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    arguments = sys.argv
    sys.argv = arguments[:1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.argv = arguments
        # what torch.backends.disable_global_flags() took away
        setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Every random number inside starts at ``seed``; outside, all go on as if nothing had been."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
