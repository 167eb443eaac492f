"""Couplings: which mixture of one model's channels each channel of another model is.

A coupling of n sources and m targets with uniform marginals is a transport plan Π [n, m] with row sums 1/n and column
sums 1/m. What is kept is T = m·Π, whose columns sum to 1 (the normalised plan of SubFLOT, arXiv 2604.06631, Alg. 1):
every target channel is a convex combination of source channels. Optimal plans have fewer than n + m entries, so that
carrying an axis costs a few gathers instead of a product with a matrix.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd, prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError, MissingExtraError

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# Numbers per block: with copies of them they fit in a core's cache.
_CHUNK_SIZE = 1 << 17


class _Gather(NamedTuple):
    """How one side of a coupling is computed from the other.

    Attributes:
        rounds: Which indices to add up in turn, where every output index has equally many entries of the same share.
        share: That share.
        matrix: Outputs by indices, for scipy, where entries are uneven.
    """

    rounds: tuple[Indices, ...]
    share: float
    matrix: Any


@dataclass(frozen=True, eq=False)
class Coupling:
    """T [sources, targets] by its entries, sorted by target and then source; columns sum to 1, rows to targets/sources.

    Attributes:
        rows: Source of every entry.
        columns: Target of every entry.
        shares: T's entries, above 0.
    """

    sources: int
    targets: int
    rows: Indices
    columns: Indices
    shares: npt.NDArray[np.float64]

    @classmethod
    def of(
        cls, sources: int, targets: int, rows: npt.ArrayLike, columns: npt.ArrayLike, flow: npt.ArrayLike
    ) -> Coupling:
        """A checked coupling of entries, which may come twice. `flow` is the plan's mass in units of 1/lcm(n, m): every
        source sends lcm/n, every target gets lcm/m. Raises `BundleError` if the marginals are not uniform."""
        i, j = np.asarray(rows, np.int64), np.asarray(columns, np.int64)
        mass = np.asarray(flow, np.float64)
        keys, summed = _merge_entries(j * sources + i, mass)
        keys, summed = keys[summed > 0], summed[summed > 0]
        common = gcd(sources, targets)
        i, j = keys % sources, keys // sources
        row_error = np.bincount(i, summed, sources) - targets // common
        column_error = np.bincount(j, summed, targets) - sources // common
        # The solver's masses are rounded, and a channel adds up as many as n + m of them.
        if max(np.abs(row_error).max(initial=0), np.abs(column_error).max(initial=0)) > 1e-6 * (sources + targets):
            raise BundleError("marginals of a transport plan", expected="uniform")
        return cls(sources, targets, i, j, summed / (sources // common))

    @classmethod
    def in_order(cls, sources: int, targets: int) -> Coupling:
        """The plan that keeps channels in their own order (optimal on a line); the identity where widths are equal."""
        return cls.of(sources, targets, *ordered_entries(sources, targets))

    @cached_property
    def dense(self) -> npt.NDArray[np.float64]:
        """T as a matrix [sources, targets]."""
        out = np.zeros((self.sources, self.targets))
        out[self.rows, self.columns] = self.shares
        return out

    def average_with(self, other: Coupling) -> Coupling:
        """(T + T′)/2: what SubFLOT hands on where residual branches meet."""
        i, j = np.concatenate([self.rows, other.rows]), np.concatenate([self.columns, other.columns])
        keys, shares = _merge_entries(j * self.sources + i, np.concatenate([self.shares, other.shares]) / 2)
        return Coupling(self.sources, self.targets, keys % self.sources, keys // self.sources, shares)

    def forward(self, values: Floats, out: Floats | None = None) -> Floats:
        """y[:, k] = Σ_j T[j, k] · x[:, j], from x [before, sources, after] to y [before, targets, after], written to
        `out` if given."""
        return _apply_gather(self._forward, values, self.targets, out)

    def backward(self, values: Floats, out: Floats | None = None) -> Floats:
        """The adjoint, x[:, j] = Σ_k T[j, k] · y[:, k], with the shapes of `forward`."""
        return _apply_gather(self._backward, values, self.sources, out)

    @cached_property
    def _forward(self) -> _Gather:
        return _make_gather(self.rows, self.columns, self.shares, self.targets, self.sources)

    @cached_property
    def _backward(self) -> _Gather:
        order = np.argsort(self.rows, kind="stable")
        return _make_gather(self.columns[order], self.rows[order], self.shares[order], self.sources, self.targets)


@lru_cache(maxsize=256)
def ordered_entries(sources: int, targets: int) -> tuple[Indices, Indices, Indices]:
    """The entries of the plan that keeps channels in order: sources, targets and mass, in units of 1/lcm(n, m)."""
    common = gcd(sources, targets)
    source_mass, target_mass = targets // common, sources // common
    boundaries = np.sort(
        np.concatenate([np.arange(1, sources + 1) * source_mass, np.arange(1, targets + 1) * target_mass])
    )
    mass = np.diff(boundaries, prepend=0)
    boundaries, mass = boundaries[mass > 0], mass[mass > 0]
    entries = (boundaries - 1) // source_mass, (boundaries - 1) // target_mass, mass
    for array in entries:  # all callers share them
        array.setflags(write=False)
    return entries


def _merge_entries(keys: Indices, values: npt.NDArray[np.float64]) -> tuple[Indices, npt.NDArray[np.float64]]:
    """Keys in order, each once, with the sums of their values."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first_entries = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first_entries], np.add.reduceat(values[order], first_entries)


