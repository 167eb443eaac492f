"""Quantised files are imported as the float models that they approximate."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from fedprune.core.errors import ModelError
from fedprune.model.features import Features
from fedprune.runtime.session import OnnxSession
from fedprune_export.bundles.conversion import onnx_file
from fedprune_export.importing import ImportChoices, import_onnx, read_source
from fedprune_export.importing.quantised.dequantisation import RULES
from fedprune_export.ir.dropout import read_draws
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.oracles.cutting import cut_error, distance, outputs, random_selection

F32 = np.dtype(np.float32)
RNG = np.random.default_rng(0)
PICTURES = RNG.random((32, 3, 8, 8), np.float32)
TOKENS = RNG.integers(0, 20, (16, 6))


def tensors(**shapes: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape).astype(np.float32) * 0.4 for name, shape in shapes.items()}


def conv_net(*, opset: int = 17) -> bytes:
    """Convolutions with Relu and Clip, a sum with a bypass, a leaky branch, and a dense layer."""
    shapes: dict[str, tuple[int, ...]] = {"a.w": (6, 3, 3, 3), "b.w": (6, 6, 3, 3), "c.w": (8, 6, 1, 1), "o.w": (12, 4)}
    g = Graph(inputs=[Port("image", F32, ("N", 3, 8, 8))], opset=opset)
    g.initializers = tensors(**shapes, **{"a.b": (6,), "b.b": (6,), "c.b": (8,), "d.w": (4, 8, 1, 1), "o.b": (4,)})
    g.initializers["b.w"] *= 3  # values beyond 6, so that the range ends there
    pad = {"pads": [1, 1, 1, 1]}
    h = g.emit("Relu", g.emit("Conv", "image", "a.w", "a.b", attrs=pad, out="a"), out="ra")
    h = g.emit("Add", h, g.emit("Conv", h, "b.w", "b.b", attrs=pad, out="b"), out="sum")
    h = g.emit("Clip", h, g.scalar(0), g.scalar(6), out="clipped")
    h = g.emit("Relu", g.emit("Conv", h, "c.w", "c.b", out="c"), out="rc")
    h = g.emit("MaxPool", h, attrs={"kernel_shape": [2, 2], "strides": [2, 2]}, out="small")
    leaky = g.emit("LeakyRelu", g.emit("Conv", h, "d.w", out="d"), attrs={"alpha": 0.1}, out="ld")
    h = g.emit("Concat", leaky, g.emit("Sigmoid", h, out="gate"), attrs={"axis": 1}, out="both")
    h = g.emit("Flatten", g.emit("GlobalAveragePool", h, out="mean"), out="flat")
    g.outputs = [Port(g.emit("Gemm", h, "o.w", "o.b", out="scores"), F32, ("N", 4))]
    return g.to_bytes()


def transformer(opset: int = 17) -> bytes:
    """One head of attention over embedded tokens, and a dense layer."""
    g = Graph(inputs=[Port("ids", np.dtype(np.int64), ("N", 6))], opset=opset)
    g.initializers = tensors(
        rows=(20, 8), places=(6, 8), q=(8, 8), k=(8, 8), v=(8, 8), up=(8, 16), up_bias=(16,), last=(16, 3)
    )
    h = g.emit("Add", g.emit("Gather", "rows", "ids", out="embedded"), "places")
    q, k, v = (g.emit("MatMul", h, name, out=f"{name}h") for name in "qkv")
    scores = g.emit("MatMul", q, g.emit("Transpose", k, attrs={"perm": [0, 2, 1]}))
    h = g.emit("MatMul", g.emit("Softmax", scores, attrs={"axis": -1}), v)
    h = g.emit("Relu", g.emit("Add", g.emit("MatMul", h, "up"), "up_bias"))
    g.outputs = [
        Port(g.emit("MatMul", g.emit("ReduceMean", h, attrs={"axes": [1], "keepdims": 0}), "last"), F32, ("N", 3))
    ]
    return g.to_bytes()


class Samples(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, x: np.ndarray[Any, Any]) -> None:
        self._batches = iter([{"image": x}])

    def get_next(self) -> Mapping[str, Any] | None:
        return next(self._batches, None)


def quantise(raw: bytes, folder: Path, form: QuantFormat, activations: QuantType, **choices: Any) -> bytes:
    before, after = folder / "float.onnx", folder / "quantised.onnx"
    before.write_bytes(raw)
    weights = choices.pop("weight_type", QuantType.QInt8)
    quantize_static(
        before, after, Samples(PICTURES), quant_format=form, activation_type=activations, weight_type=weights, **choices
    )
    return after.read_bytes()


def operators(model: Model) -> Counter[str]:
    return Counter(n.op for n in model.graph.nodes)


def check_like(model: Model, origin: Model, x: np.ndarray[Any, Any], far: float) -> None:
    """A model has its origin's channels and, with the same weights, its outputs; the weights are nearly the same."""
    assert model.tensors.keys() == origin.tensors.keys()
    assert sorted(model.architecture.sizes) == sorted(origin.architecture.sizes)
    assert max(distance(model.tensors[n], origin.tensors[n]) for n in model.tensors) < far
    graph = origin.graph.copy()
    graph.initializers |= model.tensors
    assert distance(outputs(model.graph, x), outputs(graph, x)) < 1e-5
    training_graph(model, Features())


