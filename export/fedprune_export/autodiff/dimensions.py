"""Sizes that vary: the batch, widths of channel groups, and whatever is computed from them.

A dimension is a number, or the name of a polynomial with whole coefficients in the batch and the groups' widths. Names
are canonical (`g0*192`, `g1+16`, `N*g0*4`), so that equal sizes are the same dimension. What a name represents at run
time is read off the shape of a value that has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedprune.core.errors import ModelError
from fedprune.model.architecture import FIXED, Architecture, Axis
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.trace import BATCH_EXTENT

Dim = int | str
Shape = tuple[Dim, ...]

BATCH = "N"  # the name of the batch dimension

Monomial = tuple[str, ...]
Form = dict[Monomial, int]
"""A polynomial: the coefficient of each product of symbols; the empty product is the constant."""


class Dimensions:
    """All dimensions of one training graph. `graph`: the graph that run-time sizes are written to."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._extents: dict[str, int] = {BATCH: BATCH_EXTENT}
        self._forms: dict[str, Form] = {BATCH: {(BATCH,): 1}}
        self._sources: dict[str, tuple[str, int]] = {}
        self._sizes: dict[str, str] = {}

    def symbol(self, name: str, extent: int) -> Dim:
        """A size that varies by itself, and what it is at full width."""
        self._extents[name] = extent
        self._forms[name] = {(name,): 1}
        return name

    def of_axis(self, axis: Axis, architecture: Architecture) -> Dim:
        """An axis of a tensor or value.

        Raises `ModelError` if channels of a group are uneven on the axis: its size is no multiple of the width.
        """
        lengths: dict[int, int] = {}
        for s in axis.segments:
            lengths[s.group] = lengths.get(s.group, 0) + s.length
        form: Form = {(): lengths.pop(FIXED, 0)}
        for number, length in lengths.items():
            group = architecture.groups[number]
            times, rest = divmod(length, group.size)
            if rest:
                raise ModelError(f"channels of group {group.name} are uneven on an axis", got=f"{length} indices")
            if group.size == 1:
                # One channel always stays: a size of 1 that would look as if it varied couldn't be broadcast.
                form[()] += times
                continue
            self._extents.setdefault(group.name, group.size)
            form[(group.name,)] = times
        return self.dim(form)

    # -- arithmetic -------------------------------------------------------------------------------------------------

    def form(self, dim: Dim) -> Form:
        """The polynomial that a dimension represents."""
        return {(): dim} if isinstance(dim, int) else self._forms[dim]

    def dim(self, form: Form) -> Dim:
        """The dimension that a polynomial is."""
        terms = sorted((m, c) for m, c in form.items() if c and m)
        constant = form.get((), 0)
        if not terms:
            return constant
        parts = ["*".join(m) + (f"*{c}" if c != 1 else "") for m, c in terms]
        name = "+".join([*parts, str(constant)] if constant else parts)
        if name not in self._forms:
            self._forms[name] = dict(terms) | ({(): constant} if constant else {})
        return name

    def extent(self, dim: Dim) -> int:
        """A dimension's size at full width (for the batch a large prime)."""
        if isinstance(dim, int):
            return dim
        return sum(c * math.prod(self._extents[s] for s in m) for m, c in self._forms[dim].items())

    def product(self, dims: Sequence[Dim]) -> Dim:
        """The dimension that merging these gives."""
        out: Form = {(): 1}
        for dim in dims:
            form = self.form(dim)
            merged: Form = {}
            for m, c in out.items():
                for other, times in form.items():
                    both = tuple(sorted(m + other))
                    merged[both] = merged.get(both, 0) + c * times
            out = merged
        return self.dim(out)

    def total(self, dims: Sequence[Dim]) -> Dim:
        """The dimension that concatenating these gives."""
        out: Form = {}
        for dim in dims:
            for m, c in self.form(dim).items():
                out[m] = out.get(m, 0) + c
        return self.dim(out)

    def difference(self, whole: Dim, part: Dim) -> Dim:
        """The rest of a dimension without a part of it."""
        return self.total([whole, self.product([-1, part])])

    def quotient(self, whole: Dim, part: Dim) -> Dim | None:
        """The dimension that gives `whole` when it is merged with `part`; or None."""
        rest, by = dict(self.form(whole)), self.form(part)
        lead = max(by, key=_order)
        out: Form = {}
        while any(rest.values()):
            top = max((m for m, c in rest.items() if c), key=_order)
            factor = _without(top, lead)
            if factor is None or rest[top] % by[lead]:
                return None
            times = rest[top] // by[lead]
            out[factor] = out.get(factor, 0) + times
            for m, c in by.items():
                both = tuple(sorted(m + factor))
                rest[both] = rest.get(both, 0) - c * times
        return self.dim(out)

    # -- at run time ------------------------------------------------------------------------------------------------

    def seen(self, value: str, shape: Shape) -> None:
        """Remember where sizes can be read at run time."""
        for axis, dim in enumerate(shape):
            if isinstance(dim, str):
                self._sources.setdefault(dim, (value, axis))

    def size(self, dim: Dim) -> str:
        """A value of the graph that holds a dimension's size at run time, as int64 of shape [1].

        Raises `ModelError` if no value that is known so far has a size from which it could be computed.
        """
        if isinstance(dim, int):
            return self._graph.ints(dim)
        found = self._size(dim, set())
        if found is None:
            raise ModelError(
                f"the size {dim} can't be computed from any tensor of the model",
                got=", ".join(self._sources) or "no size that varies",
                hint="A training graph reads widths off shapes of weights: give one an axis of this size alone.",
            )
        return found

    def sizes(self, dims: Sequence[Dim]) -> str:
        """Sizes at run time, as int64 of shape [len(dims)]: a constant where none varies."""
        if all(isinstance(d, int) for d in dims):
            return self._graph.ints(*(d for d in dims if isinstance(d, int)))
        if len(dims) == 1:
            return self.size(dims[0])
        return self._graph.emit("Concat", *map(self.size, dims), attrs={"axis": 0})

    def _size(self, dim: str, pending: set[str]) -> str | None:
        if dim not in self._sizes:
            found = self._read(dim)
            if found is None:
                found = self._solved(dim, pending) if dim in self._extents else self._sum(self._forms[dim], pending)
            if found is None:
                return None
            self._sizes[dim] = found
        return self._sizes[dim]

    def _read(self, dim: str) -> str | None:
        """The size off the shape of a value that has it."""
        source = self._sources.get(dim)
        if source is None:
            return None
        value, axis = source
        return self._graph.emit("Shape", value, attrs={"start": axis, "end": axis + 1})

    def _sum(self, form: Form, pending: set[str]) -> str | None:
        g = self._graph
        total = ""
        for monomial, times in sorted(form.items()):
            factors = []
            for symbol in monomial:
                size = self._size(symbol, pending)
                if size is None:
                    return None
                factors.append(size)
            if times != 1 or not factors:
                factors.append(g.ints(times))
            term = factors[0]
            for factor in factors[1:]:
                term = g.emit("Mul", term, factor)
            total = g.emit("Add", total, term) if total else term
        return total or g.ints(0)

    def _solved(self, symbol: str, pending: set[str]) -> str | None:
        """The size of a symbol from a dimension in which it occurs once: (size − rest) / factor."""
        if symbol in pending:
            return None
        g = self._graph
        for dim in self._sources:
            form = self._forms[dim]
            within = [m for m in form if symbol in m]
            if len(within) != 1 or within[0].count(symbol) != 1:
                continue
            inner = pending | {symbol}
            others = {m: c for m, c in form.items() if symbol not in m and c}
            rest = self._sum(others, inner) if others else ""
            factor = self._sum({_without(within[0], (symbol,)) or (): form[within[0]]}, inner)
            size = self._read(dim)
            if rest is None or factor is None or size is None:
                continue
            return g.emit("Div", g.emit("Sub", size, rest) if rest else size, factor)
        return None


def _order(monomial: Monomial) -> tuple[int, Monomial]:
    """Higher degrees first: an order in which products keep their place, as division needs."""
    return len(monomial), monomial


def _without(monomial: Monomial, part: Monomial) -> Monomial | None:
    """A product without some of its factors; None where it lacks one of them."""
    left = list(monomial)
    for symbol in part:
        if symbol not in left:
            return None
        left.remove(symbol)
    return tuple(left)
