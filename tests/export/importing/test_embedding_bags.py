"""EmbeddingBag of a torch module is a lookup with the numbers of torch; in a file it is a loop, and refused."""

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


def exported(module: nn.Module, *, dynamo: bool) -> bytes:
    x, file = torch.ones(3, LENGTH, dtype=torch.int64), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            keep_translations()
            shapes = ({0: torch.export.Dim("n")},)
            program = torch.onnx.export(module, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
            return program.model_proto.SerializeToString()
        names: dict[str, Any] = {"input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
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


@pytest.mark.parametrize("dynamo", [False, True])
def test_a_file_has_loops_and_is_refused_in_favour_of_its_module(*, dynamo: bool) -> None:
    module = Bags("mean").eval()
    with pytest.raises(ModelError, match="Loop") as refusal:
        import_onnx(exported(module, dynamo=dynamo), "net")
    assert "give its torch module itself" in str(refusal.value)
    check_equal(load(module), module)


@pytest.mark.parametrize(("mode", "padding"), [("sum", None), ("mean", 0), ("max", 0), ("sum", -ROWS)])
def test_a_module_with_bags(mode: str, padding: int | None) -> None:
    module = Bags(mode, padding).eval()
    model = load(module)
    check_equal(model, module)
    assert "bags.weight" in {t.name for t in model.architecture.tensors}