def _make_gather(
    source_indices: Indices, target_indices: Indices, shares: npt.NDArray[np.float64], size: int, length: int
) -> _Gather:
    """A gather of entries that are sorted by output index. Raises `MissingExtraError` if scipy is not installed, and
    the entries are not alike."""
    counts = np.bincount(target_indices, minlength=size)
    count = int(counts[0])
    # Widths that are multiples of each other give equal entries: plain gathers, without scipy.
    if bool((counts == count).all()) and bool((shares == shares[0]).all()):
        return _Gather(tuple(source_indices.reshape(size, count).T.copy()), float(shares[0]), None)
    try:
        from scipy.sparse import csr_array
    except ImportError as error:
        raise MissingExtraError("transport plans need scipy", extra="subflot") from error

    row_ends = np.concatenate([[0], np.cumsum(counts)])
    return _Gather((), 1.0, csr_array((shares.astype(np.float32), source_indices, row_ends), shape=(size, length)))


def _apply_gather(gather: _Gather, values: Floats, size: int, out: Floats | None) -> Floats:
    """All outputs from all inputs, in chunks that stay in the cache."""
    leading, length, trailing = values.shape
    scale = np.float32(gather.share)
    if gather.matrix is not None and leading == 1:
        product: Floats = gather.matrix @ values[0]
        if out is None:
            return product[None]
        out[0] = product
        return out
    if out is None:
        out = np.empty((leading, size, trailing), np.float32)
    if leading == 1:
        chunk_size = max(1, _CHUNK_SIZE // max(1, trailing))
        for start in range(0, size, chunk_size):
            rows = slice(start, start + chunk_size)
            _add_rounds(values, [takes[rows] for takes in gather.rounds], scale, out[:, rows])
        return out
    # A sparse product's result is in the cache, too, until it is swapped.
    longest_side = length if gather.matrix is None else max(length, size)
    chunk_size = max(1, _CHUNK_SIZE // max(1, longest_side * trailing))
    for start in range(0, leading, chunk_size):
        chunk, chunk_out = values[start : start + chunk_size], out[start : start + chunk_size]
        if gather.matrix is None:
            if chunk.size and chunk.flags.c_contiguous:
                # Read it once in order, so that reading it in random order finds it in the cache.
                chunk.reshape(-1)[::16].max()
            _add_rounds(chunk, gather.rounds, scale, chunk_out)
            continue
        swap_buffer = SCRATCH.array("swapped", (length, len(chunk), trailing))
        transported = gather.matrix @ _swap_axes(chunk, swap_buffer).reshape(length, -1)
        _swap_axes(transported.reshape(size, len(chunk), trailing), chunk_out)
    return out


def _add_rounds(values: Floats, rounds: Sequence[Indices], scale: np.float32, out: Floats) -> None:
    # Indices are right by construction: "clip" only lets numpy write without a buffer of its own.
    np.take(values, rounds[0], axis=1, out=out, mode="clip")
    for takes in rounds[1:]:
        out += values.take(takes, axis=1)
    if scale != 1:
        out *= scale


def _swap_axes(values: Floats, out: Floats) -> Floats:
    """[a, b, c] as [b, a, c]: a sparse product runs along rows, so its axis goes to the front and back. What lies along
    c moves as one item; otherwise numpy would run an inner loop over these few numbers."""
    a, b, c = values.shape
    kind = f"V{4 * c}"
    items = np.ascontiguousarray(values).reshape(a, b * c).view(kind)
    out.reshape(b, a * c).view(kind)[...] = items.T
    return out


class Scratch(threading.local):
    """Arrays by a name, one set per thread; each grows to the largest that was asked for."""

    def __init__(self) -> None:
        self._buffers: dict[str, Floats] = {}

    def array(self, name: str, shape: tuple[int, ...]) -> Floats:
        """An array of any content, which is good until the same name is asked for again."""
        size = prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            buffer = self._buffers[name] = np.empty(size, np.float32)
        return buffer[:size].reshape(shape)


# Shared by all plans; per thread.
SCRATCH = Scratch()
