"""Lower precision: folded, float16 and int8 graphs beside torch, onnx's own interpreter and numpy."""

import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from fedprune.core import tensorfile
from fedprune.core.errors import ModelError
from fedprune.model.selection import Selection
from fedprune.runtime.precision import CALIBRATION_SAMPLES, RANGES, lowered_weights, measure_ranges, prepare_tensors
from fedprune.runtime.precision_files import PRECISIONS, calibrate_file, graph_file, prepare_file, weights_file
from fedprune.runtime.session import OnnxSession
from fedprune_device.serving.predictor import Predictor
from fedprune_export.bundles.inference import inference_model
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.precision import Lowered, lower
from fedprune_export.pruning.model import Model
from support.marks import mark_soak
from support.nets import device_nets, whole_models
from support.nets import small_nets as nets
from support.nets.wide_sum import WIDE_SUM, saturates
from support.oracles.cutting import distance, inputs, random_selection
from support.processes.arm_userland import tool

pytestmark = pytest.mark.torch

Array = np.ndarray[Any, np.dtype[Any]]


class Sequences(nn.Module):
    """An LSTM between two linear layers."""

    input_shape = (6, 5)

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(5, 8)
        self.lstm = nn.LSTM(8, 7, batch_first=True)
        self.after = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.lstm(torch.relu(self.before(x)))[0][:, -1])


class Layers(nn.Module):
    """Linear layers with a batch norm, a weight divided by its length, and a shift that a layer makes of constants."""

    input_shape = (12,)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(12, 16), nn.BatchNorm1d(16)
        self.second, self.shift = nn.Linear(16, 4, bias=False), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.second.weight / self.second.weight.square().sum().sqrt()
        return torch.relu(self.norm(self.first(x))) @ weight.T + self.shift(torch.ones(1, 3))


NETS: Mapping[str, Callable[[], nn.Module]] = {
    "lenet": nets.lenet,
    "resnet20": nets.resnet20_bn,
    "concat": nets.concat_net,
    "mobilenet": device_nets.mobilenet_v2,
    "waves": whole_models.MODELS["wave_net"].make,
    "transformer": whole_models.MODELS["vision_transformer"].make,
    "layers": lambda: nets.randomise_norms(Layers()),
    "lstm": lambda: Sequences().eval(),
}
ALONE = ("waves", "transformer")
"""Networks that one test alone would export at a push."""

BOUNDS = {"folded": 1e-5, "float16": 5e-3, "int8": 5e-2}
DENSITIES = (1.0, 0.5, 0.25)

_IMPORTED: dict[str, tuple[nn.Module, Model]] = {}


def net(name: str) -> tuple[nn.Module, Model]:
    if name not in _IMPORTED:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            module = NETS[name]()
        _IMPORTED[name] = module, import_onnx(export_torch(module, name=name), name)
    return _IMPORTED[name]


def bundle(folder: Path, model: Model, selection: Selection, precision: str, x: Array) -> Lowered:
    """Lay the files of a precision beside float32's, made as a board makes them."""
    tensors = selection.gather(model.tensors)
    (folder / "inference.onnx").write_bytes(inference_model(model, selection.widths))
    (folder / "weights.safetensors").write_bytes(tensorfile.encode(tensors))
    lowered = lower(model, selection.widths, precision)
    (folder / graph_file(precision)).write_bytes(lowered.graph)
    (folder / prepare_file(precision)).write_bytes(lowered.prepare)
    if lowered.calibrate is not None:
        (folder / calibrate_file(precision)).write_bytes(lowered.calibrate)
    (folder / weights_file(precision)).write_bytes(lowered_weights(folder, precision, tensors, x))
    return lowered


def logits_of(path: Path, x: Array) -> Array:
    """Outputs of a graph, of int8's own kernels where they are exact."""
    return OnnxSession(path, exact=saturates()).run({"x": x})["logits"]


def run_unoptimised(path: Path, x: Array) -> Array:
    """What a graph says when onnxruntime runs it as it is written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def operators(path: Path, optimised: Path) -> Counter[str]:
    """What onnxruntime makes of a graph."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(optimised)
    options.log_severity_level = 4
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(optimised, load_external_data=False).graph.node)


