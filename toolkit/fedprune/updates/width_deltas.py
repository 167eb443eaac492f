"""Density slabs: what each width of a ranking adds to the next narrower one, so that all widths travel once.

Submodels that are the first channels of one ranking, or whose masks are inside each other, hold each other. In
ascending order, w_1 < ... < w_m, slab j is what w_j has and w_{j-1} has not, and w_j is the sum of slabs 1 to j (PR-FL,
"Residual Split"). A receiver of slabs 1 to j has w_j; together they are about as large as w_m, however many devices
hear them.

The first slab is w_1's own tensor file. A later one is a tensor file, too, with entries in the order of the wide
submodel's tensors:

    ::shapes          I64: for every tensor that grows, in order, its number of dimensions and its shape
    name::slab        its values that the narrower submodel hasn't, in C order
    name::kept0       bits, the first in the highest: which indices of axis 0 the narrower one holds; left out where
                      those are the first ones. `::kept1`, ... are those of the other axes
    name::kept        instead of those, where elements are masked: which elements, in C order, the narrower one holds
    name              a tensor whose values differ between the two, as a whole
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError, shown
from fedprune.model.element_mask import ElementMask
from fedprune.model.selection import Indices, Selection, mesh

Array = npt.NDArray[Any]

Places = tuple[Indices, ...] | Indices
"""Where a narrow tensor is in a wide one: ascending indices per axis or, of masked ones, into the C order of both."""

MAX_SLABS = 32
"""Slabs of which a submodel is made at most."""

_SHAPES, _REST, _KEPT = "::shapes", "::slab", "::kept"


def places(
    narrow: Selection, wide: Selection, mask: ElementMask | None = None, wide_mask: ElementMask | None = None
) -> dict[str, Places]:
    """Where the tensors of a narrow submodel's file are in a wide one's, of those that are in it.

    The masks tell which elements a file holds; None for all.
    """
    out: dict[str, Places] = {}
    inner = {} if mask is None else mask.active
    outer = {} if wide_mask is None else wide_mask.active
    for spec in narrow.architecture.tensors:
        rows = [_rows(a, b) for a, b in zip(narrow.maps(spec.name), wide.maps(spec.name), strict=True)]
        axes = tuple(r for r in rows if r is not None)
        if len(axes) < len(rows):
            continue
        if spec.name not in inner and spec.name not in outer:
            out[spec.name] = axes
            continue
        held = np.zeros(tuple(len(m) for m in wide.maps(spec.name)), np.bool_)
        held[mesh(axes)] = inner.get(spec.name, True)
        known = outer.get(spec.name, np.True_)
        if not np.any(held & ~known):
            out[spec.name] = np.flatnonzero(held[known] if spec.name in outer else held)
    return out


def slab(below: Mapping[str, Array], tensors: Mapping[str, Array], where: Mapping[str, Places]) -> dict[str, Array]:
    """The part of a wide submodel's file beyond a narrow one's (`below`, placed by `places`): `compose` makes `tensors`
    of it and `below` again, to the bit."""
    shapes: list[int] = []
    out: dict[str, Array] = {_SHAPES: np.zeros(0, np.int64)}
    for name, value in tensors.items():
        place, known = where.get(name), below.get(name)
        if place is None or known is None or not _same(value, place, known):
            out[name] = value
            continue
        shapes += [value.ndim, *value.shape]
        rest = _outside(value.shape, place)
        out[name + _REST] = value[rest]
        if isinstance(place, tuple):
            for axis, row in enumerate(place):
                if row.size and row[-1] != row.size - 1:
                    out[f"{name}{_KEPT}{axis}"] = _bits(row, value.shape[axis])
        else:
            out[name + _KEPT] = _bits(place, value.size)
    out[_SHAPES] = np.array(shapes, np.int64)
    return out


def compose(below: Mapping[str, Array], entries: Mapping[str, Array]) -> dict[str, Array]:
    """The wide submodel's tensors, out of the narrow one's and the slab between them.

    The result is only as right as the input: the caller compares the file's digest with the promised one. Raises
    `BundleError` if the entries are no slab, or don't fit.
    """
    sizes = _sizes(entries.get(_SHAPES))
    out: dict[str, Array] = {}
    for entry, value in entries.items():
        if entry.endswith(_REST):
            name = entry.removesuffix(_REST)
            out[name] = _grown(name, below.get(name), entries, value, next(sizes, None))
        elif _KEPT not in entry and entry != _SHAPES:
            out[entry] = value
    return out


def own_share(entries: Mapping[str, Array], tensors: Mapping[str, Array]) -> float:
    """How much of a submodel its slab holds as whole tensors, by bytes: with 1 nothing of the narrower one is used."""
    whole = sum(v.nbytes for n, v in entries.items() if n in tensors)
    return whole / max(1, sum(v.nbytes for v in tensors.values()))


def chains(widths: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Put widths into chains in which each holds the one before: greedily, the widest that fits first.

    Widths are channels per group of every submodel, all of one ranking, in ascending order of their files' sizes.
    Chains are indices into them, ascending, of at most `MAX_SLABS`.
    """
    found: list[list[int]] = []
    for index, wide in enumerate(widths):
        fitting = [
            c for c in found if len(c) < MAX_SLABS and all(a <= b for a, b in zip(widths[c[-1]], wide, strict=True))
        ]
        if fitting:
            max(fitting, key=lambda c: c[-1]).append(index)
        else:
            found.append([index])
    return found


