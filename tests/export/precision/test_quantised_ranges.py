"""A model from a quantised file is exported with 8 bits by the file's own ranges of activations."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

from fedprune.core import tensorfile
from fedprune.runtime.bundle import INFERENCE, WEIGHTS
from fedprune.runtime.precision import RANGES
from fedprune.runtime.precision_files import weights_file
from fedprune_export.bundles.conversion import onnx_file
from fedprune_export.bundles.inference import inference_model
from fedprune_export.importing import import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.precision import PrecisionTrials
from fedprune_export.pruning.model import Model
from support.oracles.cutting import random_selection

F32 = np.dtype(np.float32)
PICTURES = np.random.default_rng(0).random((32, 3, 8, 8), np.float32)


def net() -> bytes:
    """Two convolutions with a bypass, and a dense layer."""
    rng = np.random.default_rng(1)
    g = Graph(inputs=[Port("image", F32, ("N", 3, 8, 8))])
    for name, shape in {"a": (6, 3, 3, 3), "b": (6, 6, 3, 3), "o": (6, 4)}.items():
        g.initializers[name] = rng.standard_normal(shape).astype(np.float32) * 0.3
    pad = {"pads": [1, 1, 1, 1]}
    h = g.emit("Relu", g.emit("Conv", "image", "a", attrs=pad, out="ca"), out="ra")
    h = g.emit("Relu", g.emit("Add", h, g.emit("Conv", h, "b", attrs=pad, out="cb"), out="sum"), out="rb")
    h = g.emit("Flatten", g.emit("GlobalAveragePool", h, out="mean"), out="flat")
    g.outputs = [Port(g.emit("MatMul", h, "o", out="scores"), F32, ("N", 4))]
    return g.to_bytes()


class Samples(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self._batches = iter([{"image": PICTURES}])

    def get_next(self) -> Mapping[str, Any] | None:
        return next(self._batches, None)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    before, after = (tmp_path_factory.mktemp("net") / name for name in ("float.onnx", "quantised.onnx"))
    before.write_bytes(net())
    quantize_static(before, after, Samples(), quant_format=QuantFormat.QDQ)
    return after.read_bytes()


def trials(model: Model, density: float) -> PrecisionTrials:
    selection = random_selection(model, density, seed=1)
    weights = tensorfile.encode(selection.gather(model.tensors))
    files = {INFERENCE: inference_model(model, selection.widths), WEIGHTS: weights}
    return PrecisionTrials(model, selection.widths, files, None)


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_int8_begins_with_the_ranges_of_the_file(quantised: bytes, density: float) -> None:
    model = import_onnx(quantised, "net")
    trial = trials(import_onnx(onnx_file(model.graph, model.tensors, "net"), "net"), density).run("int8")
    ranges = tensorfile.decode(trial.files[weights_file("int8")])[RANGES]
    # The pictures are from 0 to 1, and everything behind Relu begins at 0.
    assert ranges.shape == (len(trial.lowered.activations), 2)
    np.testing.assert_allclose(ranges[0], [0, PICTURES.max()], rtol=1e-5)
    assert (ranges[:, 1] > 0).all()
    assert trial.agreement.error < 0.05
    assert "quantised file" in trial.warning
