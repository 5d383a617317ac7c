"""The main job: two small networks on data one can judge, and all their Jacobians.

`run` needs the packages of the ``demo`` extra; importing this package does not.
"""

from batchjac.demo.main import run

__all__ = ["run"]
