"""Frozen weights in low precision: float16, or int8 with one scale per output channel.

They are constants of a model instead of tensors of its architecture: no update, optimiser state or anchor has them.
A model's own graph holds them as float32 numbers that low precision represents exactly. Graphs for boards read the
stored numbers (`base_reads`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from fedprune.core.errors import ModelError
from fedprune.core.validation import check_word
from fedprune.model.architecture import Architecture, BaseSpec
from fedprune.model.axis import Axis
from fedprune.model.cost_table import LayerRow
from fedprune.model.step_contract import base_name, base_scale_name
from fedprune_export.ir.graph import Array, Graph
from fedprune_export.model_options import Base

# Symmetric int8: -128 is left out, so that a number and its negative have the same precision.
_MAX_INT8 = 127
# Scales keep 16 significant bits: their product with 7 bits is then exact in float32 and gives the same scale again.
_SCALE_BITS = np.uint32(0xFFFFFF00)


@dataclass(frozen=True)
class FrozenBase:
    """The tensors that are stored in low precision. `axes`: per tensor the axis of its int8 scales, or None."""

    precision: str
    axes: Mapping[str, int | None]

    def stored_arrays(self, name: str, value: Array) -> dict[str, Array]:
        """The stored form of a tensor: its numbers, and with int8 its scales [output channels]."""
        axis = self.axes[name]
        # Biases and norms stay in float32: they are a small share of the bytes.
        if value.ndim < 2:
            return {base_name(name): value}
        if axis is None:
            return {base_name(name): value.astype(np.float16)}
        scale = _scales(value, axis)
        numbers = np.rint(value / _broadcast_scale(scale, axis, value.ndim)).astype(np.int8)
        return {base_name(name): numbers, base_scale_name(name): scale}

    def rounded_values(self, name: str, value: Array) -> Array:
        """A tensor's float32 values as a board dequantises them; stored again, they give the same bytes."""
        arrays = self.stored_arrays(name, value)
        numbers = arrays[base_name(name)].astype(np.float32)
        axis = self.axes[name]
        return numbers if axis is None else numbers * _broadcast_scale(arrays[base_scale_name(name)], axis, value.ndim)

    def tensors(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """The stored form of all tensors, by the names that graphs have for them."""
        return {k: v for name in self.axes for k, v in self.stored_arrays(name, values[name]).items()}

    def specs(self, values: Mapping[str, Array]) -> tuple[BaseSpec, ...]:
        """Names, types and shapes of the stored arrays."""
        return tuple(BaseSpec(k, _SAFETENSORS_TYPES[v.dtype.name], v.shape) for k, v in self.tensors(values).items())


_SAFETENSORS_TYPES = {"float32": "F32", "float16": "F16", "int8": "I8"}


def freeze_base(
    graph: Graph, architecture: Architecture, frozen: Iterable[str], precision: str
) -> tuple[FrozenBase, Architecture]:
    """Store the frozen weights of a model in `precision`; returns this base and the architecture without them.

    Rounds the weights in the graph. Raises `ModelError` if there are none, or one can't be stored.
    """
    check_precision(precision)
    names = [n for n in frozen if n in architecture.by_name]
    if not names:
        raise ModelError(
            f"base {precision!r}",
            expected="a model with frozen weights",
            got="none",
            hint="Give adapters, too (--lora, lora=), or freeze weights in torch (requires_grad=False).",
        )
    outputs = _output_axes(graph, architecture, set(names)) if precision == "int8" else {}
    frozen_base = FrozenBase(precision, {n: outputs.get(n) for n in names})
    for name in names:
        value = graph.initializers[name]
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = frozen_base.rounded_values(name, value)
        if not np.isfinite(rounded).all():
            raise ModelError(
                f"base {precision!r}: {name} has numbers that it can't hold",
                expected="finite numbers up to 65504",
                got=f"{np.abs(value).max():g}",
            )
        graph.initializers[name] = rounded
    tensors = tuple(t for t in architecture.tensors if t.name not in frozen_base.axes)
    layers = tuple(_without_weight(r, architecture) if r.weight in frozen_base.axes else r for r in architecture.layers)
    return frozen_base, replace(
        architecture, tensors=tensors, layers=layers, base=frozen_base.specs(graph.initializers)
    )


def check_precision(precision: object) -> None:
    """Raise `ModelError` for a precision that is none of `Base`."""
    check_word("base", precision, get_args(Base), error=ModelError)


def _without_weight(layer: LayerRow, architecture: Architecture) -> LayerRow:
    """A layer of frozen weights without its tensor: a product of as many multiplications, so that its cost stays."""
    products = math.prod(architecture.by_name[layer.weight].shape) * layer.positions
    outputs = max(1, layer.output_volume.size(architecture.sizes, architecture.sizes))
    return replace(layer, weight="", positions=0, output_axis=0, inner=Axis.fixed(max(1, products // outputs)))


def _output_axes(graph: Graph, architecture: Architecture, names: set[str]) -> dict[str, int]:
    """The axis of each matrix that its output channels are on; of an embedding that is only looked up, the last one."""
    axes = {r.weight: r.output_axis for r in architecture.layers if r.weight in names}
    for node in graph.nodes:
        if node.op == "Gather" and node.attrs.get("axis", 0) == 0 and node.inputs[0] in names:
            axes.setdefault(node.inputs[0], len(architecture.by_name[node.inputs[0]].axes) - 1)
    return {n: axis for n, axis in axes.items() if len(architecture.by_name[n].axes) > 1}


def _scales(value: Array, axis: int) -> Array:
    """Scales [channels] that map the largest number of each channel to 127; 1 for a channel of zeros."""
    largest = np.abs(value).max(tuple(i for i in range(value.ndim) if i != axis))
    scale = np.asarray(largest / np.float32(_MAX_INT8), np.float32)
    # Rounded to the nearest: half of the cleared bits is added before. A carry into the exponent is right, too.
    bits = scale.view(np.uint32)
    scale = ((bits + np.uint32(0x80)) & _SCALE_BITS).view(np.float32)
    return np.asarray(np.where(scale > 0, scale, np.float32(1)))


def _broadcast_scale(scale: Array, axis: int, rank: int) -> Array:
    return scale.reshape([-1 if i == axis else 1 for i in range(rank)])
