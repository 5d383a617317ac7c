"""The packages that only the demo needs, and what to say when one is missing."""

import importlib
import importlib.util
from types import ModuleType

from batchjac.errors import BatchjacError

NEEDED = {
    "numpy": "numpy",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
}
"""Import name: name of the package."""


class MissingExtraError(BatchjacError, ModuleNotFoundError):
    """Packages of the ``demo`` extra are not installed."""


def require() -> None:
    """Raise `MissingExtraError`, naming every missing package and the line that installs them."""
    missing = [name for name in NEEDED if not _installed(name)]
    if missing:
        packages = ", ".join(NEEDED[name] for name in missing)
        raise MissingExtraError(
            f"The demo needs packages that are not installed: {packages}. Install them with\n"
            '    pip install "batchjac[demo]"\n'
            "or, in a clone of the repository, run `make demo`.",
            name=missing[0],
        )


def load(module: str) -> ModuleType:
    """Import `module` of an extra: untyped packages arrive as ``Any``, without an ignore each."""
    return importlib.import_module(module)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # `sys.modules[name] = None`: imports of it are blocked
        return False
