"""Lowers a model to float16 or int8: the graph that a board runs, and the graphs that make its tensors.

Weights change after every round, and a board converts them itself. Here passes over the graph fold its norms
(`folding`), and then convert it to float16 (`half`) or quantise it (`quantisation_plan`, `quantisation`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from fedprune.core.errors import ModelError
from fedprune.runtime.precision import RANGES, pack_graphs, prepare_tensors
from fedprune.runtime.precision_files import PRECISIONS, calibrate_file, graph_file, prepare_file, weights_file
from fedprune.runtime.session import OnnxSession
from fedprune_export.precision.folding import fold_norms
from fedprune_export.precision.half import convert_to_float16
from fedprune_export.precision.lowered_pair import LoweredPair
from fedprune_export.precision.quantisation import quantise, use_quantisable_forms
from fedprune_export.precision.quantisation_plan import QuantisationPlan, calibration_graph, plan_quantisation
from fedprune_export.pruning.model import Model


@dataclass(frozen=True)
class Lowered:
    """The graphs of one precision.

    Attributes:
        graph: The inference graph; its tensors are external data in the file
            `fedprune.runtime.precision_files.weights_file`.
        prepare: The graph from float32 weights, and for int8 ranges of activations, to these tensors.
        calibrate: The graph from a batch of samples to ranges of activations; None where none are needed.
        activations: Names of the activations with ranges, in the order of the ranges; empty where none are needed.
        layers: Outputs of the layers that compute with 8 bits, in order.
        float32_nodes: Descriptions of the nodes that stay in float32; empty for precision "float32".
    """

    precision: str
    graph: bytes
    prepare: bytes
    calibrate: bytes | None
    activations: tuple[str, ...]
    layers: tuple[str, ...]
    float32_nodes: tuple[str, ...]

    @property
    def files(self) -> dict[str, bytes]:
        p = self.precision
        files = {graph_file(p): self.graph, prepare_file(p): self.prepare}
        return files if self.calibrate is None else {**files, calibrate_file(p): self.calibrate}

    @property
    def packed(self) -> bytes:
        """The graphs as they travel to a board."""
        return pack_graphs(self.files)


def lower(model: Model, widths: Sequence[int], precision: str, *, keep: Collection[str] = ()) -> Lowered:
    """Lower a submodel. The result depends on widths alone, not on weights.

    Args:
        precision: One of `fedprune.runtime.precision_files.PRECISIONS`.
        keep: With int8, outputs of layers that stay in float32.

    Raises:
        BundleError: The widths don't fit the architecture.
        ModelError: There is no such precision, or nothing of the model can be computed with 8 bits.
    """
    if precision not in PRECISIONS:
        raise ModelError("precision", expected=" or ".join(PRECISIONS), got=precision)
    if model.base is not None:
        raise ModelError(
            f"precision {precision!r} of a model whose frozen weights are in {model.base.precision} already",
            hint="Leave --precision (precisions) or --base-precision (base) out.",
        )
    pair = LoweredPair(model, widths)
    fold_norms(pair)
    stays: list[str] = []
    calibrate, plan = None, QuantisationPlan()
    if precision == "float16":
        stays = convert_to_float16(pair)
    elif precision == "int8":
        use_quantisable_forms(pair)
        plan = plan_quantisation(pair, keep)
        if not plan.layers:
            raise ModelError(
                f"no layer of {model.architecture.name} can be computed with 8 bits",
                expected="a convolution, or a product with a weight of two axes",
                hint="Leave int8 out of --precision.",
            )
        calibrate = calibration_graph(model, widths, plan)
        stays = quantise(pair, plan)
    pair.finish()
    return _serialise(pair, precision, calibrate, plan, tuple(stays))


def _serialise(
    pair: LoweredPair, precision: str, calibrate: bytes | None, plan: QuantisationPlan, stays: tuple[str, ...]
) -> Lowered:
    """Write the graphs as bytes."""
    # Types and shapes of the tensors are seen by a run of the prepare graph on zeros: exact, and simpler than
    # inference.
    rows = sum(p.name == RANGES and int(p.shape[0] or 0) for p in pair.prepare.inputs)
    ranges = np.zeros((rows, 2), np.float32) if precision == "int8" else None
    outputs = prepare_tensors(OnnxSession(pair.prepare.to_bytes()), pair.zero_weights(), ranges)
    tensors = {n: v for n, v in outputs.items() if n != RANGES}
    return Lowered(
        precision=precision,
        graph=pair.graph_bytes(outputs, weights_file(precision)),
        prepare=pair.prepare_bytes(tensors),
        calibrate=calibrate,
        activations=tuple(plan.values),
        layers=tuple(plan.layers),
        float32_nodes=stays,
    )
