"""Training graphs for one board: layouts and forms change the speed of a step, and nothing else."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fedprune.core.errors import ConfigError, ModelError
from fedprune.model import step_contract
from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Features
from fedprune.model.selection import Selection
from fedprune.runtime import blocks
from fedprune.runtime.session import Session
from fedprune_device.training.step_graph import StepGraph
from fedprune_export.autodiff import intents
from fedprune_export.autodiff.conv_geometry import Window
from fedprune_export.formulation import Forms, formulated, kernel_gradients
from fedprune_export.formulation.layouts import Layouts
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.cut import cut
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.nets.random_nets import mixing_nets, nets
from support.nets.small_nets import lenet, resnet20_bn, vgg11_bn
from support.nets.smooth_nets import SmoothMobileNet, SmoothResNet
from support.oracles.cutting import random_selection
from support.oracles.gradient_distance import FLOOR, TENSOR, Trained, only_norms_train
from support.oracles.one_step import feeds, parts

pytestmark = pytest.mark.torch

few = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

HERE = blocks.block_size()
SIZES = [3, 16, 19]
"""Batches of less than a block, of whole ones, and of more."""

NEAR = 2e-5

FORMS = [Forms(), *(Forms(HERE, size, full=1) for size in SIZES if HERE)]
"""Standard operators alone, and whatever can be in blocks in blocks."""


@few
@given(
    model=st.one_of(nets(), mixing_nets()),
    density=st.sampled_from([0.01, 0.5, 0.8, 1.0]),
    seed=st.integers(0, 99),
    forms=st.sampled_from(FORMS),
)
def test_gradients_are_torchs(model: Model, density: float, seed: int, forms: Forms) -> None:
    selection = random_selection(model, density, seed)
    rng = np.random.default_rng(seed)
    shape, classes = model.architecture.input_shape, model.architecture.classes
    sizes = [forms.batch] * 9 if forms.batch else SIZES * 3
    samples = [(rng.standard_normal((b, *shape)).astype(np.float32), rng.integers(0, classes, b)) for b in sizes]
    trained = Trained(model, selection.widths, forms)
    found = trained.distances(cut(model, selection), selection.gather(model.tensors), samples)
    assert found.near, (found.ours, found.torch)
    assert found.excess(found.worst) <= 2 * TENSOR, found.worst


class Grouped(nn.Module):
    """Norms of groups, of one group, and of channels; a sum and an activation behind them, and values far from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 20, 3, padding=1)
        self.down = nn.Conv2d(20, 36, 3, stride=2)
        self.first, self.second = nn.GroupNorm(4, 20), nn.GroupNorm(1, 20)
        self.third = nn.InstanceNorm2d(36, affine=True)
        self.head = nn.Linear(36, 5)
        nn.init.constant_(self.stem.bias, 30.0)
        for norm in (self.first, self.second, self.third):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.first(self.stem(x)))
        x = nn.functional.hardtanh(self.second(self.inner(x)) + x, -1.5, 1.5)
        x = nn.functional.relu(self.third(self.down(x)))
        return self.head(x.mean((2, 3)))


@cache
def made(net: type[nn.Module]) -> Model:
    """Exported once for all its cases: that takes longer than a case does."""
    torch.manual_seed(0)
    shape = {"input_shape": (3, 9, 9)} if net is Grouped else {}
    return import_onnx(export_torch(net(), **shape), "net")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("density", "forms"), [(0.5, Forms()), *zip((0.5, 1.0, 0.3), FORMS[1:], strict=False)], ids=str
)
@pytest.mark.parametrize(
    "net",
    [
        *(SmoothResNet, SmoothMobileNet, lenet, Grouped),
        *(pytest.param(net, marks=pytest.mark.soak) for net in (vgg11_bn, resnet20_bn)),
    ],
)
def test_a_step_is_that_of_the_graph_for_all_widths(net: type[nn.Module], density: float, forms: Forms) -> None:
    nearest = _nearest(made(net), density, forms, Features(gradients=True))
    assert max(nearest.values()) <= NEAR, nearest


@pytest.mark.slow
@pytest.mark.parametrize("forms", FORMS[-1:], ids=str)
@pytest.mark.parametrize("net", [SmoothMobileNet, resnet20_bn])
def test_a_scaled_step_is_that_of_the_graph_for_all_widths(net: type[nn.Module], forms: Forms) -> None:
    features = Features(gradients=True, scale=True)
    nearest = _nearest(made(net), 0.5, forms, features, output_scale=0.7)
    assert max(nearest.values()) <= NEAR, nearest