SYMMETRIC = {"extra_options": {"ActivationSymmetric": True, "WeightSymmetric": True}}
STATIC: dict[str, tuple[int, QuantFormat, QuantType, dict[str, Any]]] = {
    "pairs": (17, QuantFormat.QDQ, QuantType.QUInt8, {}),
    "pairs as TensorRT's": (13, QuantFormat.QDQ, QuantType.QInt8, {"per_channel": True, **SYMMETRIC}),
    "16 bits": (17, QuantFormat.QDQ, QuantType.QInt16, {}),
    "weights of 4 bits": (21, QuantFormat.QDQ, QuantType.QUInt8, {"weight_type": QuantType.QInt4}),
    "operators": (17, QuantFormat.QOperator, QuantType.QUInt8, {"per_channel": True}),
    "operators on signed integers": (13, QuantFormat.QOperator, QuantType.QInt8, {}),
}


@pytest.mark.parametrize("kind", STATIC)
def test_a_quantised_net_trains_as_its_origin(kind: str, tmp_path: Path) -> None:
    opset, form, activations, choices = STATIC[kind]
    origin = import_onnx(conv_net(opset=opset), "net")
    model = import_onnx(quantise(conv_net(opset=opset), tmp_path, form, activations, **choices), "net")
    assert operators(model) == operators(origin)
    check_like(model, origin, PICTURES, 0.3 if "4 bits" in kind else 0.02)
    assert cut_error(model, random_selection(model, 0.5, seed=1)) < 1e-5
    notes = " ".join(model.notes)
    assert "quantised" in notes
    # A symmetric range goes as far below 0 as above, so the quantiser left Relu and Clip where they were.
    assert ("Clip to 6" in notes and "Relu" in notes) == ("TensorRT" not in kind)
    written = onnx_file(model.graph, model.tensors, "net")
    assert import_onnx(written, "net").architecture.digest == model.architecture.digest


@pytest.mark.parametrize("optimised", [False, True])
@pytest.mark.parametrize("weights", [QuantType.QUInt8, QuantType.QInt8])
def test_a_dynamically_quantised_transformer_trains_as_its_origin(
    weights: QuantType, *, optimised: bool, tmp_path: Path
) -> None:
    """onnxruntime's optimiser fuses what the quantiser writes."""
    files = [tmp_path / name for name in ("float.onnx", "quantised.onnx", "optimised.onnx")]
    files[0].write_bytes(transformer())
    quantize_dynamic(*files[:2], weight_type=weights, per_channel=weights == QuantType.QInt8)
    if optimised:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(files[2])
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        onnxruntime.InferenceSession(
            str(files[1]), options, providers=["CPUExecutionProvider"], disabled_optimizers=["MatmulTransposeFusion"]
        )
        assert "DynamicQuantizeMatMul" in {n.op_type for n in onnx.load(files[2]).graph.node}
    check_like(import_onnx(files[1 + optimised].read_bytes(), "net"), import_onnx(transformer(), "net"), TOKENS, 0.02)


def sequence_net() -> bytes:
    """An LSTM, onnxruntime's fused attention, and a dense layer."""
    g = Graph(inputs=[Port("image", F32, ("N", 6, 5))], opset=17)
    g.initializers = tensors(w=(1, 32, 5), r=(1, 32, 8), b=(1, 64), qkv=(8, 24), qkv_bias=(24,), last=(8, 3))
    steps = g.emit("Transpose", "image", attrs={"perm": [1, 0, 2]})
    h = g.emit("Squeeze", g.emit("LSTM", steps, "w", "r", "b", attrs={"hidden_size": 8}, out="states"), g.ints(1))
    h = g.emit("Transpose", h, attrs={"perm": [1, 0, 2]})
    h = g.emit("Attention", h, "qkv", "qkv_bias", attrs={"num_heads": 2}, domain="com.microsoft", out="attended")
    h = g.emit("ReduceMean", h, attrs={"axes": [1], "keepdims": 0})
    g.outputs = [Port(g.emit("MatMul", h, "last"), F32, ("N", 3))]
    return g.to_bytes()


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_quantised_lstm_and_attention_become_those_of_floats(*, per_channel: bool, tmp_path: Path) -> None:
    before, after = tmp_path / "float.onnx", tmp_path / "quantised.onnx"
    before.write_bytes(sequence_net())
    quantize_dynamic(before, after, per_channel=per_channel)
    assert {n.op_type for n in onnx.load(after).graph.node} >= {"DynamicQuantizeLSTM", "QAttention"}
    raw = read_source(after)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load_model_from_string(raw).graph.initializer}
    proto = onnx.load_model_from_string(sequence_net())
    for tensor in proto.graph.initializer:
        if tensor.name in stored:
            tensor.CopyFrom(numpy_helper.from_array(stored[tensor.name], tensor.name))
    x = RNG.standard_normal((4, 6, 5)).astype(np.float32)
    values = [OnnxSession(file).run({"image": x}).popitem()[1] for file in (raw, proto.SerializeToString())]
    assert distance(*values) < 1e-5
    assert distance(values[0], OnnxSession(sequence_net()).run({"image": x}).popitem()[1]) < 0.03


