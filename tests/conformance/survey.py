"""All cases of one operator, module or group of the zoo, counted."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from .verdict import Case, Outcome, Verdict, judge


@dataclass
class Subject:
    """What came of every case of one subject."""

    name: str
    samples: set[str] = field(default_factory=set)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    routes: Counter[str] = field(default_factory=Counter)  # those that were right
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[Verdict] = field(default_factory=list)
    slow: dict[str, str] = field(default_factory=dict)

    @property
    def outcome(self) -> Outcome:
        """Wrong if anything was, else right if anything was."""
        order: tuple[Outcome, ...] = ("wrong", "right", "documented error")
        return next((o for o in order if self.outcomes[o]), "torch cannot")

    def add(self, verdict: Verdict) -> None:
        """Count one more."""
        self.samples.add(verdict.case.detail)
        self.outcomes[verdict.outcome] += 1
        if verdict.outcome == "right":
            self.routes[verdict.case.route] += 1
        if verdict.error:
            self.refused[verdict.error] += 1
        if verdict.outcome == "wrong":
            self.wrong.append(verdict)
        self.slow |= verdict.slow


def survey(name: str, cases: Iterable[Case]) -> Subject:
    """Judge every case, deaf to what torch warns of while it makes and runs them."""
    subject = Subject(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in cases:
            subject.add(judge(case))
    return subject


def count(what: str, subjects: Iterable[Subject]) -> str:
    """``operators 540 right, 0 documented errors, 0 wrong``."""
    n = Counter(s.outcome for s in subjects)
    errors = n["documented error"] + n["torch cannot"]
    return f"{what} {n['right']} right, {errors} documented errors, {n['wrong']} wrong"
