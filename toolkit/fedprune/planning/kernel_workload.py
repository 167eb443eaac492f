"""Counts the work of a model's training step or prediction at any widths, by kind of kernel.

The architecture has a table of layers, with a row for each operator. Every row becomes a few numbers (calls, MACs,
elements moved, weights read) under a *kind* of kernel (`fedprune.planning.kernel_kinds`). What a board takes for one
such unit is in its `LatencyTable` (`fedprune.planning.latency_model`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedprune.model.architecture import Architecture
from fedprune.model.axis import FIXED, Axis
from fedprune.planning.kernel_kinds import (
    CONVOLUTION_KINDS,
    FEATURES,
    KIND_INDEX,
    KINDS,
    MIN_LARGE_MAP,
    PLAIN_KIND_OF,
    inference_kind,
    kind_of,
    training_kind,
)

Numbers = npt.NDArray[np.float64]

# Channels that onnxruntime's blocked kernels want a multiple of; with others it falls back to plain ones.
ALIGNMENT = 4

# Channels that blocked kernels of the known processors compute at once (1: no blocks).
BLOCKS = (1, 4, 8, 16)

# Counts that a workload remembers; each is some hundred float64s.
_MAX_CACHED_COUNTS = 256

# Columns that a matrix product computes at once: a product of fewer columns takes as long.
TILE_COLUMNS = 32


class _AxisTables:
    """Tables of the axes of layers or tensors: a row each, an index for each axis, and the axes' lengths."""

    def __init__(self) -> None:
        # An axis of length 1 fills up the shorter rows.
        self._indices: dict[Axis, int] = {Axis.fixed(1): 0}

    def add(self, rows: Iterable[Sequence[Axis]]) -> npt.NDArray[np.int64]:
        """A table of axis indices: [rows, most axes of a row]."""
        indices = [[self._indices.setdefault(a, len(self._indices)) for a in axes] for axes in rows]
        width = max((len(r) for r in indices), default=0) or 1
        return np.array([r + [0] * (width - len(r)) for r in indices], np.int64).reshape(len(indices), width)

    def lengths(self, architecture: Architecture) -> tuple[Numbers, Numbers]:
        """Slopes [groups, axes] and constants [axes]: an axis's length is linear in the groups' widths, so that one
        product gives all lengths at many widths."""
        slopes, constants = np.zeros((len(architecture.groups), len(self._indices))), np.zeros(len(self._indices))
        for axis, index in self._indices.items():
            for s in axis.segments:
                if s.group == FIXED:
                    constants[index] += s.length
                else:
                    slopes[s.group, index] += s.length / architecture.groups[s.group].size
        return slopes, constants


