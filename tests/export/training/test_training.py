"""The training graph against torch: optimiser, loss features, masks, statistics, batches, widths."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fedprune.core.errors import ModelError
from fedprune.model import step_contract
from fedprune.model.architecture import Architecture, TensorKind, widths_at
from fedprune.model.features import Features
from fedprune.model.nested_widths import TensorAxes
from fedprune.model.selection import Selection
from fedprune.planning.probe_report import CPU, CUDA
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.ir.graph import NORMAL_OPSET, Graph, Port
from fedprune_export.pruning.model import Model
from fedprune_export.pruning.scaler import scaled_outputs
from fedprune_export.training.step_graph import training_graph
from support.nets.small_nets import randomise_norms

pytestmark = pytest.mark.torch

Arrays = dict[str, np.ndarray[Any, Any]]
CLASSES = 4
ARITHMETIC = ("Add", "Concat", "Div", "Gather", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze")
"""Operators that compute sizes from sizes."""


class Small(nn.Module):
    """One of each: convolution, norm, pooling, a strided convolution, flatten with an inner dimension."""

    input_shape = (2, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8 * 4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.max_pool2d(torch.relu(self.norm(self.conv1(x))), 2)
        return self.fc(torch.flatten(torch.relu(self.conv2(x)), 1))


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


HIDDEN = {Small: ("conv1", "conv2"), Rows: ("first", "second")}
"""Layers whose outputs a scaler multiplies."""

THETA, SCALE = 0.1, 2.0


def net(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return randomise_norms(kind())


@cache
def model_of(kind: type[nn.Module]) -> Model:
    return import_onnx(export_torch(net(kind)), kind.__name__)


@pytest.fixture(scope="module")
def model() -> Model:
    return model_of(Small)


def feeds(model: Model, features: Features, batch: int, seed: int = 0, tensors: Arrays | None = None) -> Arrays:
    """Everything that a step reads, at random."""
    rng = np.random.default_rng(seed)
    tensors = dict(tensors or model.tensors)

    def normal(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(np.float32)

    out: Arrays = {
        **tensors,
        step_contract.X: normal((batch, *model.architecture.input_shape)),
        step_contract.Y: rng.integers(0, CLASSES, batch),
        step_contract.LR: np.array(0.1, np.float32),
        step_contract.MOMENTUM: np.array(0.9, np.float32),
        step_contract.WEIGHT_DECAY: np.array(0.01, np.float32),
    }
    if features.logit_offset:
        out[step_contract.LOGIT_OFFSET] = normal((CLASSES,))
    if features.class_weight:
        out[step_contract.CLASS_WEIGHT] = np.array([0.5, 2.0, 0.1, 1.0], np.float32)
    if features.class_mask:
        out[step_contract.CLASS_MASK] = np.array([1, 0, 1, 1], np.float32)
    if features.scale:
        out[step_contract.OUTPUT_SCALE] = np.array(SCALE, np.float32)
    for spec in model.architecture.trainable:
        shape = tensors[spec.name].shape
        out[step_contract.momentum_name(spec.name)] = 0.1 * normal(shape)
        if features.proximal:
            out[step_contract.anchor_name(spec.name)] = tensors[spec.name] + 0.1 * normal(shape)
            out[step_contract.strength_name(spec.name)] = np.array(rng.uniform(0, 2), np.float32)
        if features.element_mask:
            out[step_contract.mask_name(spec.name)] = (rng.random(shape) < 0.7).astype(np.float32)
        if features.threshold:
            theta = THETA if spec.kind is TensorKind.WEIGHT else 0.0
            out[step_contract.threshold_name(spec.name)] = np.array(theta, np.float32)
    return out


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


def oracle(model: Model, features: Features, fed: Arrays, dtype: torch.dtype, kind: type[nn.Module] = Small) -> Arrays:
    """The same step in torch."""
    get = {k: torch.tensor(v, dtype=dtype if v.dtype == np.float32 else None) for k, v in fed.items()}
    leaves = {n: get[n].clone().requires_grad_() for n in [t.name for t in model.architecture.trainable]}
    used = {n: w * get[step_contract.mask_name(n)] if features.element_mask else w for n, w in leaves.items()}
    for n, w in leaves.items() if features.threshold else ():
        theta = get[step_contract.threshold_name(n)]
        used[n] = used[n] * Above.apply(w.abs(), theta) if theta > 0 else used[n]
    statistics = {t.name: get[t.name].clone() for t in model.architecture.statistics}
    module = net(kind).train()
    for name in HIDDEN[kind] if features.scale else ():
        module.get_submodule(name).register_forward_hook(lambda _, __, y: y * get[step_contract.OUTPUT_SCALE])
    logits = torch.func.functional_call(module, {**used, **statistics}, get[step_contract.X])
    if features.logit_offset:
        logits = logits + get[step_contract.LOGIT_OFFSET]
    if features.class_mask:
        logits = torch.where(get[step_contract.CLASS_MASK] > 0, logits, torch.zeros_like(logits))
    loss = nn.functional.cross_entropy(logits, get[step_contract.Y], get.get(step_contract.CLASS_WEIGHT))
    objective = loss
    if features.proximal:
        pulls = [
            get[step_contract.strength_name(n)] / 2 * ((w - get[step_contract.anchor_name(n)]) ** 2).sum()
            for n, w in leaves.items()
        ]
        objective = loss + sum(pulls)
    objective.backward()
    out = {
        step_contract.LOSS: loss.detach().numpy(),
        step_contract.HITS: (logits.argmax(1) == get[step_contract.Y]).sum().numpy(),
    }
    for n, w in leaves.items():
        assert w.grad is not None
        mask = get[step_contract.mask_name(n)] if features.element_mask else torch.ones_like(w)
        gradient = w.grad * mask
        buffer = (
            get[step_contract.MOMENTUM] * get[step_contract.momentum_name(n)]
            + (gradient + get[step_contract.WEIGHT_DECAY] * w.detach()) * mask
        )
        out[step_contract.gradient_name(n)] = gradient.numpy()
        out[step_contract.next_name(step_contract.momentum_name(n))] = buffer.numpy()
        out[step_contract.next_name(n)] = torch.where(
            mask > 0, w.detach() - get[step_contract.LR] * buffer, w.detach()
        ).numpy()
    return out | {step_contract.next_name(n): s.numpy() for n, s in statistics.items()}


def far(got: Arrays, exact: Arrays, usual: Arrays) -> list[str]:
    """Outputs that are further from float64 than 1e-6 and twice torch's own float32."""

    def error(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
        return float(np.linalg.norm((a - b).ravel()) / max(float(np.linalg.norm(b.ravel())), 1e-30))

    return [n for n, v in exact.items() if error(got[n], v) > max(1e-6, 2 * error(usual[n], v))]


ALL = Features(True, True, True, True, True, True)


@pytest.mark.parametrize("batch", [1, 33])
@pytest.mark.parametrize(
    ("kind", "features"),
    [
        (Small, Features(gradients=True)),
        (Small, replace(ALL, threshold=True, scale=True)),
        (Rows, Features(proximal=True, threshold=True, gradients=True)),
        (Rows, Features(scale=True, gradients=True)),
    ],
    ids=["plain", "all", "rows with a threshold", "scaled rows"],
)
def test_a_step_is_torchs(kind: type[nn.Module], features: Features, batch: int) -> None:
    model = model_of(kind)
    session = OnnxSession(training_graph(model, features).to_bytes(), training=True)
    fed = feeds(model, features, batch)
    exact, usual = (oracle(model, features, fed, t, kind) for t in (torch.float64, torch.float32))
    got = session.run(fed)
    assert set(fed) == set(session.inputs)
    assert set(got) == set(exact)
    assert far(got, exact, usual) == []


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3])
@pytest.mark.parametrize("features", [Features(threshold=True, gradients=True), Features(scale=True, gradients=True)])
def test_a_threshold_of_0_and_a_scale_of_1_change_no_bit(model: Model, features: Features, size: float) -> None:
    """Not even where weights are 0, or so small that their squares are."""
    plain, with_threshold = (
        OnnxSession(training_graph(model, f).to_bytes(), training=True) for f in (Features(gradients=True), features)
    )
    fed = feeds(model, features, 6)
    fed["conv2.weight"] = np.where(np.arange(9).reshape(3, 3) % 2, fed["conv2.weight"], np.float32(size))
    neutral = {n: np.array(0, np.float32) for n in fed if n.endswith("::threshold")}
    neutral |= {step_contract.OUTPUT_SCALE: np.array(1, np.float32)} if features.scale else {}
    got, want = with_threshold.run(fed | neutral), plain.run({n: v for n, v in fed.items() if n in plain.inputs})
    assert set(want) == set(got)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_below_the_threshold_nothing_counts_and_nothing_is_learnt(model: Model) -> None:
    features = Features(threshold=True, gradients=True)
    session = OnnxSession(training_graph(model, features).to_bytes(), training=True)
    fed = feeds(model, features, 8)
    below = np.abs(fed["conv2.weight"]) < THETA
    smaller = fed | {"conv2.weight": np.where(below, fed["conv2.weight"] / 3, fed["conv2.weight"]).astype(np.float32)}
    got, changed = session.run(fed), session.run(smaller)
    assert got[step_contract.LOSS] == changed[step_contract.LOSS]
    assert not got[step_contract.gradient_name("conv2.weight")][below].any()
    assert got[step_contract.gradient_name("conv2.weight")][~below].any()


