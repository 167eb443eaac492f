"""Instance norms with running statistics: a step normalises each sample by itself, and moves them as torch."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fedprune.core.errors import ModelError
from fedprune.model import step_contract
from fedprune.model.features import Features
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.model.step_feeds import first_step_feeds
from fedprune.runtime.session import OnnxSession
from fedprune_export.bundles.conversion import onnx_file
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.pruning.cut import cut
from fedprune_export.training.step_graph import training_graph

pytestmark = pytest.mark.torch

CLASSES, SAMPLES = 3, 6


class Net(nn.Module):
    input_shape = (2, 5, 5)

    def __init__(self, affine: bool, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3)
        self.norm = nn.InstanceNorm2d(width, affine=affine, track_running_stats=True, momentum=0.3)
        self.fc = nn.Linear(width * 9, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))


def trained_net(affine: bool) -> Net:
    """A net whose statistics aren't those that it begins with."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net(affine)
        net.train()(torch.randn(4, 2, 5, 5) * 2 + 1)
    return net


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("width", [8, 5])
def test_a_step_is_torchs_at_every_width(affine: bool, width: int) -> None:
    model = import_onnx(export_torch(trained_net(affine)), "net")
    model = import_onnx(onnx_file(model.graph, model.tensors, "net"), "net")  # the file says it, too
    assert not model.notes
    assert model.architecture.sizes == (8,)
    selection = Selection.of(model.architecture, [width])
    tensors = selection.gather(model.tensors)
    session = OnnxSession(training_graph(model, Features(gradients=True)).to_bytes(), training=True)
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((SAMPLES, 2, 5, 5), np.float32) + 2, rng.integers(0, CLASSES, SAMPLES)
    feeds: dict[str, Any] = first_step_feeds(Recipe(report_squares=True), tensors, session.inputs, y, CLASSES)
    out = session.run({**feeds, step_contract.X: x, step_contract.Y: y})

    net = Net(affine, width)
    net.load_state_dict({n: torch.tensor(v) for n, v in tensors.items()}, strict=False)
    with torch.no_grad():
        expected = net.eval()(torch.tensor(x))
    logits = OnnxSession(cut(model, selection).to_bytes()).run({"x": x})["logits"]
    np.testing.assert_allclose(logits, expected, atol=1e-4)

    loss = nn.functional.cross_entropy(net.train()(torch.tensor(x)), torch.tensor(y))
    loss.backward()
    np.testing.assert_allclose(out[step_contract.LOSS], loss.item(), rtol=1e-5)
    for name, value in net.named_parameters():
        np.testing.assert_allclose(out[step_contract.gradient_name(name)], value.grad.numpy(), atol=1e-5)
    for name in ("norm.running_mean", "norm.running_var"):
        np.testing.assert_allclose(out[step_contract.next_name(name)], net.get_buffer(name), rtol=1e-5, atol=1e-6)


def test_frozen_statistics_are_used_in_training_too() -> None:
    net = trained_net(affine=True)
    model = import_onnx(export_torch(net), "net")
    session = OnnxSession(training_graph(model, Features(frozen=("norm.running_*",))).to_bytes(), training=True)
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((SAMPLES, 2, 5, 5), np.float32), rng.integers(0, CLASSES, SAMPLES)
    feeds = first_step_feeds(Recipe(), model.tensors, session.inputs, y, CLASSES)
    loss = session.run({**feeds, step_contract.X: x, step_contract.Y: y})[step_contract.LOSS]
    expected = nn.functional.cross_entropy(net.eval()(torch.tensor(x)), torch.tensor(y)).item()
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_a_damaged_list_of_instance_norms_is_refused() -> None:
    proto = onnx.load_from_string(export_torch(trained_net(affine=True)))
    texts = {p.key: p.value for p in proto.metadata_props} | {"fedprune.instance_norms": "{}"}
    onnx.helper.set_model_props(proto, texts)
    with pytest.raises(ModelError, match=r"fedprune\.instance_norms"):
        import_onnx(proto.SerializeToString(), "net")
