"""Aggregators that are means: of models, by coverage or by filling up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedprune.aggregation import Fold, Rule
from fedprune.strategies.roles import Closing, Report, Scene, Submodel

VELOCITY = "velocity"
"""What the server momentum remembers."""


@dataclass(frozen=True)
class Mean:
    """The mean of what devices hand in.

    Attributes:
        rule: As `Fold`.
        server_momentum: β of FedAvgM, from 0 to below 1.
        weighting: `samples` or `uniform`.
    """

    rule: Rule = "coverage"
    server_momentum: float = 0.0
    weighting: str = "samples"

    def fold(self, scene: Scene, *, evidence: bool) -> Fold:
        """Empty sums for a round."""
        return Fold(scene.architecture, scene.model, rule=self.rule, evidence=evidence)

    def add(self, fold: Fold, report: Report, lifted: Submodel) -> None:
        """Add an update: all of it or, where it raises, nothing.

        Raises:
            BundleError: As `Fold.add`.
            ProtocolError: As `Fold.add`.
        """
        fold.add(lifted.selection, lifted.tensors, report.weight, report.steps)

    def close(
        self, fold: Fold, scene: Scene, rate: float, reports: Callable[[], Iterator[tuple[Report, Submodel]]]
    ) -> Closing:
        """The next model, and the velocity."""
        model, velocity = fold.close(self.server_momentum, scene.memory.get(VELOCITY))
        return Closing(model, {} if velocity is None else {VELOCITY: velocity})