@pytest.mark.parametrize("exact", [pytest.param(False, marks=pytest.mark.soak), True])
def test_int8_is_exact_if_asked_on_any_processor(exact: bool) -> None:
    """On an emulated x86 processor without VNNI, where the kernels saturate."""
    emulator = tool("qemu-x86_64-static", "qemu-user-static")
    if platform.machine() != "x86_64":
        pytest.skip("no wheel for x86 can be had here")
    script = f"from support.nets.wide_sum import wide_sum; print(wide_sum(exact={exact}))"
    command = [emulator, "-cpu", "Haswell", sys.executable, "-c", script]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert (float(done.stdout) == WIDE_SUM) == exact


@pytest.mark.parametrize(
    ("name", "precision", "density"),
    [
        pytest.param(
            name, precision, density, marks=() if (i + j + k) % 3 == 0 and name not in ALONE else pytest.mark.soak
        )
        for i, name in enumerate(NETS)
        for j, precision in enumerate(PRECISIONS)
        for k, density in enumerate(DENSITIES)
    ],
)
@pytest.mark.at_push(5)
def test_every_precision_says_what_float32_says(name: str, precision: str, density: float, tmp_path: Path) -> None:
    model = net(name)[1]
    x = inputs(model, 32)
    bundle(tmp_path, model, random_selection(model, density, seed=1), precision, x)
    mine = run_unoptimised(tmp_path / graph_file(precision), x)
    assert distance(mine, run_unoptimised(tmp_path / "inference.onnx", x)) < BOUNDS[precision]
    assert distance(logits_of(tmp_path / graph_file(precision), x), mine) < 2e-2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_samples_at_all_still_have_outputs(precision: str, tmp_path: Path) -> None:
    model = net("lenet")[1]
    bundle(tmp_path, model, Selection.of(model.architecture, model.architecture.sizes), precision, inputs(model, 8))
    predictor = Predictor(tmp_path / graph_file(precision))
    none = np.zeros((0, *model.architecture.input_shape), np.float32)
    assert predictor.predict(none).shape == (0, model.architecture.classes)


@pytest.mark.parametrize(("name", "left"), [("resnet20", 0), ("mobilenet", 0), ("layers", 0), ("concat", 4)])
def test_norms_behind_layers_are_gone_and_others_stay(name: str, left: int) -> None:
    model = net(name)[1]
    graph = onnx.load_from_string(lower(model, model.architecture.sizes, "folded").graph).graph
    assert sum(n.op_type == "BatchNormalization" for n in graph.node) == left


@pytest.mark.parametrize(
    "name", mark_soak(["normalizer_free", "conv_mixer", "group_norm_resnet"], soak=["group_norm_resnet"])
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_follows_from_weights_alone_is_prepared(name: str, precision: str, tmp_path: Path) -> None:
    model = whole_models.whole_model(name)
    x = whole_models.samples(name, 8)
    bundle(tmp_path, model, random_selection(model, 0.5, seed=2), precision, x)
    logits = logits_of(tmp_path / graph_file(precision), x)
    assert distance(logits, logits_of(tmp_path / "inference.onnx", x)) < BOUNDS[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["resnet20", "mobilenet", "lstm"])
def test_new_weights_need_no_new_graph(name: str, precision: str, tmp_path: Path) -> None:
    model = net(name)[1]
    x = inputs(model, 32)
    selection = random_selection(model, 0.5, seed=4)
    bundle(tmp_path, model, selection, precision, x)
    before = (tmp_path / weights_file(precision)).read_bytes()
    rng = np.random.default_rng(0)
    new = {
        n: (np.abs(v) if n.endswith("running_var") else v) * rng.uniform(0.5, 1.5, v.shape).astype(np.float32)
        for n, v in selection.gather(model.tensors).items()
    }
    (tmp_path / "weights.safetensors").write_bytes(tensorfile.encode(new))
    after = lowered_weights(tmp_path, precision, new, x)
    (tmp_path / weights_file(precision)).write_bytes(after)
    assert len(after) == len(before)
    assert after != before
    logits = logits_of(tmp_path / graph_file(precision), x)
    assert distance(logits, logits_of(tmp_path / "inference.onnx", x)) < BOUNDS[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["resnet20", "mobilenet"])
def test_one_prepare_graph_serves_every_width(name: str, precision: str) -> None:
    model = net(name)[1]
    assert len({lower(model, random_selection(model, d, seed=1).widths, precision).prepare for d in DENSITIES}) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lenet", {"QLinearConv": 2, "QGemm": 3}),
        ("resnet20", {"QLinearConv": 21, "QLinearAdd": 9, "QGemm": 1}),
        ("mobilenet", {"QLinearConv": 11, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1}),
    ],
)
def test_onnxruntime_fuses_all_layers(name: str, expected: dict[str, int], tmp_path: Path) -> None:
    model = net(name)[1]
    bundle(tmp_path, model, random_selection(model, 0.5, seed=1), "int8", inputs(model, 16))
    counts = operators(tmp_path / "int8.onnx", tmp_path / "optimised.onnx")
    assert {op: counts[op] for op in expected} == expected
    assert not counts.keys() & {"Conv", "FusedConv", "Gemm", "Add", "Relu", "Clip"}