def _rows(narrow: Indices, wide: Indices) -> Indices | None:
    """Where the indices of a narrow axis stand among a wide one's; None if they are not all there, in order."""
    if np.array_equal(narrow, wide[: narrow.size]):
        return np.arange(narrow.size)
    found = np.flatnonzero(np.isin(wide, narrow))
    return found if found.size == narrow.size and np.array_equal(wide[found], narrow) else None


def _at(place: Places, value: Array) -> tuple[Array, Any]:
    """A wide tensor, as an array that the returned index finds the narrow one in; it is written to `value`, too."""
    return (value, mesh(place)) if isinstance(place, tuple) else (value.reshape(-1), place)


def _outside(shape: tuple[int, ...], place: Places) -> npt.NDArray[np.bool_]:
    outside = np.ones(shape, np.bool_)
    flags, index = _at(place, outside)
    flags[index] = False
    return outside


def _same(value: Array, place: Places, known: Array) -> bool:
    """Whether a wide tensor holds, bit by bit, what a narrow one does."""
    if value.dtype != np.float32 or known.dtype != np.float32:
        return False
    if isinstance(place, tuple) and known.shape != tuple(r.size for r in place):
        return False
    numbers, index = _at(place, value)
    held: Array = numbers[index]
    return held.tobytes() == known.tobytes()


def _bits(row: Indices, size: int) -> Array:
    held = np.zeros(size, np.bool_)
    held[row] = True
    return np.packbits(held)


def _sizes(shapes: Array | None) -> Iterator[tuple[int, ...]]:
    """The shapes of tensors that grow, one after the other. Raises `BundleError` if they are invalid."""
    if shapes is None or shapes.dtype != np.int64 or shapes.ndim != 1:
        raise BundleError("this is no slab", expected=f"whole numbers named {_SHAPES}")
    numbers, at = shapes.tolist(), 0
    while at < len(numbers):
        count = numbers[at]
        shape = tuple(numbers[at + 1 : at + 1 + max(count, 0)])
        if not 0 <= count <= 8 or len(shape) != count or not all(0 <= n < 2**31 for n in shape):
            raise BundleError("shapes of a slab are damaged")
        yield shape
        at += 1 + count


def _grown(
    name: str, known: Array | None, entries: Mapping[str, Array], rest: Array, shape: tuple[int, ...] | None
) -> Array:
    """A tensor that was `known`, with the rest round it."""
    if known is None or shape is None:
        raise BundleError(f"slab of {shown(name)}", expected="a tensor of the narrower submodel, and a shape")
    size = math.prod(shape)
    # What is allocated is no larger than what is there already.
    if known.dtype != np.float32 or rest.dtype != np.float32 or rest.ndim != 1 or size != known.size + rest.size:
        raise BundleError(f"slab of {shown(name)}", expected=f"{size} numbers of float32", got=known.size + rest.size)
    flat = entries.get(name + _KEPT)
    place: Places
    if flat is not None:
        place = where = _positions(name, flat, size)
        fits = where.size == known.size
    else:
        if len(shape) != known.ndim:
            raise BundleError(f"slab of {shown(name)}", expected=f"{known.ndim} dimensions", got=len(shape))
        rows = []
        for axis, (held, length) in enumerate(zip(known.shape, shape, strict=True)):
            bits = entries.get(f"{name}{_KEPT}{axis}")
            rows.append(np.arange(held) if bits is None else _positions(name, bits, length))
        place = tuple(rows)
        fits = tuple(r.size for r in place) == known.shape and all(
            n <= length for n, length in zip(known.shape, shape, strict=True)
        )
    if not fits:
        raise BundleError(f"slab of {shown(name)} doesn't fit the narrower submodel", got=known.shape)
    out = np.empty(shape, np.float32)
    out[_outside(shape, place)] = rest
    numbers, index = _at(place, out)
    numbers[index] = known if isinstance(place, tuple) else known.reshape(-1)
    return out


def _positions(name: str, bits: Array, size: int) -> Indices:
    if bits.dtype != np.uint8 or bits.shape != (-(-size // 8),):
        raise BundleError(f"slab of {shown(name)}", expected=f"{-(-size // 8)} bytes of bits", got=bits.shape)
    return np.flatnonzero(np.unpackbits(bits, count=size))