class Workload:
    """An architecture's kernels, ready to be counted for many widths at once. The latest counts are remembered: boards
    of one fleet train at few widths, in batches of few sizes, and each has times of its own."""

    def __init__(self, architecture: Architecture) -> None:
        self._cached_count = lru_cache(maxsize=_MAX_CACHED_COUNTS)(self._count)
        layers = architecture.layers
        axes_of_tensor = {t.name: t.axes for t in architecture.tensors}
        weights = [axes_of_tensor.get(n.weight, ()) for n in layers]
        tables = _AxisTables()
        self._input_axes = tables.add(n.input_volume.axes for n in layers)
        self._output_axes = tables.add(n.output_volume.axes for n in layers)
        self._weight_axes = tables.add(weights)
        self._out_channel_axes = tables.add(
            w[n.output_axis : n.output_axis + 1] for n, w in zip(layers, weights, strict=True)
        )
        self._in_channel_axes = tables.add(
            [a for i, a in enumerate(w) if i != n.output_axis][:1] for n, w in zip(layers, weights, strict=True)
        )
        # A product of two activations sums over `inner` what each of its outputs needs.
        self._product_axes = tables.add((n.inner,) if n.inner.segments else () for n in layers)
        self._tensor_axes = tables.add(t.axes for t in architecture.tensors)
        self._activation_axes = tables.add((v.channels,) for v in architecture.activations)
        self._slopes, self._fixed_lengths = tables.lengths(architecture)
        self._input_positions = np.array([n.input_volume.positions for n in layers], float)
        self._output_positions = np.array([n.output_volume.positions for n in layers], float)
        self._positions = np.array([n.positions for n in layers], float)
        self._value_positions = np.array([v.positions for v in architecture.activations], float)
        self._kernels = np.array([n.kernel for n in layers], float)
        self._strides = np.array([n.stride for n in layers], float)
        self._has_weight = np.array([bool(n.weight) for n in layers], bool)
        self._is_depthwise = np.array([kind_of(n) == "depthwise" for n in layers], bool)
        # The first layer with weights reads the model's input.
        self._first_weighted = int(np.argmax(self._has_weight)) if self._has_weight.any() else -1
        self._training_kinds = np.array([KIND_INDEX[training_kind(n)] for n in layers], int)
        self._inference_kinds = np.array([inference_kind(layers, i) for i in range(len(layers))], int)

    def sizes(self, widths: npt.ArrayLike) -> Numbers:
        """Lengths of all axes, [n, axes], at widths [n, groups]."""
        return np.rint(np.atleast_2d(np.asarray(widths, float)) @ self._slopes + self._fixed_lengths)

    def macs(self, widths: npt.ArrayLike) -> Numbers:
        """MACs of one sample's forward pass, per row: [n, rows]."""
        sizes = self.sizes(widths)
        return self._macs(sizes, *self._elements(sizes))

    def forward_macs(self, widths: npt.ArrayLike) -> Numbers:
        """MACs of one sample's forward pass, all layers: [n]."""
        return np.asarray(self.macs(widths).sum(1))

    def element_counts(self, widths: npt.ArrayLike) -> tuple[Numbers, Numbers]:
        """Elements of one sample's activations, and of all tensors: [n] each."""
        sizes = self.sizes(widths)
        activations = sizes[:, self._activation_axes].prod(-1) * self._value_positions
        return activations.sum(1), sizes[:, self._tensor_axes].prod(-1).sum(1)

    def _elements(self, sizes: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """Elements of each row's input, output and weight: [n, rows] each."""
        inputs = sizes[:, self._input_axes].prod(-1) * self._input_positions
        outputs = sizes[:, self._output_axes].prod(-1) * self._output_positions
        return inputs, outputs, np.where(self._has_weight, sizes[:, self._weight_axes].prod(-1), 0)

    def _macs(self, sizes: Numbers, inputs: Numbers, outputs: Numbers, weights: Numbers) -> Numbers:
        products = np.where(
            self._training_kinds == KIND_INDEX["product"], outputs * sizes[:, self._product_axes].prod(-1), 0
        )
        return np.asarray(np.where(self._has_weight, weights * self._positions, products))

    def training(self, widths: npt.ArrayLike, batch: int) -> Numbers:
        """The work of training steps per widths, kind and feature: [n, kinds × features]; `widths` are [n, groups]."""
        return self._cached_count(_hashable_widths(widths), batch, 0)

    def inference(self, widths: npt.ArrayLike, batch: int, block: int) -> Numbers:
        """The work of predictions, as `training` gives it; a blocked kernel computes `block` channels at once."""
        return self._cached_count(_hashable_widths(widths), batch, block)

    def _count(self, widths: tuple[tuple[float, ...], ...], batch: int, block: int) -> Numbers:
        """The work of predictions, or of training steps where `block` is 0."""
        work = self._inference_work(widths, batch, block) if block else self._training_work(widths, batch)
        work.setflags(write=False)
        return work

    def _training_work(self, widths: npt.ArrayLike, batch: int) -> Numbers:
        sizes = self.sizes(widths)
        inputs, outputs, weights = self._elements(sizes)
        macs = self._macs(sizes, inputs, outputs, weights)
        if self._first_weighted >= 0:
            macs[:, self._first_weighted] *= 2 / 3  # the gradient of the model's input isn't needed
        # Every output reads a window of its input: an element goes in once per tap, and less often by the stride.
        taps = np.where((self._kernels > 1) & self._has_weight, self._kernels / self._strides, 1.0)
        # A depthwise layer's input gradient is as large as its input, whatever the stride.
        taps = np.where(self._is_depthwise, self._kernels, taps)
        large_maps = self._positions >= MIN_LARGE_MAP
        # A call falls into a part per sample and, on large maps, per tap.
        parts = np.where(self._has_weight, batch * np.where(large_maps, self._kernels, 1.0), 0.0)
        parts = np.broadcast_to(parts, macs.shape)
        ones = np.ones_like(macs)
        rows = np.stack([ones, parts, macs * batch, (inputs * taps + outputs) * batch, weights], -1)
        return self._sum_by_kind(rows, np.broadcast_to(self._training_kinds, macs.shape))

    def _inference_work(self, widths: npt.ArrayLike, batch: int, block: int) -> Numbers:
        sizes = self.sizes(widths)
        inputs, outputs, weights = self._elements(sizes)
        macs = self._macs(sizes, inputs, outputs, weights) * batch
        out, inner = sizes[:, self._out_channel_axes].prod(-1), sizes[:, self._in_channel_axes].prod(-1)
        kinds = np.broadcast_to(self._inference_kinds, macs.shape).copy()
        plain = self._uses_plain(kinds, inner, out, block)
        padding = _block_padding(out, block) * np.where(inner >= block, _block_padding(inner, block), 1.0)
        convolutions = np.isin(self._inference_kinds, CONVOLUTION_KINDS)
        # A blocked kernel computes whole blocks, also of channels that aren't there.
        padding_factor = np.where(plain, 1.0, np.where(convolutions, padding, _block_padding(out, block)))
        positions = np.maximum(self._positions, 1)
        tile_factor = np.where(plain, np.ceil(positions / TILE_COLUMNS) * TILE_COLUMNS / positions, 1.0)
        macs = np.where(
            convolutions, macs * padding_factor * tile_factor, np.where(self._is_depthwise, macs * padding_factor, macs)
        )
        # Plain kernels lay out every window of their input first.
        taps = np.where(plain & (self._kernels > 1) & (kinds == KIND_INDEX["conv"]), self._kernels / self._strides, 1.0)
        small = self._positions < MIN_LARGE_MAP
        for blocked, plain_kind in PLAIN_KIND_OF.items():
            is_plain_kind = plain & (kinds == KIND_INDEX[blocked])
            kinds[is_plain_kind & ~small] = KIND_INDEX[plain_kind]
            kinds[is_plain_kind & small] = KIND_INDEX.get(f"{plain_kind}-small", KIND_INDEX[plain_kind])
        moved_elements = (inputs * taps + outputs) * batch
        rows = np.stack([np.ones_like(macs), np.zeros_like(macs), macs, moved_elements, weights], -1)
        return self._sum_by_kind(np.where((kinds >= 0)[..., None], rows, 0.0), np.maximum(kinds, 0))

    @staticmethod
    def _uses_plain(kinds: npt.NDArray[np.int64], inner: Numbers, out: Numbers, block: int) -> npt.NDArray[np.bool_]:
        """Whether onnxruntime can't use its blocked kernels, per widths and layer."""
        dense_kinds = np.isin(kinds, [KIND_INDEX["conv"], KIND_INDEX["conv1x1"]])
        # Less than a block of input channels (an image's) has a kernel of its own.
        misaligned = (inner >= block) & (inner % ALIGNMENT > 0)
        misaligned_depthwise = (kinds == KIND_INDEX["depthwise"]) & (out % ALIGNMENT > 0)
        return np.asarray((dense_kinds & misaligned) | misaligned_depthwise)

    def _sum_by_kind(self, rows: Numbers, kinds: npt.NDArray[np.int64]) -> Numbers:
        """Sums of rows by kind, with one "run" for the whole graph."""
        sums = np.zeros((len(rows), len(KINDS), len(FEATURES)))
        for k in range(len(KINDS) - 1):
            mask = kinds == k
            if mask.any():
                sums[:, k] = np.where(mask[..., None], rows, 0.0).sum(1)
        sums[:, -1, 0] = 1
        return sums.reshape(len(sums), -1)


def _block_padding(channels: Numbers, block: int) -> Numbers:
    """The factor by which channels grow when they fill whole blocks."""
    return np.asarray(np.ceil(channels / block) * block / np.maximum(channels, 1))


def workload(architecture: Architecture) -> Workload:
    """The workload of an architecture; the last few are remembered."""
    return _cached_workload(ArchitectureKey(architecture))


class ArchitectureKey:
    """An architecture, compared by its digest."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture

    def __hash__(self) -> int:
        return hash(self.architecture.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArchitectureKey) and other.architecture.digest == self.architecture.digest


@lru_cache(maxsize=8)
def _cached_workload(key: ArchitectureKey) -> Workload:
    return Workload(key.architecture)


def _hashable_widths(widths: npt.ArrayLike) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, np.atleast_2d(np.asarray(widths, float)).tolist()))
