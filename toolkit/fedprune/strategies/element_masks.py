"""Strategies that mask elements: submodels keep all channels, and some of their elements are active."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedprune.model.element_mask import apply_mask, gather_mask
from fedprune.model.selection import ALL_ACTIVE, ElementMask, Selection
from fedprune.strategies.importance.element_ranking import top_mask
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Cut, Submodel

# Each increment costs up to a bit for each element that is still missing.
_MAX_LEVELS = 12


@dataclass(frozen=True)
class MaskedElements(Strategy):
    """The ranking's first channels, of which the most important elements of the whole model are active.

    The turn's density is the active share, if the device has all channels. The masks of a round lie inside each other
    (PR-FL, Sec. "Stage 1"; `docs/strategies/pr-fl.md`). Where the ranking has no order of elements, none is masked.

    Attributes:
        splits: Whether submodels travel as increments, each from one density of the fleet to the next.
    """

    splits: bool = False

    def levels(self, densities: Iterable[float]) -> tuple[float, ...]:
        distinct = sorted(set(densities)) if self.splits else []
        if len(distinct) > _MAX_LEVELS:  # a board between two of them gets its last increment for itself
            distinct = [distinct[i * (len(distinct) - 1) // (_MAX_LEVELS - 1)] for i in range(_MAX_LEVELS)]
        return tuple(distinct) if len(distinct) > 1 else ()

    @property
    def is_device_independent(self) -> bool:
        return type(self).extract is MaskedElements.extract

    def extract(self, cut: Cut) -> Submodel:
        """A slice of the global model, with 0 where masked. Raises `BundleError` if the order holds something that is
        no number."""
        return masked_submodel(cut, cut.selection, global_mask(cut))


def global_mask(cut: Cut) -> ElementMask:
    """The mask of the whole model that a turn's density makes at full width."""
    if cut.order is None:
        return ALL_ACTIVE
    # A device of fewer channels has its density in them already.
    is_full_width = cut.turn.widths == cut.scene.architecture.sizes
    mask = top_mask(cut.order, cut.turn.density if is_full_width else 1.0)
    # A mask that keeps everything is none: then nothing is packed, and the board computes an ordinary step.
    return ALL_ACTIVE if all(bits.all() for bits in mask.values()) else mask


def masked_submodel(cut: Cut, selection: Selection, mask: ElementMask) -> Submodel:
    """A slice of the global model under a mask of the whole model."""
    local_mask = gather_mask(mask, selection)
    return Submodel(selection, apply_mask(local_mask, selection.gather(cut.scene.model)), local_mask)
