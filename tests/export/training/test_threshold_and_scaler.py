"""FIARSE's threshold and HeteroFL's scaler in the training graph, against torch's autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedprune.model import step_contract
from fedprune.model.nested_widths import TensorAxes
from fedprune.model.recipe import Features, Recipe
from fedprune.model.selection import Selection
from fedprune.model.step_contract import first_step
from fedprune.runtime.session import Session
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.pruning.model import Model
from fedprune_export.pruning.scaler import scaled_outputs
from fedprune_export.training.step_graph import training_graph
from support.nets.small_nets import seeded

pytestmark = pytest.mark.torch

Arrays = dict[str, np.ndarray[Any, Any]]
CLASSES = 4


class Spatial(nn.Module):
    """Two convolutions, of which one has a norm behind it, and a shortcut round a third."""

    input_shape = (2, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 5, 3, padding=1)
        self.fc = nn.Linear(5 * 9, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.max_pool2d(torch.relu(self.norm(self.conv1(x))), 2)
        return self.fc(torch.flatten(torch.relu(x + self.conv2(x)), 1))


class Rows(nn.Module):
    """Linear layers over rows of vectors, whose biases are nodes of their own, and two heads that are added up."""

    input_shape = (3, 6)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 7, bias=False)
        self.left, self.right = nn.Linear(7, CLASSES), nn.Linear(7, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.second(torch.relu(self.norm(self.first(x)))))
        return self.left(x.mean(1)) + self.right(x.amax(1))


NETS: dict[str, type[nn.Module]] = {"spatial": Spatial, "rows": Rows}
LAYERS = {"spatial": ("conv1", "conv2"), "rows": ("first", "second")}
MODELS: dict[str, Model] = {}


def net(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return seeded(NETS[kind]())


def model(kind: str) -> Model:
    if kind not in MODELS:
        MODELS[kind] = import_onnx(export_torch(net(kind)), kind)
    return MODELS[kind]


def feeds(kind: str, session: Session, recipe: Recipe, theta: float, seed: int = 0) -> Arrays:
    """A first step's inputs: every weight above θ or below, biases and norms without a threshold, anchors moved."""
    rng, m = np.random.default_rng(seed), model(kind)
    tensors = dict(m.tensors)
    fed = first_step(recipe, tensors, session.inputs, np.zeros(8, np.int64), CLASSES)
    fed[step_contract.X] = rng.standard_normal((8, *m.architecture.input_shape)).astype(np.float32)
    fed[step_contract.Y] = rng.integers(0, CLASSES, 8)
    for name, value in tensors.items():
        if step_contract.threshold(name) in session.inputs and name.endswith(".weight") and "norm" not in name:
            fed[step_contract.threshold(name)] = np.array(theta, np.float32)
        if step_contract.mask(name) in session.inputs and name.endswith(".weight"):
            fed[step_contract.mask(name)] = (rng.random(value.shape) < 0.8).astype(np.float32)
        if step_contract.anchor(name) in session.inputs:
            fed[step_contract.anchor(name)] = (value + 0.1 * rng.standard_normal(value.shape)).astype(np.float32)
    return fed


