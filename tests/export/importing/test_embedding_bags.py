"""EmbeddingBag as torch's exporters write it is a lookup, and has the numbers of torch and of onnxruntime."""

import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedprune.core.errors import ModelError
from fedprune.model.features import Features
from fedprune_export.importing import import_onnx, load
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.nets.exporter import keep_translations
from support.oracles.cutting import distance, outputs

LENGTH, ROWS = 7, 20


class Bags(nn.Module):
    input_shape = (LENGTH,)
    input_dtype = "int64"

    def __init__(self, mode: str, padding: int | None = None) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(ROWS, 8, mode=mode, padding_idx=padding)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.bags(x)))


class WeightedBags(Bags):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.bags(x, per_sample_weights=0.1 * x.float())))


class FlatBags(Bags):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.bags(x.flatten(), torch.tensor([0, 5, 9])))


def exported(module: nn.Module, *, dynamo: bool, batch: int | None = None) -> bytes:
    x, file = torch.ones(batch or 3, LENGTH, dtype=torch.int64), io.BytesIO()
    free = batch is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            keep_translations()
            shapes = ({0: torch.export.Dim("n")},) if free else None
            program = torch.onnx.export(module, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
            return program.model_proto.SerializeToString()
        names: dict[str, Any] = {"input_names": ["x"], "dynamic_axes": {"x": {0: "n"}} if free else None}
        torch.onnx.export(module, (x,), file, dynamo=False, opset_version=17, **names)
    return file.getvalue()


def check_equal(model: Model, module: nn.Module) -> None:
    """The import has torch's numbers; the table is trained and its columns are cut."""
    x = np.random.default_rng(0).integers(0, ROWS, (5, LENGTH))
    x[0] = 0
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    assert distance(outputs(model.graph, x), expected) < 1e-5
    assert [g.size for g in model.architecture.groups] == [8]
    training_graph(model, Features())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_loop_of_the_older_exporter_is_a_lookup(mode: str) -> None:
    module = Bags(mode).eval()
    model = import_onnx(exported(module, dynamo=False), "net")
    check_equal(model, module)
    assert any("EmbeddingBag" in note for note in model.notes)


def test_a_loop_over_a_fixed_batch_becomes_free() -> None:
    module = Bags("mean").eval()
    check_equal(import_onnx(exported(module, dynamo=False, batch=4), "net"), module)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_a_loop_of_the_newer_exporter_is_a_lookup(mode: str) -> None:
    module = Bags(mode).eval()
    check_equal(import_onnx(exported(module, dynamo=True), "net"), module)


@pytest.mark.parametrize("dynamo", [False, True])
def test_weights_of_the_rows_of_a_bag(dynamo: bool) -> None:
    module = WeightedBags("sum").eval()
    check_equal(import_onnx(exported(module, dynamo=dynamo), "net"), module)


@pytest.mark.parametrize(("mode", "padding"), [("sum", None), ("mean", 0), ("max", 0), ("sum", -ROWS)])
def test_a_module_with_bags(mode: str, padding: int | None) -> None:
    module = Bags(mode, padding).eval()
    model = load(module)
    check_equal(model, module)
    assert "bags.weight" in {t.name for t in model.architecture.tensors}


def test_bags_of_different_lengths_are_refused() -> None:
    with pytest.raises(ModelError, match="Loop"):
        import_onnx(exported(FlatBags("mean").eval(), dynamo=False, batch=3), "net")
