"""``python -m tests.conformance``: compare everything, write the page, print the counts."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from . import MODULE_SAMPLES, OPERATOR_SAMPLES, report
from .survey import Subject

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"


def main() -> int:
    """Exit status 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--samples", type=int, help="of each subject; more than the page has")
    parser.add_argument("--out", type=Path, default=PAGE, help="where the page goes")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("batchjac").addHandler(logging.NullHandler())
    families = report.operator_subjects(chosen.samples or OPERATOR_SAMPLES, _show)
    layers = report.module_subjects(chosen.samples or MODULE_SAMPLES, _show)
    zoo = report.zoo_subjects(_show)
    chosen.out.write_text(report.page(families, layers, zoo))
    print(report.summary(families, layers, zoo))
    every = [*(s for found in families.values() for s in found), *layers, *zoo]
    return int(any(s.outcomes["wrong"] for s in every))


def _show(subject: Subject) -> None:
    """A dot for what is right, words for what is wrong, as it goes."""
    if subject.outcome != "wrong":
        print(".", end="", file=sys.stderr, flush=True)
        return
    print(f"\nwrong: {subject.name}", file=sys.stderr)
    for verdict in subject.wrong:
        print(f"    {verdict.case}: {verdict.detail}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
