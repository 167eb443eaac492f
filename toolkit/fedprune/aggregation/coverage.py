"""How much weight stands behind every coordinate of a round's sums.

Where updates hold whole channels, their selections suffice, and nothing is counted per coordinate until a round
closes. Where an update's mask is made of single elements, its tensor gets an array of counts of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.layout import in_order, mass_in, places
from fedprune.core.errors import BundleError, ProtocolError
from fedprune.model.architecture import Architecture, TensorSpec
from fedprune.model.element_mask import ElementMask
from fedprune.model.selection import Selection

Mass = npt.NDArray[np.int64]
Active = Mapping[str, npt.NDArray[np.bool_]]


class Coverage:
    """Which updates hold what, in the layout of the first one's ranks."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.layout: Selection | None = None
        self.weight = 0
        self._known: dict[str, Selection] = {}
        self._shares: dict[tuple[str, frozenset[str]], tuple[Selection, int]] = {}
        self._single: dict[str, Mass] = {}

    @property
    def expect_layout(self) -> Selection:
        """The layout. Raises `BundleError` if nothing was added yet."""
        if self.layout is None:
            raise BundleError("the fold is empty")
        return self.layout

    def settle(self, selection: Selection) -> Selection:
        """The layout; the first selection decides it."""
        if self.layout is None:
            self.layout = selection.narrowed(self.architecture.sizes)
        return self.layout

    def known(self, selection: Selection) -> Selection:
        """The selection, or an equal one that was here before: of its ranks it is known that they are the layout's."""
        layout, found = self.settle(selection), self._known.get(selection.digest)
        if found is None:
            found = selection
            if in_order(layout, selection):
                found = layout if selection.widths == layout.widths else layout.narrowed(selection.widths)
            self._known[selection.digest] = found
        return found

    def add(self, selection: Selection, weight: int, active: Active) -> None:
        """Count an update of this weight; `active` is, per tensor that it holds only in part, which elements."""
        layout = self.settle(selection)
        for name, mask in active.items():
            spec = self.architecture.by_name[name]
            if name not in self._single:
                self._single[name] = np.zeros(spec.shape, np.int64)
            for at, part in places(layout, spec, selection):
                self._single[name][at] += weight * mask[part]
        key = (selection.digest, frozenset(active))
        _, before = self._shares.get(key, (selection, 0))
        self._shares[key] = (selection, before + weight)
        self.weight += weight

    def mass(self, spec: TensorSpec) -> Mass | None:
        """Weight per coordinate of a tensor, in the layout; None where every update holds the whole tensor. Axes that
        every update holds as a whole may be 1 long."""
        layout = self.expect_layout
        shares = [share for (_, single), share in self._shares.items() if spec.name not in single]
        whole = mass_in(layout, spec, shares) if shares else np.zeros(spec.shape, np.int64)
        if spec.name not in self._single:
            return whole
        return self._single[spec.name] + (sum(w for _, w in shares) if whole is None else whole)

    def shares(self) -> tuple[tuple[Selection, int], ...] | None:
        """Selections and the weight of all updates of each; None where masks of single elements were counted."""
        if self._single:
            return None
        return tuple((selection.narrowed(selection.widths), weight) for selection, weight in self._shares.values())


def partly_active(
    architecture: Architecture, selection: Selection, mask: ElementMask | None, left_out: Collection[str] = ()
) -> dict[str, npt.NDArray[np.bool_]]:
    """The tensors of which a mask, in the submodel's coordinates, leaves something out; what it leaves whole goes the
    cheap way.

    Raises `ProtocolError` if a mask is of an unknown tensor, of batch-norm statistics, or of another shape or type.
    """
    out = {}
    for name, active in ({} if mask is None else mask.active).items():
        spec = architecture.by_name.get(name)
        if spec is None or not spec.kind.trainable:
            raise ProtocolError(f"mask of {name}", expected="masks of tensors that are trained")
        shape = architecture.shape(name, selection.widths)
        if active.shape != shape or active.dtype != np.bool_:
            raise ProtocolError(f"mask of {name}", expected=f"bool {shape}", got=f"{active.dtype} {active.shape}")
        if name not in left_out and not active.all():
            out[name] = active
    return out
