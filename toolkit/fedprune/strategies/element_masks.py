"""Strategies whose submodels have all channels, of whose elements only some are active."""

from __future__ import annotations

from dataclasses import dataclass

from fedprune.model.element_mask import ElementMask
from fedprune.model.selection import Selection
from fedprune.strategies.importance.element_ranking import top
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Cut, Submodel


@dataclass(frozen=True)
class Masked(Strategy):
    """The ranking's first channels, of whose elements the most important ones of the whole model are active.

    How many those are is the turn's density, if the device has all channels; the masks of a round lie inside each other
    (PR-FL, Sec. "Stage 1"; `docs/strategies/pr-fl.md`). Where the ranking has no order of elements, none is masked.
    """

    @property
    def device_independent(self) -> bool:
        return type(self).extract is Masked.extract

    def extract(self, cut: Cut) -> Submodel:
        """A slice of the global model, with 0 where masked. Raises `BundleError` if the order holds something that is
        no number."""
        return masked(cut, cut.selection, global_mask(cut))


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
