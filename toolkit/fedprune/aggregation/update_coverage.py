"""Counts, for each coordinate of the model, the weight of the updates that hold it.

Where updates hold whole channels, their selections suffice: each selection's *share* is the weight of all its updates,
and only the end of a round makes the *mass* of them, which is the weight per coordinate. Where an update's mask is made
of single elements, its tensor gets a mass of its own at once.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.layout import has_layout_ranks, index_pairs
from fedprune.core.errors import BundleError, ProtocolError
from fedprune.model.architecture import Architecture, TensorSpec
from fedprune.model.selection import ElementMask, Selection

Mass = npt.NDArray[np.int64]


class UpdateCoverage:
    """The weight of the updates that hold each coordinate, in the layout of the first one's ranks."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.layout: Selection | None = None
        self.weight = 0
        self._shared_selections: dict[str, Selection] = {}
        self._weight_of_selection: dict[tuple[str, frozenset[str]], tuple[Selection, int]] = {}
        self._masked_mass: dict[str, Mass] = {}

    @property
    def required_layout(self) -> Selection:
        """The layout. Raises `BundleError` if nothing was added yet."""
        if self.layout is None:
            raise BundleError("the fold is empty")
        return self.layout

    def settle_layout(self, selection: Selection) -> Selection:
        """The layout, which the first selection decides."""
        if self.layout is None:
            self.layout = selection.with_widths(self.architecture.sizes)
        return self.layout

    def shared_selection(self, selection: Selection) -> Selection:
        """A selection equal to this one, the same object for all updates. If its ranks are the layout's, it has their
        arrays, so that comparing them costs nothing."""
        layout, shared = self.settle_layout(selection), self._shared_selections.get(selection.digest)
        if shared is None:
            shared = selection
            if has_layout_ranks(layout, selection):
                shared = layout if selection.widths == layout.widths else layout.with_widths(selection.widths)
            self._shared_selections[selection.digest] = shared
        return shared

    def add(self, selection: Selection, weight: int, active: ElementMask) -> None:
        """Count an update of this weight. `active` has the masks of tensors of which it holds only some elements."""
        layout = self.settle_layout(selection)
        for name, mask in active.items():
            spec = self.architecture.by_name[name]
            if name not in self._masked_mass:
                self._masked_mass[name] = np.zeros(spec.shape, np.int64)
            for sum_index, update_index in index_pairs(layout, spec, selection):
                self._masked_mass[name][sum_index] += weight * mask[update_index]
        key = (selection.digest, frozenset(active))
        _, before = self._weight_of_selection.get(key, (selection, 0))
        self._weight_of_selection[key] = (selection, before + weight)
        self.weight += weight

    def mass(self, spec: TensorSpec) -> Mass | None:
        """The mass of a tensor, in the layout: as `coverage_mass`, with the updates that have a mask of it."""
        layout = self.required_layout
        shares = [share for (_, masked), share in self._weight_of_selection.items() if spec.name not in masked]
        selected_mass = coverage_mass(layout, spec, shares) if shares else np.zeros(spec.shape, np.int64)
        if spec.name not in self._masked_mass:
            return selected_mass
        return self._masked_mass[spec.name] + (sum(w for _, w in shares) if selected_mass is None else selected_mass)

    def shares(self) -> tuple[tuple[Selection, int], ...] | None:
        """Selections and the weight of all updates of each; None where masks of single elements were counted."""
        if self._masked_mass:
            return None
        return tuple(
            (selection.with_widths(selection.widths), weight)
            for selection, weight in self._weight_of_selection.values()
        )


def partial_masks(
    architecture: Architecture, selection: Selection, mask: ElementMask, left_out: Collection[str] = ()
) -> ElementMask:
    """The masks, in the submodel's coordinates, that leave something out of their tensor. Whole tensors need no counts
    per coordinate.

    Raises `ProtocolError` if a mask is of an unknown tensor, of batch-norm statistics, or of another shape or type.
    """
    active_masks = {}
    for name, active in mask.items():
        spec = architecture.by_name.get(name)
        if spec is None or not spec.kind.is_trainable:
            raise ProtocolError(f"mask of {name}", expected="masks of tensors that are trained")
        shape = architecture.shape(name, selection.widths)
        if active.shape != shape or active.dtype != np.bool_:
            raise ProtocolError(f"mask of {name}", expected=f"bool {shape}", got=f"{active.dtype} {active.shape}")
        if name not in left_out and not active.all():
            active_masks[name] = active
    return active_masks


def coverage_mass(
    layout: Selection, spec: TensorSpec, shares: Collection[tuple[Selection, int]]
) -> npt.NDArray[np.int64] | None:
    """Per coordinate of a tensor, in the layout, the weight of the updates (`shares`: by selection) that hold it.

    Axes that every update holds as a whole have length 1; None where every update holds the whole tensor.
    """
    if all(selection.is_full for selection, _ in shares):
        return None
    weights = np.array([n for _, n in shares], np.float64)  # sums of at most 2^24 are exact
    shape, letters, memberships = [1] * len(spec.axes), "", []
    for axis, order in enumerate(layout.maps(spec.name)):
        members = np.zeros((len(shares), order.size))
        for row, (selection, _) in zip(members, shares, strict=True):
            row[selection.maps(spec.name)[axis]] = 1.0
        if not members.all():
            memberships.append(members[:, order])
            letters += "abcdefgh"[axis]
            shape[axis] = order.size
    if not memberships:
        return None
    first_members, *other_members = memberships
    # One product over the updates per axis that is cut, instead of a pass over the tensor per update.
    weighted_members = first_members.T * weights
    if not other_members:
        mass = weighted_members.sum(axis=1)
    elif len(other_members) == 1:
        mass = weighted_members @ other_members[0]
    else:
        other_operands = ",".join(f"k{letter}" for letter in letters[1:])
        mass = np.einsum(f"{letters[0]}k,{other_operands}->{letters}", weighted_members, *other_members, optimize=True)
    return np.asarray(mass, np.int64).reshape(shape)
