"""Rules for graph nodes; importing this package registers them all."""

from batchjac.rules import advanced as advanced
from batchjac.rules import arithmetic as arithmetic
from batchjac.rules import attention as attention
from batchjac.rules import conv as conv
from batchjac.rules import index as index
from batchjac.rules import linear as linear
from batchjac.rules import norm as norm
from batchjac.rules import parts as parts
from batchjac.rules import parts_forward as parts_forward
from batchjac.rules import pointwise as pointwise
from batchjac.rules import pool as pool
from batchjac.rules import reduce as reduce
from batchjac.rules import shape as shape
from batchjac.rules import softmax as softmax
from batchjac.rules import spatial as spatial