@pytest.mark.parametrize("name", ["lenet", "resnet20", "mobilenet", "layers"])
def test_int8_computes_what_the_standard_says(name: str, tmp_path: Path) -> None:
    """onnx's interpreter takes every operator by itself; fused integers may round to a neighbour here and there."""
    model = net(name)[1]
    x = inputs(model, 8)
    bundle(tmp_path, model, random_selection(model, 0.5, seed=1), "int8", x)
    proto = onnx.load(tmp_path / "int8.onnx")
    proto.opset_import[0].version = 19  # the interpreter knows none before, in which 8 bits mean the same
    expected = ReferenceEvaluator(proto).run(None, {"x": x})[0]
    assert distance(logits_of(tmp_path / "int8.onnx", x), expected) < 1e-2


def test_int8_tensors_are_those_of_the_formulas(tmp_path: Path) -> None:
    model = net("layers")[1]
    x = inputs(model, 64)
    bundle(tmp_path, model, Selection.of(model.architecture, model.architecture.sizes), "int8", x)
    tensors, w = tensorfile.load_tensors(tmp_path / "int8.safetensors"), model.tensors
    factor = w["norm.weight"] / np.sqrt(w["norm.running_var"] + 1e-5)
    weight = w["first.weight"] * factor[:, None]
    bias = (w["first.bias"] - w["norm.running_mean"]) * factor + w["norm.bias"]
    hidden = np.maximum(x @ weight.T + bias, 0)
    low = np.mean([p.min() for p in np.split(x, 2)])
    high = np.mean([p.max() for p in np.split(x, 2)])
    stem = next(n for n in tensors if n.endswith("~weight") and tensors[n].shape == (16, 12)).removesuffix("~weight")
    assert tensors[RANGES] == pytest.approx(
        np.array([[low, high], [0, np.mean([p.max() for p in np.split(hidden, 2)])]]), rel=1e-5, abs=1e-6
    )
    scale = (high - low) / 255
    assert tensors["x~scale"] == pytest.approx(scale, rel=1e-6)
    assert tensors["x~zero"] == round(-low / scale)
    scales = np.abs(weight).max(1) / 127
    assert tensors[f"{stem}~scales"] == pytest.approx(scales, rel=1e-5)
    assert np.abs(tensors[f"{stem}~weight"] - np.round(weight / scales[:, None])).max() <= 1
    assert np.abs(tensors[f"{stem}~bias"] - bias / (scales * scale)).max() <= 2
    assert {tensors[f"{stem}~weight"].dtype, tensors[f"{stem}~bias"].dtype} == {np.dtype(np.int8), np.dtype(np.int32)}


def test_a_dead_channel_keeps_its_bias(tmp_path: Path) -> None:
    """Weights of zero have no scale of their own: an int32 of a tiny one could not say the bias."""
    model = net("lenet")[1]
    x = inputs(model, 32)
    bundle(tmp_path, model, Selection.of(model.architecture, model.architecture.sizes), "int8", x)
    tensors = {n: np.array(v) for n, v in model.tensors.items()}
    tensors["conv1.weight"][2] = 0
    tensors["conv1.bias"][2] = 3.0
    (tmp_path / "weights.safetensors").write_bytes(tensorfile.encode(tensors))
    (tmp_path / "int8.safetensors").write_bytes(lowered_weights(tmp_path, "int8", tensors, x))
    assert distance(logits_of(tmp_path / "int8.onnx", x), logits_of(tmp_path / "inference.onnx", x)) < BOUNDS["int8"]


