"""Optimal-transport alignment of one model with another's channels, layer by layer (SubFLOT, arXiv 2604.06631, Alg. 1).

For the weight W of every layer in the order of the graph, with the rows of its output axis as its channels:

1. Its input axes are transported by the plans of the groups that they read: Ŵ = W·T_in (Eq. 3).
2. C_jk = ‖Ŵ_j − V_k‖ against the other model's rows V_k (Euclidean, over all taps), and T is the plan of least cost
   between uniform marginals (Eq. 4), with its columns divided by their sums.
3. W_aligned = Tᵀ·Ŵ (Eq. 5). Layers that read these channels are transported by the same T.

Axes that no cut touches, such as the image's colours and the classes, keep their order: T = I. Biases, norm vectors and
statistics use the plan of the layer that they follow. A depthwise weight has no plan of its own: it takes the plan of
its input channels, and passes it on. Where several layers write to one group (residual streams), each layer uses its
own plan; layers that read the sum, and norms after it, use the running average T ← (T + T_l)/2. An embedding that other
layers add to has a plan of its own, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError
from fedprune.model.architecture import Architecture, Axis, TensorKind
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.optimal_transport.axis_blocks import Block, blocks_of_axis, channel_rows, transport_axis
from fedprune.strategies.optimal_transport.coupling import SCRATCH, Coupling
from fedprune.strategies.optimal_transport.layer_order import LayerStep, layer_steps
from fedprune.strategies.optimal_transport.residual_sums import after_sums
from fedprune.strategies.optimal_transport.solver import exact_plan

Floats = npt.NDArray[np.float32]

# Squared distances below this share of ‖a‖² + ‖b‖² are recomputed: cancellation leaves them too few digits.
_NEAR_SHARE = 1e-4

_BLOCK_SIZE = 1 << 20


def align(
    source: Mapping[str, Floats], source_selection: Selection, target: Mapping[str, Floats], target_selection: Selection
) -> Tensors:
    """The source model on the target's channels: W_aligned, in the target's shapes.

    A selection has the widths of its model, and says where the model's channels live. Raises `BundleError` if the
    selections are of different architectures, tensors don't fit them, or costs are not finite; `MissingExtraError` if
    POT or scipy is not installed.
    """
    if source_selection.architecture.digest != target_selection.architecture.digest:
        raise BundleError("transport between models of different architectures")
    _check_tensors(source, source_selection)
    _check_tensors(target, target_selection)
    return _Alignment(source, source_selection, target, target_selection).run()


def prune(
    model: Mapping[str, Floats], history: Mapping[str, Floats], selection: Selection, alpha: float = 0.5
) -> Tensors:
    """OTP: α·(the global model on the history's channels) + (1 − α)·history (Eq. 6), with α from 0 to 1 and the
    device's last update, whose channels the selection says, as its history. Raises as `align`."""
    # With alpha 0 the result is the history itself, so no plan is solved.
    if alpha == 0:
        _check_tensors(history, selection)
        return {t.name: history[t.name].copy() for t in selection.architecture.tensors}
    return _mix_with_history(align(model, Selection.full(selection.architecture), history, selection), history, alpha)


def aggregate(local: Mapping[str, Floats], selection: Selection, model: Mapping[str, Floats]) -> Tensors:
    """OTA: a device's trained model on the global model's channels, at full width (Eq. 9). `model` is the global model
    that it was extracted from. Raises as `align`."""
    return align(local, selection, model, Selection.full(selection.architecture))


def _mix_with_history(aligned: Tensors, history: Mapping[str, Floats], alpha: float) -> Tensors:
    if alpha == 1:
        return aligned
    for name, value in aligned.items():
        # What was transported is new memory and may be scaled in place; other tensors may still be views.
        if not value.flags.writeable or np.shares_memory(value, history[name]):
            value = value.copy()
        value *= np.float32(alpha)
        value += np.multiply(history[name], np.float32(1 - alpha), out=SCRATCH.array("mixed", value.shape))
        aligned[name] = value
    return aligned


def _check_tensors(tensors: Mapping[str, Floats], selection: Selection) -> None:
    for name, shape in selection.shapes().items():
        value = tensors.get(name)
        if value is None or value.shape != shape or value.dtype != np.float32:
            raise BundleError(
                f"tensor {name} of a transported model",
                expected=f"float32 {shape}",
                got="nothing" if value is None else f"{value.dtype} {value.shape}",
            )


class _Alignment:
    """The alignment of one model with another's channels.

    Plans are solved in the order of the layers, and remembered by group:

    - `reader_plans`: for layers that read the group from here on;
    - `layer_plans`: of one layer, by its weight's name: for the layer's own bias, norm and statistics;
    - `unwritten_plans`: of groups that are read before any layer has written to them;
    - `stream_plans`: by the name of a tensor after a sum, such as a norm's: the average of the summed layers' plans.
    """

    def __init__(
        self,
        source: Mapping[str, Floats],
        source_selection: Selection,
        target: Mapping[str, Floats],
        target_selection: Selection,
    ) -> None:
        self.source, self.source_selection = source, source_selection
        self.target, self.target_selection = target, target_selection
        self.architecture: Architecture = source_selection.architecture
        self.reader_plans: dict[int, Coupling] = {}
        self.layer_plans: dict[str, dict[int, Coupling]] = {}
        self.unwritten_plans: dict[int, Coupling] = {}
        self.stream_plans: dict[str, dict[int, Coupling]] = {}
        self._blocks: dict[tuple[Axis, bool], tuple[Block, ...]] = {}

    def run(self) -> Tensors:
        aligned: Tensors = {}
        order = layer_steps(self.architecture)
        summed = after_sums(self.architecture, order)
        for step in order:
            inner, plans = self._solve(step)
            aligned[step.name] = self._transport_outputs(step, inner, {**self.reader_plans, **plans})
            for name in summed.get(step.name, ()):
                axes = self.architecture.by_name[name].axes
                self.stream_plans[name] = self._reader_plans(sorted({g for a in axes for g in a.groups}))
        self._align_others(aligned)
        return {t.name: aligned[t.name] for t in self.architecture.tensors}

    def _align_others(self, aligned: Tensors) -> None:
        """Transport every tensor that isn't a layer's weight, by its channels' plan at its point of the graph. It is
        the plan of the last layer before it that writes to these channels or, after a sum, the stream's average.
        Vectors with the same plans, such as those of a norm, are transported together."""
        latest_plans: dict[int, Coupling] = {}
        vectors: dict[tuple[Axis, tuple[Coupling, ...]], list[str]] = {}
        for spec in self.architecture.tensors:
            if spec.name in aligned:
                latest_plans.update(self.layer_plans.get(spec.name, {}))
                continue
            groups = sorted({g for axis in spec.axes for g in axis.groups})
            known_plans = {**self.unwritten_plans, **latest_plans, **self.stream_plans.get(spec.name, {})}
            couplings = {g: known_plans[g] if g in known_plans else self._reader_plan(g) for g in groups}
            if len(spec.axes) == 1 and groups:
                vectors.setdefault((spec.axes[0], tuple(couplings.values())), []).append(spec.name)
                continue
            value = self.source[spec.name]
            for axis_index, axis in enumerate(spec.axes):
                if axis.groups:
                    value = self._transport(value, axis_index, axis, couplings)
            aligned[spec.name] = value if value is not self.source[spec.name] else value.copy()
        for (axis, plans), names in vectors.items():
            stacked_vectors = np.stack([self.source[name] for name in names])
            rows = self._transport(stacked_vectors, 1, axis, dict(zip(axis.groups, plans, strict=True)))
            aligned.update(zip(names, rows, strict=True))

    def _solve(self, step: LayerStep) -> tuple[Floats, dict[int, Coupling]]:
        """Solve for the plans of a layer; returns its weight with transported inputs, and the plans."""
        inner = self.source[step.name]
        for i in step.inputs:
            plans_of_input = self._reader_plans(step.axes[i].groups)
            inner = self._transport(inner, i, step.axes[i], plans_of_input, buffer_name=f"input {i}")
        plans: dict[int, Coupling] = {}
        for group in step.planned_groups:
            squared = self._distances(step, inner, group)
            plan = plans[group] = exact_plan(np.sqrt(squared, out=squared))
            before = self.reader_plans.get(group)
            self.reader_plans[group] = plan if before is None else before.average_with(plan)
        if plans:
            self.layer_plans[step.name] = plans
        return inner, plans

    def _reader_plan(self, group: int) -> Coupling:
        if group not in self.reader_plans:
            self.reader_plans[group] = self.unwritten_plans[group] = self._unwritten_plan(group)
        return self.reader_plans[group]

    def _reader_plans(self, groups: Sequence[int]) -> dict[int, Coupling]:
        return {g: self._reader_plan(g) for g in groups}

    def _unwritten_plan(self, group: int) -> Coupling:
        """The plan of a group that is read before any layer has written to it. If its channels are the columns of an
        embedding table (also of one that is tied to the last layer), they are aligned; otherwise they keep their order.
        """
        weights = {n.weight for n in self.architecture.layers}
        tables = [t for t in self.architecture.tensors if t.kind is TensorKind.WEIGHT]
        for spec in sorted(tables, key=lambda t: t.name in weights):
            axes = [i for i, axis in enumerate(spec.axes) if group in axis.groups]
            other_groups = {g for axis in spec.axes for g in axis.groups} - {group}
            if len(axes) == 1 and not other_groups:
                axis = spec.axes[axes[0]]
                source_rows = channel_rows(self.source[spec.name], axes[0], self._blocks_of(axis, source=True), group)
                target_rows = channel_rows(self.target[spec.name], axes[0], self._blocks_of(axis, source=False), group)
                return exact_plan(np.sqrt(squared_distances(source_rows, target_rows)))
        return Coupling.in_order(self.source_selection.widths[group], self.target_selection.widths[group])

    def _transport_outputs(self, step: LayerStep, value: Floats, couplings: Mapping[int, Coupling]) -> Floats:
        for i in step.outputs:
            axis = step.axes[i]
            if axis.groups:
                output_plans = {g: couplings[g] if g in couplings else self._reader_plan(g) for g in axis.groups}
                value = self._transport(value, i, axis, output_plans)
        return value if any(step.axes[i].groups for i in step.outputs) else value.copy()

    def _distances(self, step: LayerStep, inner: Floats, group: int) -> Floats:
        """‖Ŵ_j − V_k‖² of all pairs of rows. The product Ŵ·Vᵀ = (W·T)·Vᵀ = W·(V·Tᵀ)ᵀ is taken on the side with fewer
        input channels."""
        out = step.outputs[0]
        axis = step.axes[out]
        source_blocks, target_blocks = self._blocks_of(axis, source=True), self._blocks_of(axis, source=False)
        untransported, target = self.source[step.name], self.target[step.name]
        source_rows = channel_rows(inner, out, source_blocks, group)
        target_rows = channel_rows(target, out, target_blocks, group)
        # A product is cheapest on the side with fewer columns; several output axes have no such form.
        if untransported.size >= inner.size or len(step.outputs) > 1:
            return squared_distances(source_rows, target_rows)
        for i in step.inputs:
            axis = step.axes[i]
            input_plans = self._reader_plans(axis.groups)
            target = self._transport(target, i, axis, input_plans, adjoint=True, buffer_name=f"adjoint {i}")
        weights = channel_rows(untransported, out, source_blocks, group)
        products = weights @ channel_rows(target, out, target_blocks, group).T
        return squared_distances(source_rows, target_rows, products=products)

    def _transport(
        self,
        value: Floats,
        axis_index: int,
        axis: Axis,
        couplings: Mapping[int, Coupling],
        *,
        adjoint: bool = False,
        buffer_name: str = "",
    ) -> Floats:
        blocks_before, blocks_after = self._blocks_of(axis, source=not adjoint), self._blocks_of(axis, source=adjoint)
        return transport_axis(
            value, axis_index, blocks_before, blocks_after, couplings, adjoint=adjoint, buffer_name=buffer_name
        )

    def _blocks_of(self, axis: Axis, *, source: bool) -> tuple[Block, ...]:
        key = (axis, source)
        if key not in self._blocks:
            self._blocks[key] = blocks_of_axis(axis, self.source_selection if source else self.target_selection)
        return self._blocks[key]


def squared_distances(a: Floats, b: Floats, products: Floats | None = None) -> Floats:
    """‖a_j − b_k‖² [n, m] for all pairs of rows of a [n, f] and b [m, f], from one matrix product. `products` are a·bᵀ,
    if known; they are overwritten. Distances are exactly 0 for equal rows. Others have a relative error below 1 %, and
    far less for rows that differ by more than 1 %."""
    squared_norms_a, squared_norms_b = _squared_norms(a), _squared_norms(b)
    out: Floats = a @ b.T if products is None else products
    out *= -2
    out += squared_norms_a[:, None]
    out += squared_norms_b
    # Rows are usually far apart: checking the smallest distance first avoids comparing each with its own bound.
    if out.size and float(out.min()) < _NEAR_SHARE * float(squared_norms_a.max() + squared_norms_b.max()):
        near = np.flatnonzero((out < _NEAR_SHARE * (squared_norms_a[:, None] + squared_norms_b)).reshape(-1))
        _recompute(out, a, b, near)
    return out


def _squared_norms(a: Floats) -> Floats:
    """‖a_j‖² of all rows, as batched row × column products, which in BLAS are bound by memory bandwidth."""
    norms: Floats = np.matmul(a[:, None], a[:, :, None]).reshape(-1)
    return norms


def _recompute(out: Floats, a: Floats, b: Floats, pairs: npt.NDArray[np.int64]) -> None:
    """Recompute squared distances: of a few pairs from differences, of many by a product in float64."""
    if pairs.size > 4 * (a.shape[0] + b.shape[0]):
        middle = b.mean(0, dtype=np.float64)
        centred_a, centred_b = a - middle, b - middle
        exact = (
            np.einsum("ij,ij->i", centred_a, centred_a)[:, None]
            + np.einsum("ij,ij->i", centred_b, centred_b)
            - 2 * (centred_a @ centred_b.T)
        )
        out[...] = np.maximum(exact, 0)
        pairs = np.flatnonzero((exact < 1e-12 * np.abs(exact).max()).reshape(-1))
    flat = out.reshape(-1)
    chunk_size = max(1, _BLOCK_SIZE // max(1, a.shape[1]))
    for start in range(0, pairs.size, chunk_size):
        chunk = pairs[start : start + chunk_size]
        differences = a[chunk // b.shape[0]] - b[chunk % b.shape[0]]
        flat[chunk] = np.einsum("ij,ij->i", differences, differences)
