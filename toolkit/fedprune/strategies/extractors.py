"""Extractors of plain slices and of masked elements, and the personaliser of global methods."""

from __future__ import annotations

from dataclasses import dataclass

from fedprune.model.element_mask import ElementMask
from fedprune.model.selection import Selection
from fedprune.strategies.importance.element_ranking import top
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


@dataclass(frozen=True)
class Elements(Extractor):
    """The ranking's first channels, of whose elements the most important ones of the whole model are active.

    How many those are is the turn's density, if the device has all channels; the masks of a round lie inside each other
    (PR-FL, Sec. "Stage 1"; `docs/strategies/pr-fl.md`). Where the ranking has no order of elements, none is masked.

    Attributes:
        zeros: Whether masked elements count as 0 in the sums (AutoFLIP). Otherwise they don't count.
    """

    zeros: bool = False

    @property
    def device_independent(self) -> bool:
        return True

    def extract(self, cut: Cut) -> Submodel:
        """A slice of the global model, with 0 where masked.

        Raises:
            BundleError: The order holds something that is no number.
        """
        mask = global_mask(cut)
        return masked(cut, cut.selection, mask)

    def reconstruct(self, report: Report) -> Submodel:
        """What was trained, at the places that it came from."""
        trained = report.trained
        return Submodel(trained.selection, trained.tensors) if self.zeros else trained


def global_mask(cut: Cut) -> ElementMask | None:
    """The mask of the whole model that a turn's density makes at full width; None where it masks nothing."""
    if cut.order is None:
        return None
    # A device of fewer channels has its density in them already.
    whole = cut.turn.widths == cut.scene.architecture.sizes
    mask = top(cut.order, cut.turn.density if whole else 1.0)
    return None if mask.count == mask.size else mask


def masked(cut: Cut, selection: Selection, mask: ElementMask | None) -> Submodel:
    """A slice of the global model under a mask of the whole model."""
    tensors = selection.gather(cut.scene.model)
    if mask is None:
        return Submodel(selection, tensors)
    inside = mask.gathered(selection)
    return Submodel(selection, inside.applied(tensors), inside)
