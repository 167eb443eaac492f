"""Symbolic sizes: the batch, the widths of channel groups, and all sizes that are computed from them.

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
# A polynomial: the coefficient of each product of symbols. A dict makes sums and products of sizes a loop over terms;
# the empty product is the constant.
Polynomial = dict[Monomial, int]


class Dimensions:
    """All dimensions of one training graph. `graph`: the graph that run-time sizes are written to."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._extents: dict[str, int] = {BATCH: BATCH_EXTENT}
        self._polynomials: dict[str, Polynomial] = {BATCH: {(BATCH,): 1}}
        self._sources: dict[str, tuple[str, int]] = {}
        self._sizes: dict[str, str] = {}

    def symbol(self, name: str, extent: int) -> Dim:
        """Define a size that varies by itself. `extent`: the size at full width."""
        self._extents[name] = extent
        self._polynomials[name] = {(name,): 1}
        return name

    def axis_dim(self, axis: Axis, architecture: Architecture) -> Dim:
        """An axis of a tensor or value.

        Raises `ModelError` if channels of a group are uneven on the axis: its size is no multiple of the width.
        """
        lengths: dict[int, int] = {}
        for s in axis.segments:
            lengths[s.group] = lengths.get(s.group, 0) + s.length
        form: Polynomial = {(): lengths.pop(FIXED, 0)}
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

    def polynomial(self, dim: Dim) -> Polynomial:
        """The polynomial that a dimension represents."""
        return {(): dim} if isinstance(dim, int) else self._polynomials[dim]

    def dim(self, form: Polynomial) -> Dim:
        """The dimension that a polynomial is."""
        # Sorted, so that equal polynomials have one name, however they were computed.
        terms = sorted((m, c) for m, c in form.items() if c and m)
        constant = form.get((), 0)
        if not terms:
            return constant
        names = ["*".join(m) + (f"*{c}" if c != 1 else "") for m, c in terms]
        name = "+".join([*names, str(constant)] if constant else names)
        if name not in self._polynomials:
            self._polynomials[name] = dict(terms) | ({(): constant} if constant else {})
        return name

    def extent(self, dim: Dim) -> int:
        """A dimension's size at full width (for the batch a large prime)."""
        if isinstance(dim, int):
            return dim
        return sum(c * math.prod(self._extents[s] for s in m) for m, c in self._polynomials[dim].items())

    def product(self, dims: Sequence[Dim]) -> Dim:
        """The size of an axis that these axes are merged into."""
        result: Polynomial = {(): 1}
        for dim in dims:
            form = self.polynomial(dim)
            merged: Polynomial = {}
            for m, c in result.items():
                for factor, times in form.items():
                    key = tuple(sorted(m + factor))
                    merged[key] = merged.get(key, 0) + c * times
            result = merged
        return self.dim(result)

    def total(self, dims: Sequence[Dim]) -> Dim:
        """The size of the concatenation of these axes."""
        result: Polynomial = {}
        for dim in dims:
            for m, c in self.polynomial(dim).items():
                result[m] = result.get(m, 0) + c
        return self.dim(result)

    def difference(self, minuend: Dim, subtrahend: Dim) -> Dim:
        """The size that is left of `minuend` without `subtrahend`."""
        return self.total([minuend, self.product([-1, subtrahend])])

    def quotient(self, dividend: Dim, divisor: Dim) -> Dim | None:
        """The size whose product with `divisor` is `dividend`; None if there is none."""
        # Polynomial long division: the leading term of the rest is divided until nothing is left.
        rest, divisor_form = dict(self.polynomial(dividend)), self.polynomial(divisor)
        lead = max(divisor_form, key=_degree_order)
        result: Polynomial = {}
        while any(rest.values()):
            top = max((m for m, c in rest.items() if c), key=_degree_order)
            factor = _divide_monomial(top, lead)
            if factor is None or rest[top] % divisor_form[lead]:
                return None
            times = rest[top] // divisor_form[lead]
            result[factor] = result.get(factor, 0) + times
            for m, c in divisor_form.items():
                key = tuple(sorted(m + factor))
                rest[key] = rest.get(key, 0) - c * times
        return self.dim(result)

    # -- at run time ------------------------------------------------------------------------------------------------

    def note_shape(self, value: str, shape: Shape) -> None:
        """Remember that the sizes of `shape` can be read off `value` at run time."""
        for axis, dim in enumerate(shape):
            if isinstance(dim, str):
                # The first value with this size stays: it is computed earliest, and later ones may depend on its size.
                self._sources.setdefault(dim, (value, axis))

    def size(self, dim: Dim) -> str:
        """A value of the graph that holds a dimension's size at run time, as int64 of shape [1].

        Raises `ModelError` if it can't be computed from a size of any value written so far.
        """
        if isinstance(dim, int):
            return self._graph.ints(dim)
        size = self._size(dim, set())
        if size is None:
            raise ModelError(
                f"the size {dim} can't be computed from any tensor of the model",
                got=", ".join(self._sources) or "no size that varies",
                hint="A training graph reads widths off shapes of weights: give one an axis of this size alone.",
            )
        return size

    def sizes(self, dims: Sequence[Dim]) -> str:
        """Sizes at run time, as int64 of shape [len(dims)]: a constant where none varies."""
        if all(isinstance(d, int) for d in dims):
            return self._graph.ints(*(d for d in dims if isinstance(d, int)))
        if len(dims) == 1:
            return self.size(dims[0])
        return self._graph.emit("Concat", *map(self.size, dims), attrs={"axis": 0})

    def _size(self, dim: str, pending: set[str]) -> str | None:
        if dim not in self._sizes:
            size = self._read(dim)
            if size is None:
                size = self._solve(dim, pending) if dim in self._extents else self._sum(self._polynomials[dim], pending)
            if size is None:
                return None
            self._sizes[dim] = size
        return self._sizes[dim]

    def _read(self, dim: str) -> str | None:
        """The size off the shape of a value that has it."""
        source = self._sources.get(dim)
        if source is None:
            return None
        value, axis = source
        return self._graph.emit("Shape", value, attrs={"start": axis, "end": axis + 1})

    def _sum(self, form: Polynomial, pending: set[str]) -> str | None:
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

    def _solve(self, symbol: str, pending: set[str]) -> str | None:
        """The size of a symbol from a dimension in which it occurs once: (size − rest) / factor."""
        # A symbol that is being solved already: its size can't follow from itself.
        if symbol in pending:
            return None
        g = self._graph
        for dim in self._sources:
            form = self._polynomials[dim]
            matches = [m for m in form if symbol in m]
            if len(matches) != 1 or matches[0].count(symbol) != 1:
                continue
            pending_symbols = pending | {symbol}
            other_terms = {m: c for m, c in form.items() if symbol not in m and c}
            rest = self._sum(other_terms, pending_symbols) if other_terms else ""
            factor = self._sum({_divide_monomial(matches[0], (symbol,)) or (): form[matches[0]]}, pending_symbols)
            size = self._read(dim)
            if rest is None or factor is None or size is None:
                continue
            return g.emit("Div", g.emit("Sub", size, rest) if rest else size, factor)
        return None


def _degree_order(monomial: Monomial) -> tuple[int, Monomial]:
    """The order of long division: by degree, then by name. It is the same after both sides are multiplied."""
    return len(monomial), monomial


def _divide_monomial(monomial: Monomial, factors: Monomial) -> Monomial | None:
    """A product without some of its factors; None where it lacks one of them."""
    remaining = list(monomial)
    for symbol in factors:
        if symbol not in remaining:
            return None
        remaining.remove(symbol)
    return tuple(remaining)
