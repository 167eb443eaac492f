"""Atoms: integer names for the indices of axes, and which of them can only be kept or cut together.

Atom 0 is fixed: an index tied to it stays. Every other atom starts untied; channel rules of operators tie atoms to each
other. All atoms that are tied in the end are a *unit*: the smallest thing that can be cut.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

AtomRow = npt.NDArray[np.int64]  # atoms of one axis, one per index


class Atoms:
    """Allocates atoms and collects ties between them.

    Attributes:
        cause: The node that ties atoms at the moment; empty if it is not to blame for what stays.
        fix_causes: The nodes that made something stay, in order.
    """

    def __init__(self) -> None:
        self._count = 1
        self._left: list[AtomRow] = []
        self._right: list[AtomRow] = []
        self._label: AtomRow = np.zeros(1, np.int64)
        self.cause = ""
        self.fix_causes: dict[str, None] = {}

    def fresh(self, size: int) -> AtomRow:
        """Atoms of a new axis; an axis of size 1 has nothing to cut."""
        if size <= 1:
            return fixed_row(size)
        row = np.arange(self._count, self._count + size, dtype=np.int64)
        self._count += size
        return row

    def tie(self, a: AtomRow, b: AtomRow) -> None:
        """Tie atoms at the same index of both rows: they can only be kept or cut together."""
        left, right = np.broadcast_arrays(a, b)
        differ = left != right
        if differ.any():
            # Atom 0 on one side: this node is why the other side stays.
            if self.cause and not (left[differ].all() and right[differ].all()):
                self.fix_causes[self.cause] = None
            self._left.append(left[differ])
            self._right.append(right[differ])

    def fix(self, row: AtomRow) -> None:
        """Tie these atoms to the fixed one, so that they stay."""
        self.tie(row, np.zeros_like(row))

    def units(self) -> AtomRow:
        """The unit of every atom by the ties so far, named by its smallest atom; unit 0 stays.

        Labels only ever fall along ties, and following a label to its own label halves every chain, so that a few
        passes over the ties suffice. Only ties that came since the last call are looked at.
        """
        label = np.concatenate([self._label, np.arange(self._label.size, self._count, dtype=np.int64)])
        if self._left:
            left, right = np.concatenate(self._left), np.concatenate(self._right)
            self._left, self._right = [], []
            while True:
                a, b = label[left], label[right]
                open_ties = a != b
                if not open_ties.any():
                    break
                left, right, a, b = left[open_ties], right[open_ties], a[open_ties], b[open_ties]
                # minimum.at, because several ties may lower one label in a pass: plain indexing keeps only the last.
                np.minimum.at(label, np.maximum(a, b), np.minimum(a, b))
                while True:
                    further = label[label]
                    if np.array_equal(further, label):
                        break
                    label = further
        self._label = label
        return label


def fixed_row(size: int) -> AtomRow:
    """A row of indices that stay."""
    return np.zeros(size, np.int64)