@pytest.mark.parametrize("name", NETS)
def test_float16_says_the_type_of_every_value(name: str, tmp_path: Path) -> None:
    model = net(name)[1]
    lowered = bundle(tmp_path, model, random_selection(model, 0.5, seed=1), "float16", inputs(model, 4))
    proto = onnx.load(tmp_path / "float16.onnx")
    typed = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in (*typed.graph.value_info, *typed.graph.output)}
    halves = {n.op_type for n in proto.graph.node if types.get(n.output[0]) == onnx.TensorProto.FLOAT16}
    assert {v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)} == {onnx.TensorProto.FLOAT}
    assert halves & {"Conv", "Gemm", "MatMul"}
    assert not halves & {
        "Softmax",
        "ReduceMean",
        "LayerNormalization",
        "BatchNormalization",
        "LSTM",
        "GlobalAveragePool",
    }
    assert any("LSTM" in s for s in lowered.float32_nodes) == (name == "lstm")


def test_layers_that_are_to_stay_do(tmp_path: Path) -> None:
    model = net("lenet")[1]
    every = lower(model, model.architecture.sizes, "int8").layers
    lowered = lower(model, model.architecture.sizes, "int8", keep=(every[0], every[-1]))
    assert lowered.layers == every[1:-1]
    assert len(lowered.float32_nodes) == 2


def test_a_model_without_such_layers_is_refused() -> None:
    model = net("lstm")[1]
    with pytest.raises(ModelError, match="no layer of lstm"):
        lower(model, model.architecture.sizes, "int8", keep=lower(model, model.architecture.sizes, "int8").layers)
    with pytest.raises(ModelError, match="bfloat16"):
        lower(model, model.architecture.sizes, "bfloat16")


def test_ranges_are_means_over_batches(tmp_path: Path) -> None:
    model = net("lenet")[1]
    x = inputs(model, 64)
    bundle(tmp_path, model, Selection.of(model.architecture, model.architecture.sizes), "int8", x)
    calibrate = OnnxSession(tmp_path / "calibrate-int8.onnx")
    ranges = measure_ranges(calibrate, x)
    halves = [calibrate.run({"x": p})[RANGES] for p in (x[:32], x[32:])]
    assert ranges == pytest.approx((halves[0] + halves[1]) / 2, rel=1e-6)
    assert ranges[0] == pytest.approx(
        [np.mean([p.min() for p in (x[:32], x[32:])]), np.mean([p.max() for p in (x[:32], x[32:])])]
    )
    many = inputs(model, CALIBRATION_SAMPLES)
    longer = np.concatenate([many, 1000 + many[:1]])
    np.testing.assert_array_equal(measure_ranges(calibrate, longer), measure_ranges(calibrate, many))
    with pytest.raises(ModelError, match="without samples"):
        measure_ranges(calibrate, x[:0])


def test_nonsense_is_not_prepared() -> None:
    model = net("lenet")[1]
    graph = OnnxSession(lower(model, model.architecture.sizes, "int8").prepare)
    ranges = np.tile(np.array([[-1, 1]], np.float32), (int(graph.inputs[RANGES][1][0] or 0), 1))
    tensors = dict(model.tensors)
    assert prepare_tensors(graph, tensors, ranges).keys() >= {RANGES}
    for wrong in (ranges[:-1], ranges[:, ::-1], ranges * np.nan, ranges.astype(np.float64), ranges[:, :1]):
        with pytest.raises(ModelError):
            prepare_tensors(graph, tensors, wrong)
    with pytest.raises(ModelError, match="needs ranges"):
        prepare_tensors(graph, tensors)
    with pytest.raises(ModelError, match=r"missing: got conv1\.weight"):
        prepare_tensors(graph, {n: v for n, v in tensors.items() if n != "conv1.weight"}, ranges)
    tensors["conv1.weight"] = tensors["conv1.weight"] * np.nan
    with pytest.raises(ModelError, match="not finite"):
        prepare_tensors(graph, tensors, ranges)