def file_of(
    nodes: list[onnx.NodeProto],
    values: Mapping[str, Any],
    opset: int,
    out: tuple[int | str, ...] = ("N", 3),
    kind: int = TensorProto.FLOAT,
) -> bytes:
    """A model of 5 numbers `image` that ends in `y`."""
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 5])],
        [helper.make_tensor_value_info("y", kind, list(out))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    raw: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return raw


W = np.random.default_rng(3).integers(-127, 128, (5, 3)).astype(np.int8)


@pytest.mark.parametrize("opset", [10, 13, 19])
def test_weights_of_8_bits_without_a_zero_point_are_trained(opset: int) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w_quantized", "s"], ["dequantised"]),
        helper.make_node("MatMul", ["image", "dequantised"], ["y"]),
    ]
    model = import_onnx(file_of(nodes, {"w_quantized": W, "s": np.float32(0.5)}, opset), "net")
    np.testing.assert_array_equal(model.tensors["w"], W.astype(np.float32) / 2)


def test_fewer_integers_than_the_type_has_are_a_narrower_range() -> None:
    """torch writes 7 bits of a fake quantiser as a Clip of 8-bit integers. Weights in float32 stay as they are."""
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], axis=1),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], axis=1),
        helper.make_node("MatMul", ["image", "wd"], ["h"]),
        helper.make_node("QuantizeLinear", ["h", "s", "z"], ["q"]),
        helper.make_node("Clip", ["q", "", "most"], ["narrow"]),
        helper.make_node("DequantizeLinear", ["narrow", "s", "z"], ["y"]),
    ]
    w = np.random.default_rng(4).standard_normal((5, 3)).astype(np.float32)
    values = {"w": w, "ws": np.float32([0.02, 0.03, 0.01]), "wz": np.int8([0, 0, 0]), "s": np.float32(0.05)}
    model = import_onnx(file_of(nodes, {**values, "z": np.uint8(64), "most": np.uint8(127)}, 13), "net")
    assert operators(model) == {"MatMul": 1}
    np.testing.assert_array_equal(model.tensors["w"], w)


@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_in_blocks_of_4_bits_are_trained(*, symmetric: bool) -> None:
    graph = Graph(inputs=[Port("image", F32, ("N", 48))], initializers=tensors(w=(48, 20), v=(20, 3)))
    graph.outputs = [
        Port(graph.emit("MatMul", graph.emit("Relu", graph.emit("MatMul", "image", "w")), "v"), F32, ("N", 3))
    ]
    quantiser = MatMulNBitsQuantizer(graph.to_proto(), block_size=32, is_symmetric=symmetric)
    quantiser.process()
    raw = quantiser.model.model.SerializeToString()
    model = import_onnx(raw, "net")
    x = np.random.default_rng(1).standard_normal((7, 48)).astype(np.float32)
    assert distance(outputs(model.graph, x), OnnxSession(raw).run({"image": x}).popitem()[1]) < 1e-5
    assert model.architecture.sizes == (20,)


def test_a_source_is_read_as_a_file_of_floats(tmp_path: Path) -> None:
    """A job's file is the float model, so that everything that a user may choose refers to its values."""
    file = tmp_path / "net.onnx"
    file.write_bytes(quantise(conv_net(), tmp_path, QuantFormat.QOperator, QuantType.QUInt8))
    raw = read_source(file, ImportChoices(output="flat"))
    assert not {n.op_type for n in onnx.load_model_from_string(raw).graph.node if "Linear" in n.op_type}
    model = import_onnx(raw, "net")
    assert model.architecture.output_shape == (12,)
    assert any("quantised" in note for note in model.notes)


