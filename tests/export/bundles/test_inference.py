"""Inference graphs read their weights from the tensor file beside them, so that a board can swap the file alone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedprune.core import tensorfile
from fedprune.runtime.session import OnnxSession
from fedprune_export.bundles.inference import inference_model
from fedprune_export.pruning.cut import cut
from fedprune_export.pruning.model import Model
from support.oracles.cutting import distance, inputs, outputs, random_selection

pytestmark = pytest.mark.torch

Imported = Callable[[str], Model]


def test_swapping_the_weights_file_swaps_the_model(imported: Imported, tmp_path: Path) -> None:
    model = imported("resnet20_bn")
    first_selection, second_selection = (random_selection(model, 0.5, seed) for seed in (1, 2))
    graph, weights, x = tmp_path / "inference.onnx", tmp_path / "weights.safetensors", inputs(model, 3)
    graph.write_bytes(inference_model(model, first_selection.widths))
    weights.write_bytes(tensorfile.encode(first_selection.gather(model.tensors)))
    first = OnnxSession(graph).run({"x": x})["logits"]
    weights.write_bytes(tensorfile.encode(second_selection.gather(model.tensors)))
    second = OnnxSession(graph).run({"x": x})["logits"]
    assert distance(first, outputs(cut(model, first_selection), x)) < 1e-6
    assert distance(second, outputs(cut(model, second_selection), x)) < 1e-6
    assert distance(first, second) > 1e-2


def test_the_graph_holds_no_weights(imported: Imported) -> None:
    model = imported("vgg11_bn")
    raw = inference_model(model, model.architecture.sizes)
    assert len(raw) < 32 * 1024
    assert sum(v.nbytes for v in model.tensors.values()) > 10 * len(raw)