class ReadTwice(nn.Module):
    """Values before norms that others read, too: a residual sum, and a second norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = (nn.Conv2d(i, 18, 3, padding=1, bias=False) for i in (3, 18))
        self.norms = nn.ModuleList(nn.BatchNorm2d(18) for _ in range(3))
        self.head = nn.Linear(18, 5)
        for norm in self.norms:
            nn.init.normal_(norm.running_mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.inner(nn.functional.silu(self.norms[0](x)))
        x = nn.functional.silu(self.norms[1](x)) * torch.sigmoid(self.norms[2](x)) + x
        return self.head(x.mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("forms", FORMS, ids=str)
def test_what_others_read_stays_as_it_is(forms: Forms) -> None:
    torch.manual_seed(0)
    model = import_onnx(export_torch(ReadTwice().eval(), input_shape=(3, 8, 8)), "net")
    nearest = _nearest(model, 1.0, forms, Features(gradients=True))
    assert max(nearest.values()) <= NEAR, nearest


class FarFromZero(nn.Module):
    """Values before norms whose mean is far from zero: of a convolution, of one that two read, of a depthwise one."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 18, 3, padding=1), nn.Conv2d(18, 36, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(36, 36, 3, padding=1, groups=36)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (18, 36, 36, 36))
        self.head = nn.Linear(36, 5)
        for layer in (self.stem, self.inner, self.deep):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            nn.init.constant_(layer.bias, mean)
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.norms[0](self.stem(x)))
        x = self.inner(x)
        x = nn.functional.silu(self.norms[1](x)) * torch.sigmoid(self.norms[2](x))
        x = nn.functional.silu(self.norms[3](self.deep(x)))
        return self.head(x.mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("forms", FORMS, ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4])
def test_a_mean_far_from_zero_costs_no_digits(mean: float, forms: Forms) -> None:
    torch.manual_seed(0)
    net = FarFromZero(mean)
    model = import_onnx(export_torch(net.eval(), input_shape=(3, 8, 8)), "net")
    arch, rng = model.architecture, np.random.default_rng(0)
    x = rng.standard_normal((forms.batch or 16, 3, 8, 8)).astype(np.float32)
    y = rng.integers(0, 5, len(x))
    trained = Trained(model, arch.sizes, forms)
    found = trained.distances(net, model.tensors, [(x, y)])
    assert found.near, (found.ours, found.torch)

    raw = training_graph(model, Features(), widths=arch.sizes, forms=forms).to_bytes()
    got = Session(raw, training=True).run(feeds(arch, model.tensors, x, y))
    exact, usual = (_statistics(net, x, dtype) for dtype in (torch.float64, torch.float32))
    for name, value in exact.items():
        deviation = np.sqrt(exact[name.replace("_mean", "_var")])  # a mean may cancel to nothing
        size = np.linalg.norm(np.hypot(value, deviation) if name.endswith("_mean") else value)
        off = np.linalg.norm(got[step_contract.following(name)] - value) / size
        assert off <= max(FLOOR, 2 * np.linalg.norm(usual[name] - value) / size), name


