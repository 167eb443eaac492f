"""Submodels as plain slices of the global model, and devices with nothing of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedprune.strategies.roles import Cut, Report, Submodel


@dataclass(frozen=True)
class Selected:
    """The ranking's first channels, as they stand in the global model (HeteroFL, Diao et al. 2021, eq. 2)."""

    alike: ClassVar[bool] = True
    as_trained: ClassVar[bool] = True

    def extract(self, cut: Cut) -> Submodel:
        """A slice of the global model."""
        return Submodel(cut.selection, cut.selection.gather(cut.scene.model))

    def reconstruct(self, report: Report) -> Submodel:
        """What was trained, at the places that it came from."""
        return report.trained


@dataclass(frozen=True)
class Nobody:
    """Nothing is a device's own, as far as the server knows: the personaliser of global methods."""

    alike: ClassVar[bool] = True
    as_trained: ClassVar[bool] = True

    def personalise(self, cut: Cut, submodel: Submodel) -> Submodel:
        """The submodel as it is."""
        return submodel

    def share(self, report: Report, lifted: Submodel) -> Submodel:
        """All of it."""
        return lifted
