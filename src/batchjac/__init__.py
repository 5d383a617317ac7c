"""Every sample's own Jacobian, from one forward and one walk over the recorded graph."""

from batchjac import errors as errors
from batchjac import linalg as linalg
from batchjac.api import jacobian as jacobian
from batchjac.api import plan as plan
from batchjac.api import value_and_jacobian as value_and_jacobian
from batchjac.lazy import operator as operator

__version__ = "0.1.0"

__all__ = ["errors", "jacobian", "linalg", "operator", "plan", "value_and_jacobian"]