def _statistics(net: nn.Module, x: np.ndarray, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """torch's running statistics after a batch."""
    trained = only_norms_train(copy.deepcopy(net).to(dtype))
    with torch.no_grad():
        trained(torch.tensor(x, dtype=dtype))
    return {n: b.double().numpy() for n, b in trained.named_buffers() if "running" in n}


class Roots(nn.Module):
    """Roots of numbers of which those that fill blocks up would have none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(i, 18, 3, padding=1) for i in (3, 18))
        self.shift = nn.Parameter(torch.linspace(9.5, 10.5, 18).reshape(18, 1, 1))
        self.head = nn.Linear(18, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        roots = torch.sqrt(torch.tanh(self.first(x)) + self.shift - 1)
        return self.head(self.second(roots).mean((2, 3)))


@pytest.mark.parametrize("forms", FORMS, ids=str)
def test_what_fills_blocks_up_has_no_root(forms: Forms) -> None:
    torch.manual_seed(0)
    model = import_onnx(export_torch(Roots(), input_shape=(3, 8, 8)), "net")
    nearest = _nearest(model, 1.0, forms, Features(gradients=True))
    assert max(nearest.values()) <= NEAR, nearest


class OfOnePlace(nn.Module):
    """A kernel of one place, with strides or without."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, inputs, 3, padding=1)
        self.inner = nn.Conv2d(inputs, outputs, 1, stride=stride)
        self.head = nn.Linear(outputs, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.inner(nn.functional.silu(self.stem(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="onnxruntime has no blocks of channels on this processor")
@pytest.mark.parametrize(
    ("inputs", "outputs", "full", "stride", "size"),
    [  # few places and many; channels of one block, of more, and not in blocks; either side the wider one
        (16, 16, 1, 1, 18),
        (16, 40, 1, 1, 18),
        (33, 17, 1, 1, 18),
        (16, 40, 1, 2, 18),
        (33, 17, 1, 2, 9),
        (16, 40, 18, 1, 18),
        (33, 17, 18, 1, 9),
        (20, 16, 18, 1, 18),
    ],
)
def test_gradients_of_kernels_of_one_place(
    inputs: int, outputs: int, full: int, stride: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = [], kernel_gradients.pointwise_kernel_gradient
    monkeypatch.setattr(kernel_gradients, "pointwise_kernel_gradient", lambda *a: written.append(a) or write(*a))
    torch.manual_seed(0)
    net = OfOnePlace(inputs, outputs, stride)
    model = import_onnx(export_torch(net, input_shape=(3, size * stride, size * stride)), "net")
    nearest = _nearest(model, 1.0, Forms(HERE, 5, full=full), Features(gradients=True))
    assert len(written) == 1
    assert max(nearest.values()) <= NEAR, nearest


@pytest.mark.slow
@pytest.mark.parametrize("forms", FORMS[-1:] or FORMS, ids=str)
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_loop_is_that_of_the_graph_for_all_widths(layer: type[nn.RNNBase], forms: Forms) -> None:
    torch.manual_seed(0)
    model = import_onnx(export_torch(Recurrent(layer), input_shape=(7, 5)), "net")
    nearest = _nearest(model, 0.5, forms, Features(gradients=True))
    assert max(nearest.values()) <= NEAR, nearest


class Recurrent(nn.Module):
    """A layer that reads a series, and decides by the last step."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.head = layer(5, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0][:, -1])


def _nearest(model: Model, density: float, forms: Forms, features: Features, **more: float) -> dict[str, float]:
    """How far a step is from that of the graph for all widths, part by part: the nearest of some batches."""
    arch = model.architecture
    widths = widths_at(arch, density)
    tensors = Selection.of(arch, widths).gather(model.tensors)
    one = Session(training_graph(model, features).to_bytes(), training=True)
    other = Session(training_graph(model, features, widths=widths, forms=forms).to_bytes(), training=True)
    assert set(one.inputs) == set(other.inputs)
    assert set(one.outputs) == set(other.outputs)
    nearest = dict.fromkeys(parts(arch), np.inf)
    for seed in range(6):  # a sign of a ReLU that rounding flips moves everything behind it: the nearest batch counts
        rng = np.random.default_rng(seed)
        size = forms.batch or 5 + 11 * (seed % 2)
        x = rng.standard_normal((size, *arch.input_shape)).astype(np.float32)
        given = feeds(arch, tensors, x, rng.integers(0, arch.classes, size))
        given |= {n: np.array(v, np.float32) for n, v in more.items()}
        wanted, got = one.run(given), other.run(given)
        for part, names in parts(arch).items():
            size = np.sqrt(sum(float(np.sum(wanted[n].astype(np.float64) ** 2)) for n in names))
            off = np.sqrt(sum(float(np.sum((got[n].astype(np.float64) - wanted[n]) ** 2)) for n in names))
            nearest[part] = min(nearest[part], off / size)
        if seed and max(nearest.values()) <= NEAR:  # both sizes ran
            break
    return nearest


@pytest.mark.skipif(not HERE, reason="onnxruntime has no blocks of channels on this processor")
@pytest.mark.parametrize("batch", [16, 11])
@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "kernel", "pad", "dilation"),
    [(16, 32, 32, 3, 1, 1), (3, 64, 24, 5, 2, 1), (20, 40, 28, 3, 2, 2), (18, 64, 32, 3, 0, 1)],
)
@pytest.mark.parametrize("blocked", [False, True], ids=["plain", "in blocks"])
def test_kernel_gradients_of_large_maps_are_torchs(
    inputs: int, outputs: int, size: int, kernel: int, pad: int, dilation: int, batch: int, blocked: bool
) -> None:
    # Maps that are cut into bands, which one convolution adds up.
    out = size + 2 * pad - dilation * (kernel - 1)
    window = Window((size,) * 2, (kernel,) * 2, (1, 1), (dilation,) * 2, ((pad, pad),) * 2, (out, out))
    shapes = {"x": ("N", inputs, size, size), "dy": ("N", outputs, out, out), "k": (outputs, inputs, kernel, kernel)}
    graph = Graph(
        [Port(n, np.dtype(np.float32), s) for n, s in shapes.items()], [Port("dk", np.dtype(np.float32), shapes["k"])]
    )
    attrs = {"window": window, "group": 1}
    known, image = {**shapes, "dk": shapes["k"]}, "x"
    if blocked:
        graph.initializers["one"] = np.eye(inputs, dtype=np.float32)[:, :, None, None]
        ones: dict[str, object] = {"kernel_shape": [1, 1], "strides": [1, 1], "dilations": [1, 1], "pads": [0] * 4}
        image = graph.emit("Conv", "x", "one", attrs={**ones, "group": 1})
        known[image] = shapes["x"]
    graph.emit("KernelGradient", image, "dy", "k", attrs=attrs, domain=intents.DOMAIN, out="dk")
    written = formulated(graph, known, Forms(HERE, batch, full=1))
    assert "Gather" in [n.op for n in written.nodes]
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((batch, *shapes[n][1:])).astype(np.float32) for n in ("x", "dy"))
    feeds = {"x": x, "dy": dy, "k": np.zeros(shapes["k"], np.float32)}
    session = Session(written.to_bytes(), training=True)
    got = session.run({n: v for n, v in feeds.items() if n in session.inputs})["dk"]
    given = [torch.tensor(v, dtype=torch.float64) for v in (x, dy)]
    exact = torch.nn.grad.conv2d_weight(given[0], shapes["k"], given[1], 1, pad, dilation).numpy()
    assert np.linalg.norm(got - exact) <= 2e-6 * np.linalg.norm(exact)


@pytest.mark.skipif(not HERE, reason="onnxruntime has no blocks of channels on this processor")
@pytest.mark.parametrize(("kernel", "sizes"), [((2, 2), (4, 6)), ((3, 2), (6, 4)), ((2, 2), (2, 2))])
def test_of_equal_maxima_the_first_has_the_gradient(kernel: tuple[int, int], sizes: tuple[int, int]) -> None:
    out = tuple(s // k for s, k in zip(sizes, kernel, strict=True))
    window = Window(sizes, kernel, kernel, (1, 1), ((0, 0), (0, 0)), out)
    channels, batch = 2 * HERE, 3
    shapes = {"x": ("N", channels, *sizes), "dy": ("N", channels, *out), "k": (channels, channels, 1, 1)}
    graph = Graph([Port(n, np.dtype(np.float32), s) for n, s in shapes.items()])
    attrs = {"kernel_shape": [1, 1], "strides": [1, 1], "dilations": [1, 1], "pads": [0] * 4, "group": 1}
    value = graph.emit("Conv", "x", "k", attrs=attrs)  # puts it into blocks
    pooled = graph.emit("MaxPool", value, attrs={"kernel_shape": list(kernel), "strides": list(kernel)})
    graph.emit("PoolGradient", "dy", value, pooled, attrs={"window": window}, domain=intents.DOMAIN, out="dx")
    graph.outputs = [Port("dx", np.dtype(np.float32), shapes["x"])]
    known = {**shapes, value: shapes["x"], pooled: shapes["dy"], "dx": shapes["x"]}
    written = formulated(graph, known, Forms(HERE, batch))
    assert "Upsample" in {n.op for n in written.nodes}
    rng = np.random.default_rng(0)
    x = rng.integers(-1, 2, (batch, channels, *sizes)).astype(np.float32)
    dy = rng.standard_normal((batch, channels, *out)).astype(np.float32)
    kernels = np.eye(channels, dtype=np.float32)[:, :, None, None]
    got = Session(written.to_bytes(), training=True).run({"x": x, "dy": dy, "k": kernels})["dx"]
    given = torch.tensor(x, requires_grad=True)
    nn.functional.max_pool2d(given, kernel).backward(torch.tensor(dy))
    assert given.grad is not None
    np.testing.assert_array_equal(got, given.grad.numpy())


@pytest.mark.parametrize("forms", FORMS, ids=str)
@pytest.mark.parametrize(
    ("intent", "inputs", "unknown"),
    [
        (intents.INPUT_GRADIENT, ("dy", "k"), "k"),
        (intents.KERNEL_GRADIENT, ("x", "dy", "k"), "x"),
        (intents.KERNEL_GRADIENT, ("x", "dy", "k"), "dy"),
    ],
)
def test_a_shape_that_is_not_known_is_one_clear_error(
    intent: str, inputs: tuple[str, ...], unknown: str, forms: Forms
) -> None:
    window = Window((4, 4), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), (4, 4))
    shapes = {"x": ("N", 16, 4, 4), "dy": ("N", 32, 4, 4), "k": (32, 16, 3, 3)}
    graph = Graph([Port(n, np.dtype(np.float32), s) for n, s in shapes.items()])
    graph.emit(intent, *inputs, attrs={"window": window, "group": 1}, domain=intents.DOMAIN, out="gradient")

    with pytest.raises(ModelError, match=f"^{unknown} of the training graph has no known shape$"):
        formulated(graph, {n: s for n, s in shapes.items() if n != unknown}, forms)


def test_a_shape_that_is_none_of_images_is_one_clear_error() -> None:
    layouts = Layouts(Graph(), {"v": ("N", 7)}, 1, 1)

    with pytest.raises(ModelError, match=r"^v of the training graph: expected \[N, C, H, W\], got \('N', 7\)$"):
        layouts.sizes("v")


def test_a_graph_for_other_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = import_onnx(export_torch(lenet()), "net")
    raw = training_graph(model, Features(), widths=model.architecture.sizes, forms=Forms(8, 4)).to_bytes()
    plain = training_graph(model, Features(), widths=model.architecture.sizes).to_bytes()
    monkeypatch.setenv(blocks.OFF, "0")
    for here in (0, 4, 16):
        monkeypatch.setattr(blocks, "block_size", lambda here=here: here)
        assert StepGraph(plain).names
        with pytest.raises(ModelError, match=r"another kind of processor.*blocks of '8'"):
            StepGraph(raw)
    monkeypatch.setattr(blocks, "block_size", lambda: 8)
    if HERE:  # else onnxruntime knows no such operators
        assert StepGraph(raw).names


@pytest.mark.skipif(not HERE, reason="onnxruntime has no blocks of channels on this processor")
def test_only_the_right_block_passes_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCKS", (1, *[b for b in blocks.BLOCKS[1:] if b != HERE]))
    blocks.measured_block.cache_clear()
    try:
        assert blocks.block_size() == 0
    finally:
        blocks.measured_block.cache_clear()


def test_without_operators_in_blocks_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ModelError("ReorderInput is not a registered function")

    monkeypatch.setattr(blocks, "Session", refuse)
    blocks.measured_block.cache_clear()
    try:
        assert blocks.block_size() == 0
    finally:
        blocks.measured_block.cache_clear()


@pytest.mark.slow
def test_standard_operators_alone_are_what_no_block_means() -> None:
    model = import_onnx(export_torch(resnet20_bn()), "net")
    graph = training_graph(model, Features(), widths=model.architecture.sizes)
    assert {n.domain for n in graph.nodes} == {""}
    assert step_contract.BLOCK not in graph.metadata
    inside = training_graph(model, Features(), widths=model.architecture.sizes, forms=Forms(16, 32))
    assert {n.domain for n in inside.nodes} == {"", "com.microsoft.nchwc"}
    assert inside.metadata[step_contract.BLOCK] == "16"


def test_no_processor_has_such_blocks() -> None:
    with pytest.raises(ConfigError, match="block of channels"):
        Forms(12, 32)


@pytest.mark.parametrize(("block", "batch"), [(16, 0), (0, 32), (8, -1)])
def test_blocks_come_with_a_batch(block: int, batch: int) -> None:
    with pytest.raises(ConfigError, match="samples of a batch in blocks"):
        Forms(block, batch)
