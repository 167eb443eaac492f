"""Frozen tensors: no gradient, no state, no way back; frozen batch norms normalise by their statistics."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedprune.core.errors import ConfigError, ModelError
from fedprune.model import step_contract
from fedprune.model.features import Features
from fedprune.model.trainable import trained_tensors
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.ir.graph import Graph
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.nets.small_nets import randomise_norms

pytestmark = pytest.mark.torch

Arrays = dict[str, np.ndarray[Any, Any]]
CLASSES = 3


class Deep(nn.Module):
    """Three blocks, with and without normalisation, and a head."""

    input_shape = (2, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.norm2 = nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc1, self.norm3 = nn.Linear(4 * 36, 6), nn.BatchNorm1d(6)
        self.fc2 = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.fc2(torch.relu(self.norm3(self.fc1(torch.flatten(x, 1)))))


def deep() -> Deep:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        net = Deep()
    randomise_norms(net)
    return net


@pytest.fixture(scope="module")
def model() -> Model:
    return import_onnx(export_torch(deep()), "deep")


def feeds(model: Model, graph: Graph, batch: int = 7) -> Arrays:
    rng = np.random.default_rng(batch)
    out: Arrays = {**model.tensors}
    out[step_contract.X] = rng.standard_normal((batch, *model.architecture.input_shape)).astype(np.float32)
    out[step_contract.Y] = rng.integers(0, CLASSES, batch)
    out |= {
        n: np.array(v, np.float32)
        for n, v in ((step_contract.LR, 0.1), (step_contract.MOMENTUM, 0.9), (step_contract.WEIGHT_DECAY, 0.01))
    }
    for port in graph.inputs:
        if "::" in port.name:
            out[port.name] = np.zeros_like(out[port.name.partition("::")[0]])
    return out


def oracle(model: Model, trained: set[str], moving: set[str], fed: Arrays, dtype: torch.dtype) -> Arrays:
    """One step of torch.optim.SGD on the trained tensors; norms whose statistics don't move are in evaluation mode."""
    net = deep().to(dtype)
    net.train()
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(f"{name}.running_mean" in moving)
    leaves = {n: p for n, p in net.named_parameters() if n in trained}
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = torch.optim.SGD(leaves.values(), 0.1, 0.9, weight_decay=0.01)
    loss = nn.functional.cross_entropy(
        net(torch.tensor(fed[step_contract.X], dtype=dtype)), torch.tensor(fed[step_contract.Y])
    )
    loss.backward()
    out = {step_contract.gradient_name(n): p.grad.numpy().copy() for n, p in leaves.items() if p.grad is not None}
    optimizer.step()
    state = net.state_dict()
    return (
        out
        | {step_contract.LOSS: loss.detach().numpy()}
        | {step_contract.next_name(n): state[n].numpy() for n in trained | moving}
    )


FREEZES = {
    "the head alone is trained": Features(gradients=True, trainable=("fc2.*",)),
    "biases and the last two layers": Features(gradients=True, trainable=("*.bias", "fc*", "norm3.*")),
    "a block in the middle": Features(gradients=True, frozen=("conv2.*", "norm2.*")),
    "all weights": Features(gradients=True, frozen=("*.weight",)),
    "one norm's statistics": Features(gradients=True, frozen=("norm3.running_*",)),
}


def scopes(model: Model, features: Features) -> tuple[set[str], set[str]]:
    trained = {t.name for t in trained_tensors(model.architecture, features)}
    output_names = {p.name for p in training_graph(model, features).outputs}
    return trained, {t.name for t in model.architecture.statistics if step_contract.next_name(t.name) in output_names}


@pytest.mark.parametrize("name", FREEZES)
def test_what_is_trained_moves_as_in_torch(model: Model, name: str) -> None:
    features = FREEZES[name]
    graph = training_graph(model, features)
    trained, moving = scopes(model, features)
    fed = feeds(model, graph)
    exact = oracle(model, trained, moving, fed, torch.float64)
    # The order of samples changes nothing but rounding: a few orders show how much that is on this processor.
    orders = [np.random.default_rng(k).permutation(len(fed[step_contract.Y])) for k in range(6)]
    usual = [
        oracle(
            model, trained, moving, fed | {n: fed[n][order] for n in (step_contract.X, step_contract.Y)}, torch.float32
        )
        for order in orders
    ]
    got = OnnxSession(graph.to_bytes(), training=True).run(fed)
    assert {n for n in got if "::momentum" not in n and n != step_contract.HITS} == set(exact)

    def size(value: Any) -> float:
        return float(np.linalg.norm(np.asarray(value, np.float64).ravel()))

    # A bias before a normalisation has no gradient but rounding: that is measured by all gradients' size.
    largest = max(size(v) for k, v in exact.items() if k.endswith("::gradient"))

    def error(a: Any, b: Any) -> float:
        return size(a - b) / (size(b) if size(b) > 1e-10 * largest else largest)

    for key, value in exact.items():
        assert error(got[key], value) <= max(1e-6, 2 * max(error(u[key], value) for u in usual)), key


@pytest.mark.parametrize("name", FREEZES)
def test_frozen_tensors_bring_nothing_and_give_nothing(model: Model, name: str) -> None:
    features = FREEZES[name]
    graph = training_graph(model, features)
    trained, moving = scopes(model, features)
    assert {p.name for p in graph.inputs if "::" in p.name} == {step_contract.momentum_name(n) for n in trained}
    tensor_names = {p.name.partition("::")[0] for p in graph.outputs} - {step_contract.LOSS, step_contract.HITS}
    assert tensor_names == trained | moving
    assert {t.name for t in model.architecture.tensors} <= {p.name for p in graph.inputs}


def test_no_gradient_flows_below_the_lowest_trained_layer(model: Model) -> None:
    """What the head alone needs is the forward pass, the loss and the head's own gradient."""
    graph = training_graph(model, Features(trainable=("fc2.*",)))
    forward = [n.op for n in model.graph.nodes]
    for op in ("Conv", "BatchNormalization", "Relu"):
        assert [n.op for n in graph.nodes].count(op) == forward.count(op), op
    for name in ("conv1.weight", "conv2.weight", "norm1.weight"):
        assert len(graph.consumers()[name]) == 1, name


def test_what_the_model_froze_stays_frozen(model: Model) -> None:
    frozen = replace(model, frozen=("conv1.weight", "conv1.bias"))
    names = {p.name for p in training_graph(frozen, Features()).inputs}
    assert step_contract.momentum_name("conv1.weight") not in names
    assert step_contract.momentum_name("norm1.weight") in names
    named = {p.name for p in training_graph(frozen, Features(trainable=("conv1.weight",))).inputs}
    assert {n for n in named if "::" in n} == {step_contract.momentum_name("conv1.weight")}


def test_a_norm_with_half_of_its_statistics_frozen_is_refused(model: Model) -> None:
    with pytest.raises(ModelError, match=r"norm2\.running_mean"):
        training_graph(model, Features(frozen=("norm2.running_mean",)))


@pytest.mark.parametrize("features", [Features(frozen=("*",)), Features(trainable=("layer7.*",))])
def test_freezing_all_and_patterns_of_nothing_are_refused(model: Model, features: Features) -> None:
    with pytest.raises(ConfigError, match=r"^recipe"):
        training_graph(model, features)