def test_only_layers_before_the_last_are_scaled() -> None:
    """A bias that is added by its own node is scaled with its layer; two heads side by side are both last."""
    rows = model_of(Rows)
    makers = rows.graph.producers()
    assert sorted(makers[v].op for v in scaled_outputs(rows)) == ["Add", "MatMul"]


def test_a_step_for_a_gpu_computes_the_same(model: Model) -> None:
    features = replace(ALL, gradients=True)
    session = OnnxSession(training_graph(model, features, CUDA).to_bytes(), training=True)
    fed = feeds(model, features, batch=9)
    exact, usual = (oracle(model, features, fed, t) for t in (torch.float64, torch.float32))
    got = session.run(fed)
    assert set(got) == set(exact)
    assert far(got, exact, usual) == []


@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(2, 8), lambda: nn.BatchNorm2d(8), lambda: nn.InstanceNorm2d(8)])
def test_a_step_for_a_gpu_has_no_operator_that_only_a_processor_has(norm: Callable[[], nn.Module]) -> None:
    """onnxruntime's CUDA provider has no batch normalisation that trains, and refuses the whole graph for one. A number
    that follows from a size is copied to the GPU in every step."""
    net = nn.Sequential(nn.Conv2d(2, 8, 3), norm(), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, CLASSES))
    net.input_shape = (2, 8, 8)  # type: ignore[assignment]
    model = import_onnx(export_torch(net), "normed")
    graphs = [training_graph(model, Features(), unit) for unit in (CPU, CUDA)]
    nodes = graphs[1].nodes
    assert not [n.name for n in nodes if n.op == "BatchNormalization" and n.attrs.get("training_mode")]
    of_sizes: set[str] = set()
    for node in nodes:
        if node.op in ("Shape", "Size") or (node.op in ARITHMETIC and of_sizes.intersection(node.inputs)):
            of_sizes.update(node.outputs)
    assert of_sizes
    assert not [n.name for n in nodes if n.op == "Cast" and n.attrs["to"] == 1 and of_sizes.intersection(n.inputs)]
    fed = feeds(model, Features(), batch=9)
    cpu, gpu = (OnnxSession(g.to_bytes(), training=True).run(fed) for g in graphs)
    for name, value in cpu.items():
        np.testing.assert_allclose(gpu[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


# Inputs that onnxruntime's CUDA kernels read on the processor (`InputMemoryType(OrtMemTypeCPUInput, ...)`).
HOST_INPUTS = {
    **dict.fromkeys(("CumSum", "Expand", "OneHot", "Reshape", "Split", "Squeeze", "Tile", "TopK", "Unsqueeze"), (1,)),
    **dict.fromkeys(("Clip", "Dropout", "Pad", "Resize", "Slice"), (1, 2, 3, 4)),
    **{f"Reduce{kind}": (1,) for kind in ("Sum", "Mean", "Max", "Min", "SumSquare", "L2", "LogSumExp")},
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "If": (0,),
    "Loop": (0, 1),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lion"])
def test_a_step_for_a_gpu_reads_none_of_its_inputs_on_the_processor(model: Model, optimizer: str) -> None:
    """A kernel's launch is recorded with what it read there: a replay would go on with the first step's numbers."""
    graph = training_graph(model, replace(ALL, optimizer=optimizer, clip=True, accumulate=True, gradients=True), CUDA)
    makers, inputs = graph.producers(), {port.name for port in graph.inputs}

    def read_inputs(value: str) -> set[str]:
        maker = makers.get(value)
        if maker is None or maker.op in ("Shape", "Size"):
            return {value} & inputs
        return set().union(*map(read_inputs, maker.inputs))

    host_inputs = [
        (node.op, node.inputs[i]) for node in graph.nodes for i in HOST_INPUTS.get(node.op, ()) if i < len(node.inputs)
    ]
    assert host_inputs
    assert not {(op, name) for op, value in host_inputs for name in read_inputs(value)}


def test_the_axes_of_tensors_are_written_where_they_are_asked_for(model: Model) -> None:
    assert training_graph(model, ALL).metadata == {}
    axes = TensorAxes.from_json(training_graph(model, Features(axes=True)).metadata[step_contract.AXES_METADATA])
    assert axes.sizes == model.architecture.sizes
    shapes = {n: tuple(a.length for a in of) for n, of in axes.axes.items()}
    assert shapes == {t.name: t.shape for t in model.architecture.tensors}


def test_a_batch_of_one_position_keeps_statistics_finite() -> None:
    class Flat(nn.Module):
        input_shape = (5,)

        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.norm, self.fc2 = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(torch.relu(self.norm(self.fc1(x))))

    flat = import_onnx(export_torch(randomise_norms(Flat())), "flat")
    got = OnnxSession(training_graph(flat, Features()).to_bytes(), training=True).run(feeds(flat, Features(), 1))
    assert all(np.isfinite(v).all() for v in got.values())


class Normalised(nn.Module):
    """Two normalisations that keep different shares of their old statistics."""

    input_shape = (2, 6, 6)

    def __init__(self, first: float | None, second: float | None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5, momentum=first)
        self.fc, self.last = nn.Linear(5 * 16, 6), nn.BatchNorm1d(6, momentum=second)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.flatten(torch.relu(self.norm(self.conv(x))), 1)
        return self.out(torch.relu(self.last(self.fc(x))))


class Repeated(Normalised):
    """The same, and each normalisation is called twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        x = torch.flatten(torch.relu(self.norm(x) + self.norm(x * x)), 1)
        return self.out(torch.relu(self.last(torch.tanh(self.last(self.fc(x))))))


@pytest.mark.parametrize("kind", [Normalised, Repeated])
@pytest.mark.parametrize(("first", "second"), [(0.1, 1.0), (0.0, 0.3)])
def test_statistics_move_by_the_modules_momentum(first: float, second: float, kind: type[Normalised]) -> None:
    net = randomise_norms(kind(first, second)).double().train()
    normalised_model = import_onnx(export_torch(randomise_norms(kind(first, second))), "normalised")
    net.load_state_dict({n: torch.tensor(v) for n, v in normalised_model.tensors.items()}, strict=False)
    fed = feeds(normalised_model, Features(), 7)
    got = OnnxSession(training_graph(normalised_model, Features()).to_bytes(), training=True).run(fed)
    net(torch.tensor(fed[step_contract.X], dtype=torch.float64))
    for name, value in net.named_buffers():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_allclose(
                got[step_contract.next_name(name)], value.numpy(), rtol=2e-6, atol=1e-7, err_msg=name
            )


@pytest.fixture(scope="module")
def normalised_model() -> bytes:
    return export_torch(randomise_norms(Normalised(0.1, 0.1)))


@pytest.mark.parametrize("momentum", [-0.5, float("nan")])
def test_a_momentum_that_is_no_share_is_refused(normalised_model: bytes, momentum: float) -> None:
    proto = onnx.load_model_from_string(normalised_model)
    norm = next(n for n in proto.graph.node if n.op_type == "BatchNormalization")
    next(a for a in norm.attribute if a.name == "momentum").f = momentum
    with pytest.raises(ModelError, match="momentum of batch normalisation"):
        import_onnx(proto.SerializeToString(), "normalised")


@pytest.mark.parametrize("density", [1.0, 0.1])
def test_one_graph_gives_the_bits_of_a_graph_of_fixed_width(model: Model, density: float) -> None:
    arch = model.architecture
    tensors = Selection.of(arch, widths_at(arch, density)).gather(model.tensors)
    graph = training_graph(model, ALL)
    fed = feeds(model, ALL, 6, tensors=tensors)
    fixed = graph.copy()
    fixed.inputs = [Port(p.name, p.dtype, fed[p.name].shape) for p in fixed.inputs]
    fixed.outputs = [Port(p.name, p.dtype, (None,) * len(p.shape)) for p in fixed.outputs]
    got = OnnxSession(graph.to_bytes(), training=True).run(fed)
    for name, value in OnnxSession(fixed.to_bytes(), training=True).run(fed).items():
        np.testing.assert_array_equal(value, got[name], err_msg=name)


def test_dimensions_of_one_channel_group_have_one_name(model: Model) -> None:
    ports = {p.name: p.shape for p in training_graph(model, ALL).inputs}
    first, second = ports["conv1.weight"], ports["conv2.weight"]
    assert first[0] == second[1] == ports["norm.running_mean"][0] == ports[step_contract.mask_name("norm.weight")][0]
    assert isinstance(first[0], str)
    assert first[1:] == (2, 3, 3)
    assert ports["fc.weight"] == (CLASSES, f"{second[0]}*4")


def test_a_graph_is_of_the_opset_and_the_domain_that_every_board_knows(model: Model) -> None:
    graph = training_graph(model, Features())
    assert (graph.opset, {n.domain for n in graph.nodes}) == (NORMAL_OPSET, {""})


def test_the_gradient_of_the_input_is_not_computed(model: Model) -> None:
    readers = {n.op for n, _ in training_graph(model, Features()).consumers()["conv1.weight"]}
    assert "Conv" in readers
    assert readers <= {"Conv", "Mul", "Sub", "Shape"}  # forward, weight decay, update: no flipped or transposed kernel


def test_the_same_model_gives_the_same_bytes(model: Model) -> None:
    assert training_graph(model, ALL).to_bytes() == training_graph(model, ALL).to_bytes()


def test_a_model_whose_output_has_no_axis_is_refused(model: Model) -> None:
    with pytest.raises(ModelError, match=r"without an axis.*unsqueeze\(1\)"):
        training_graph(replace(model, architecture=replace(model.architecture, output_shape=())), Features())


def test_a_statistic_without_its_norm_is_refused(model: Model) -> None:
    graph = model.graph.copy()
    norm = next(n for n in graph.nodes if n.op == "BatchNormalization")
    norm.op, norm.inputs, norm.attrs = "Identity", norm.inputs[:1], {}
    with pytest.raises(ModelError, match=r"norm\.running_mean"):
        training_graph(replace(model, graph=graph), Features())


def test_a_free_image_size_is_refused() -> None:
    graph = Graph([Port("x", np.dtype(np.float32), ("N", 1, None))])
    with pytest.raises(ModelError, match="free dimensions"):
        training_graph(Model(graph, Architecture("free", (), (), (), (), (1, 1), (2,))), Features())