class Above(torch.autograd.Function):
    """1[s ≥ θ], whose slope is said to be 2θ/(s + θ)² where it is 1 (FIARSE's `BinaryMask`)."""

    @staticmethod
    def forward(ctx: Any, size: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(size, theta)
        return (size >= theta).to(size.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        size, theta = ctx.saved_tensors
        rise = 2 * theta / (size + theta) ** 2
        return gradients[0] * torch.where(size >= theta, rise, torch.zeros_like(rise)), None


def oracle(kind: str, fed: Arrays, recipe: Recipe, dtype: torch.dtype) -> Arrays:
    """Loss, gradients of the whole objective, and the next weights."""
    get = {k: torch.tensor(v, dtype=dtype if v.dtype == np.float32 else None) for k, v in fed.items()}
    names = [t.name for t in model(kind).architecture.trainable]
    leaves = {n: get[n].clone().requires_grad_() for n in names}
    used = {}
    for n, w in leaves.items():
        theta = get.get(step_contract.threshold(n))
        used[n] = w * get[step_contract.mask(n)] if step_contract.mask(n) in get else w
        if theta is not None and theta > 0:
            used[n] = used[n] * Above.apply(w.abs(), theta)
    module = net(kind).train()
    if step_contract.OUTPUT_SCALE in get:
        for name in LAYERS[kind]:
            module.get_submodule(name).register_forward_hook(lambda _, __, y: y * get[step_contract.OUTPUT_SCALE])
    statistics = {t.name: get[t.name].clone() for t in model(kind).architecture.statistics}
    loss = nn.functional.cross_entropy(
        torch.func.functional_call(module, {**used, **statistics}, get[step_contract.X]), get["y"]
    )
    pulls = [
        get[step_contract.strength(n)] / 2 * ((w - get[step_contract.anchor(n)]) ** 2).sum()
        for n, w in leaves.items()
        if step_contract.anchor(n) in get
    ]
    (loss + sum(pulls)).backward()
    out = {step_contract.LOSS: loss.detach().numpy()} | {
        step_contract.following(n): s.numpy() for n, s in statistics.items()
    }
    for n, w in leaves.items():
        w.grad *= get.get(step_contract.mask(n), 1)
        out[step_contract.gradient(n)] = w.grad.numpy().copy()
    kinds: dict[str, Any] = {
        "sgd": lambda p: torch.optim.SGD(p, recipe.lr, recipe.momentum),
        "adam": lambda p: torch.optim.Adam(p, recipe.lr),
    }
    kinds[recipe.optimizer](list(leaves.values())).step()
    return out | {step_contract.following(n): w.detach().numpy() for n, w in leaves.items()}


def check(got: Arrays, kind: str, fed: Arrays, recipe: Recipe) -> None:
    """At most 2e-6, or twice what torch's own float32 is off."""
    exact, usual = (oracle(kind, fed, recipe, t) for t in (torch.float64, torch.float32))

    def error(a: Arrays, name: str) -> float:
        size = max(float(np.linalg.norm(exact[name].ravel())), 1e-12)
        return float(np.linalg.norm((a[name] - exact[name]).ravel())) / size

    assert {n: error(got, n) for n in exact if error(got, n) > max(2e-6, 2 * error(usual, n))} == {}


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("proximal", [0.3])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_step_with_a_threshold_is_torchs_with_the_surrogate(kind: str, proximal: float, optimizer: str) -> None:
    recipe = Recipe(proximal=proximal, optimizer=optimizer, mask="threshold", report_squares=True, lr=0.1)
    assert recipe.features.threshold
    session = Session(training_graph(model(kind), recipe.features).to_bytes(), training=True)
    fed = feeds(kind, session, recipe, theta=0.1)
    below = [np.abs(v) < 0.1 for n, v in model(kind).tensors.items() if n.endswith("weight") and "norm" not in n]
    assert below
    assert all(0 < b.mean() < 1 for b in below)
    check(session.run(fed), kind, fed, recipe)


def test_below_the_threshold_nothing_counts_and_nothing_is_learnt() -> None:
    features = Features(threshold=True, gradients=True)
    session = Session(training_graph(model("spatial"), features).to_bytes(), training=True)
    fed = feeds("spatial", session, Recipe(), theta=0.1)
    other = dict(fed)
    below = np.abs(fed["conv2.weight"]) < 0.1
    other["conv2.weight"] = np.where(below, fed["conv2.weight"] / 3, fed["conv2.weight"]).astype(np.float32)
    got, changed = session.run(fed), session.run(other)
    assert got[step_contract.LOSS] == changed[step_contract.LOSS]
    assert not got[step_contract.gradient("conv2.weight")][below].any()
    assert got[step_contract.gradient("conv2.weight")][~below].all()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3])
def test_without_a_threshold_it_is_an_ordinary_step(size: float) -> None:
    """θ = 0 changes no bit, not even where weights are 0 as well, or so small that their squares are."""
    plain, with_threshold = (
        Session(training_graph(model("spatial"), Features(threshold=t, gradients=True)).to_bytes(), training=True)
        for t in (False, True)
    )
    fed = feeds("spatial", with_threshold, Recipe(), theta=0.0)
    fed["conv2.weight"] = np.where(np.arange(9).reshape(3, 3) % 2, fed["conv2.weight"], np.float32(size))
    want = plain.run({n: v for n, v in fed.items() if n in plain.inputs})
    got = with_threshold.run(fed)
    assert set(want) == set(got)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("scale", [2.0])
def test_the_scaler_is_torchs_layers_times_a_number(kind: str, scale: float) -> None:
    recipe = Recipe(scale=2.0, report_squares=True, lr=0.01, mask="hard", proximal=0.1)
    session = Session(training_graph(model(kind), recipe.features).to_bytes(), training=True)
    fed = feeds(kind, session, recipe, theta=0.0) | {step_contract.OUTPUT_SCALE: np.array(scale, np.float32)}
    assert set(fed) == set(session.inputs)
    check(session.run(fed), kind, fed, recipe)


def test_a_scale_of_one_changes_no_bit() -> None:
    plain, scaled = (
        Session(training_graph(model("spatial"), Features(scale=s, gradients=True)).to_bytes(), training=True)
        for s in (False, True)
    )
    fed = feeds("spatial", scaled, Recipe(), theta=0.0)
    got, want = scaled.run(fed), plain.run({n: v for n, v in fed.items() if n in plain.inputs})
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_only_layers_before_the_last_are_scaled() -> None:
    """A bias that is added by its own node is scaled with its layer; two heads side by side are both last."""
    m = model("rows")
    makers = m.graph.producers()
    assert sorted(makers[v].op for v in scaled_outputs(m)) == ["Add", "MatMul"]


def test_axes_are_written_without_ordered_dropout() -> None:
    graph = training_graph(model("spatial"), Features(axes=True))
    axes = TensorAxes.from_json(graph.metadata[step_contract.AXES])
    assert axes.sizes == model("spatial").architecture.sizes
    whole = Selection.full(model("spatial").architecture)
    assert {n: tuple(a.length for a in of) for n, of in axes.axes.items() if n in whole.shapes()} == whole.shapes()
