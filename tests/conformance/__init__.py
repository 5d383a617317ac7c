"""Everything torch itself tests, beside the reference: operators, modules, and our own zoo.

``python -m tests.conformance`` compares all of it and writes ``docs/conformance.md``;
``tests/test_conformance.py`` asserts the same in chunks.
"""

# Samples of each operator, and inputs of each module and mode: what fits into three minutes.
OPERATOR_SAMPLES = 2
MODULE_SAMPLES = 4
