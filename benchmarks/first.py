"""The walk beside the five ways of the seeds, in turns: ``python -m benchmarks.first``.

The same suite, cases and ways as ``python -m benchmarks``, narrowed to what the seeds used: the row
loop of seed 2, ``functional.jacobian`` with the diagonal taken (seeds 1 and 4), the loop over
samples of seed 3, the sum trick of seed 5, and ``vmap(jacrev)`` of its last answer.
"""

import sys

from benchmarks.__main__ import main

if __name__ == "__main__":
    main(["--seeds", *sys.argv[1:]])
