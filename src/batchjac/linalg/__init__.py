"""Inverses, solutions, determinants and spectra of the Jacobian of every sample, differentiable.

Every function takes a function and its inputs, with the options of ``batchjac.jacobian``, or given
Jacobians ``[N, o, i]``. ``trace``, ``logdet`` and ``solve`` with ``method="gmres"`` or ``"cgls"``
take products with them alone.
"""

from batchjac.linalg.estimate import Estimate as Estimate
from batchjac.linalg.estimate import logdet as logdet
from batchjac.linalg.estimate import trace as trace
from batchjac.linalg.inverses import inverse as inverse
from batchjac.linalg.inverses import pinv as pinv
from batchjac.linalg.solutions import lstsq as lstsq
from batchjac.linalg.solutions import solve as solve
from batchjac.linalg.spectrum import SlogDet as SlogDet
from batchjac.linalg.spectrum import condition as condition
from batchjac.linalg.spectrum import slogdet as slogdet
from batchjac.linalg.spectrum import svdvals as svdvals
