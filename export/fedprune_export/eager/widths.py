"""The widths that a submodel's tensors have, read off their shapes."""

from __future__ import annotations

from collections.abc import Mapping

from fedprune.core.errors import BundleError
from fedprune.model.architecture import FIXED, Architecture


def widths_of(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Channels per group.

    Args:
        architecture: The model.
        shapes: Shapes of all its tensors, by name.

    Raises:
        BundleError: No widths have these shapes.
    """
    sizes = architecture.sizes
    found: dict[int, int] = {}
    waiting = [
        (axis, shapes[t.name][i])
        for t in architecture.tensors
        if len(shapes.get(t.name, ())) == len(t.axes)
        for i, axis in enumerate(t.axes)
    ]
    progress = True
    while progress:
        progress = False
        for axis, size in waiting:
            unknown = [g for g in axis.groups if g not in found]
            if len(unknown) != 1:
                continue
            rest, length = size, 0
            known = {g: sum(s.length for s in axis.segments if s.group == g) for g in axis.groups if g in found}
            rest -= sum(n * found[g] // sizes[g] for g, n in known.items())
            rest -= sum(s.length for s in axis.segments if s.group == FIXED)
            length = sum(s.length for s in axis.segments if s.group == unknown[0])
            found[unknown[0]] = -(-rest * sizes[unknown[0]] // length)
            progress = True
    widths = tuple(found.get(g, n) for g, n in enumerate(sizes))
    if any(not 1 <= w <= n for w, n in zip(widths, sizes, strict=True)) or architecture.shapes(widths) != {
        name: tuple(shape) for name, shape in shapes.items()
    }:
        raise BundleError("no widths of this model give tensors of these shapes", got=str(dict(shapes))[:200])
    return widths
