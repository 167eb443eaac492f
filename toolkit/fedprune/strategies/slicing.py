"""Submodels as plain slices of the global model, and devices with nothing of their own."""

from __future__ import annotations

from dataclasses import dataclass

from fedprune.strategies.roles import Cut, Extractor, Personaliser, Report, Submodel


@dataclass(frozen=True)
class Selected(Extractor):
    """The ranking's first channels, as they are in the global model (HeteroFL, Diao et al. 2021, eq. 2)."""

    @property
    def device_independent(self) -> bool:
        return type(self).extract is Selected.extract

    @property
    def as_trained(self) -> bool:
        return type(self).reconstruct is Selected.reconstruct

    def extract(self, cut: Cut) -> Submodel:
        return Submodel(cut.selection, cut.selection.gather(cut.scene.model))

    def reconstruct(self, report: Report) -> Submodel:
        return report.trained


@dataclass(frozen=True)
class Global(Personaliser):
    """Nothing is a device's own, as far as the server knows: the personaliser of global methods."""

    @property
    def device_independent(self) -> bool:
        return type(self).personalise is Global.personalise

    @property
    def as_trained(self) -> bool:
        return type(self).share is Global.share

    def personalise(self, cut: Cut, submodel: Submodel) -> Submodel:
        return submodel

    def share(self, report: Report, lifted: Submodel) -> Submodel:
        return lifted