@pytest.mark.parametrize(
    ("node", "texts"),
    [
        (helper.make_node("QMoE", ["q"], ["c"], "experts", domain="com.microsoft"), ["QMoE 'experts'"]),
        (helper.make_node("BitShift", ["q", "q"], ["c"], "shift", direction="LEFT"), ["BitShift 'shift'"]),
        (helper.make_node("Cast", ["q"], ["c"], "cast", to=TensorProto.UINT8), ["Cast 'cast'"]),
    ],
)
def test_an_operator_on_integers_without_a_float_form_is_named(node: onnx.NodeProto, texts: list[str]) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"]),
        node,
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    values = {"s": np.float32(0.1), "z": np.uint8(128), "w": W.astype(np.float32)}
    with pytest.raises(ModelError) as caught:
        import_onnx(file_of(nodes, values, 17), "net")
    for text in [*texts, "float32"]:
        assert text in str(caught.value)


@pytest.mark.parametrize("scale", [0, -0.1, np.nan, np.inf, []])
def test_a_scale_that_is_no_positive_number_is_refused(scale: Any) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "s"], ["q"], "first"),
        helper.make_node("DequantizeLinear", ["q", "s"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    with pytest.raises(ModelError, match="QuantizeLinear 'first' has a scale"):
        import_onnx(file_of(nodes, {"s": np.float32(scale), "w": W.astype(np.float32)}, 17), "net")


@pytest.mark.parametrize("name", ["QLinearAdd", "QLinearConv", "QLinearSigmoid"])
def test_an_operator_that_is_written_wrongly_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rounding is compared with the file's, so that a wrong rule doesn't go unnoticed."""
    raw = quantise(conv_net(), tmp_path, QuantFormat.QOperator, QuantType.QUInt8)
    right, wrong = RULES[name], {"Add": "Mul", "Sigmoid": "Tanh"}

    def write_wrongly(state: Any, node: Any) -> None:
        right(state, node)
        written = next(n for n in reversed(state.graph.nodes) if name.endswith(n.op))
        if written.op == "Conv" and len(written.inputs) > 2:
            state.graph.initializers[written.inputs[2]] = state.graph.initializers[written.inputs[2]] + 0.1
        elif written.op in wrong:
            written.op = wrong[written.op]

    monkeypatch.setitem(RULES, name, write_wrongly)
    with pytest.raises(ModelError, match="quantised") as caught:
        import_onnx(raw, "net")
    assert "steps" in str(caught.value)


@pytest.mark.parametrize("is_wrong", [False, True])
def test_what_a_decision_reads_is_compared_with_the_file(*, is_wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the last rounding, whole numbers alone say little of what they are decided by."""
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["dw"]),
        helper.make_node("MatMul", ["d", "dw"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["y"], axis=1, keepdims=0),
    ]
    right = RULES["DequantizeLinear"]

    def write_wrongly(state: Any, node: Any) -> None:
        right(state, node)
        if "w" in state.weights and is_wrong:
            state.graph.initializers["w"] = state.graph.initializers["w"] * np.float32(1.01)

    monkeypatch.setitem(RULES, "DequantizeLinear", write_wrongly)
    raw = file_of(nodes, {"s": np.float32(0.1), "z": np.uint8(128), "w": W}, 17, ("N",), TensorProto.INT64)
    if not is_wrong:
        assert import_onnx(raw, "net").architecture.classes == 3
        return
    with pytest.raises(ModelError, match="'scores'"):
        import_onnx(raw, "net")


def test_norms_of_an_optimiser_stay_in_files_of_early_opsets() -> None:
    """onnxruntime writes LayerNormalization into the standard's domain, which has none before opset 17."""
    nodes = [
        helper.make_node("DequantizeLinear", ["square", "s"], ["d"]),
        helper.make_node("MatMul", ["image", "d"], ["h"]),
        helper.make_node("LayerNormalization", ["h", "gain", "offset"], ["n"]),
        helper.make_node("MatMul", ["n", "last"], ["y"]),
    ]
    values = {"s": np.float32(0.1), "square": np.resize(W, (5, 5))}
    values |= tensors(gain=(5,), offset=(5,), last=(5, 3))
    raw = file_of(nodes, values, 14)
    x = tensors(x=(3, 5))["x"]
    model = import_onnx(raw, "net")
    assert operators(model)["LayerNormalization"] == 1
    assert distance(outputs(model.graph, x), OnnxSession(raw, exact=True).run({"image": x})["y"]) < 1e-5


def test_draws_of_a_quantised_file_are_trained_with() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"]),
        helper.make_node("MatMul", ["image", "d"], ["h"]),
        helper.make_node("RandomNormalLike", ["h"], ["noise"], mean=0.5),
        helper.make_node("Add", ["h", "noise"], ["a"]),
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    model = import_onnx(file_of(nodes, {"s": np.float32(0.1), "z": np.uint8(128), "w": W}, 17), "net")
    (dropout,) = (n for n in model.graph.nodes if n.op == "Dropout")
    assert read_draws(model.graph.metadata)[dropout.name].mean == 0.5
    assert any("draw" in note for note in model.notes)
