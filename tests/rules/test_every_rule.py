"""No rule without a case: every registered node name is the name of a case beside it."""

from __future__ import annotations

import importlib
from pathlib import Path

from batchjac.rules import registry

# Batch norm with frozen statistics is no node of torch's; test_norm builds it from one in training.
# The other names exist on CUDA devices only; test_norm and test_attention have stand-ins for them.
ELSEWHERE = {
    "NativeBatchNormBackward0:frozen",
    "NativeBatchNormLegitBackward0:frozen",
    "NativeBatchNormLegitBackward1:frozen",
    "CudnnBatchNormBackward0",
    "CudnnBatchNormBackward0:frozen",
    "ScaledDotProductCudnnAttentionBackward0",
    "ScaledDotProductEfficientAttentionBackward0",
    "ScaledDotProductFlashAttentionBackward0",
}


def names_with_a_case() -> set[str]:
    here = Path(__file__)
    modules = [
        importlib.import_module(f"tests.rules.{path.stem}")
        for path in sorted(here.parent.glob("test_*.py"))
        if path != here
    ]
    return {case.name for module in modules for case in module.CASES}


def test_every_rule_has_a_case():
    assert sorted(set(registry.names()) - names_with_a_case() - ELSEWHERE) == []


def test_every_case_has_a_rule():
    assert sorted((names_with_a_case() | ELSEWHERE) - set(registry.names())) == []
