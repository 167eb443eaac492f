"""Quantised files are imported as the float models that they approximate."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from fedprune.core.errors import ModelError
from fedprune.model.features import Features
from fedprune.runtime.session import OnnxSession
from fedprune_export.bundles.conversion import onnx_file
from fedprune_export.importing import import_onnx, read_source
from fedprune_export.importing.quantised import rules
from fedprune_export.ir.dropout import read_draws
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.nets.onnx_text import text_file
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


@pytest.mark.parametrize("weights", [QuantType.QUInt8, QuantType.QInt8])
@pytest.mark.parametrize(
    ("net", "samples", "product"), [(transformer, TOKENS, "MatMulInteger"), (conv_net, PICTURES, "ConvInteger")]
)
def test_a_dynamically_quantised_net_trains_as_its_origin(
    net: Callable[[], bytes], samples: Any, product: str, weights: QuantType, tmp_path: Path
) -> None:
    before, after = tmp_path / "float.onnx", tmp_path / "quantised.onnx"
    before.write_bytes(net())
    quantize_dynamic(before, after, weight_type=weights, per_channel=weights == QuantType.QInt8)
    assert product in {n.op_type for n in onnx.load(after).graph.node}
    check_like(import_onnx(after.read_bytes(), "net"), import_onnx(net(), "net"), samples, 0.02)


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
def test_a_quantised_lstm_and_attention_become_those_of_floats(
    *, per_channel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    change_weights(lambda weight: weight * np.float32(1.2), monkeypatch, "r_")
    with pytest.raises(ModelError, match="quantised file differs"):
        read_source(after)


IMAGE, SCORES = "float[N,5] image", "float[N,3] y"
W = np.random.default_rng(3).integers(-127, 128, (5, 3)).astype(np.int8)


@pytest.mark.parametrize("opset", [10, 13, 19])
def test_weights_of_8_bits_without_a_zero_point_are_trained(opset: int) -> None:
    body = """numbers = DequantizeLinear(image, s, z) dequantised = DequantizeLinear(w_quantized, s)
        y = MatMul(numbers, dequantised)"""
    values = {"w_quantized": W, "s": np.float32(0.5), "z": np.uint8(100)}
    raw, x = text_file(body, values, "uint8[N,5] image", SCORES, opset=opset), RNG.integers(0, 256, (3, 5), np.uint8)
    model = import_onnx(raw, "net")
    np.testing.assert_array_equal(model.tensors["w"], W.astype(np.float32) / 2)
    assert distance(outputs(model.graph, x), OnnxSession(raw, exact=True).run({"image": x})["y"]) < 1e-5


def test_fewer_integers_than_the_type_has_are_a_narrower_range() -> None:
    """torch writes 7 bits of a fake quantiser as a Clip of 8-bit integers. Weights in float32 stay as they are."""
    body = """wq = QuantizeLinear<axis = 1>(w, ws, wz) wd = DequantizeLinear<axis = 1>(wq, ws, wz)
        h = MatMul(image, wd) q = QuantizeLinear(h, s, z) narrow = Clip(q, "", most)
        y = DequantizeLinear(narrow, s, z)"""
    w = np.random.default_rng(4).standard_normal((5, 3)).astype(np.float32)
    values = {"w": w, "ws": np.float32([0.02, 0.03, 0.01]), "wz": np.int8([0, 0, 0]), "s": np.float32(0.05)}
    values |= {"z": np.uint8(64), "most": np.uint8(127)}
    model = import_onnx(text_file(body, values, IMAGE, SCORES, opset=13), "net")
    assert operators(model) == {"MatMul": 1}
    np.testing.assert_array_equal(model.tensors["w"], w)


@pytest.mark.parametrize(("reach", "clips"), [(1, 1), (0.001, 0)])
def test_a_range_from_minus_1_to_1_is_a_clip_where_numbers_are_beyond_it(reach: float, clips: int) -> None:
    body = (
        "wd = DequantizeLinear(w, ws) h = MatMul(image, wd) q = QuantizeLinear(h, s, z) y = DequantizeLinear(q, s, z)"
    )
    values = {"w": W, "ws": np.float32(reach / 64), "s": np.float32(2 / 255), "z": np.uint8(128)}
    assert operators(import_onnx(text_file(body, values, IMAGE, SCORES), "net"))["Clip"] == clips


def in_blocks(form: QuantFormat, *, symmetric: bool = False) -> bytes:
    """Products with weights of 4 bits in blocks of 32."""
    graph = Graph(inputs=[Port("image", F32, ("N", 48))], initializers=tensors(w=(48, 20), v=(20, 3)), opset=21)
    hidden = graph.emit("Relu", graph.emit("MatMul", "image", "w"))
    graph.outputs = [Port(graph.emit("MatMul", hidden, "v"), F32, ("N", 3))]
    quantiser = MatMulNBitsQuantizer(graph.to_proto(), block_size=32, is_symmetric=symmetric, quant_format=form)
    quantiser.process()
    raw: bytes = quantiser.model.model.SerializeToString()
    return raw


@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_in_blocks_of_4_bits_are_trained(*, symmetric: bool) -> None:
    raw = in_blocks(QuantFormat.QDQ, symmetric=symmetric)
    model = import_onnx(raw, "net")
    x = np.random.default_rng(1).standard_normal((7, 48)).astype(np.float32)
    assert distance(outputs(model.graph, x), OnnxSession(raw, exact=True).run({"image": x}).popitem()[1]) < 1e-5


@pytest.mark.parametrize("operator", ["QGemm", "MatMulNBits"])
def test_operators_on_integers_are_refused(operator: str, tmp_path: Path) -> None:
    form = QuantFormat.QOperator
    raw = quantise(conv_net(), tmp_path, form, QuantType.QUInt8) if operator == "QGemm" else in_blocks(form)
    with pytest.raises(ModelError, match=rf"{operator}.*quant_format=QuantFormat\.QDQ"):
        import_onnx(raw, "net")


@pytest.mark.parametrize(
    ("node", "scales", "refusal"),
    [
        ("[fused] c = ms.DynamicQuantizeMatMul(image, w, s)", (0.1, 0.1), "DynamicQuantizeMatMul 'fused' computes"),
        ("[cast] c = Cast<to = 2>(q)", (0.1, 0.1), "Cast 'cast' computes"),
        *(("c = Identity(q)", (s, s), "'d' has a scale") for s in (0, np.nan, np.inf, [])),
        ("c = Identity(q)", (0.1, 0.2), "'first' is read with another scale"),
    ],
)
def test_what_has_no_float_form_is_named(node: str, scales: tuple[Any, Any], refusal: str) -> None:
    body = f"[first] q = QuantizeLinear(image, s, z) {node} d = DequantizeLinear(c, t, z) y = MatMul(d, w)"
    values = {name: np.array(scale, np.float32) for name, scale in zip("st", scales, strict=True)}
    values |= {"z": np.uint8(128), "w": W.astype(np.float32)}
    with pytest.raises(ModelError, match=refusal):
        import_onnx(text_file(body, values, IMAGE, SCORES), "net")


FAULTS: dict[str, Callable[[Any], Any]] = {
    "scale": lambda weight: weight * np.float32(1.05),
    "axis": lambda weight: weight * np.linspace(0.8, 1.2, weight.shape[1], dtype=np.float32).reshape(1, -1, 1, 1),
    "zero point": lambda weight: weight + np.abs(weight).max() / 64,
}


def change_weights(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, name: str = "") -> None:
    right = rules.FloatWriter.add_weight
    monkeypatch.setattr(
        rules.FloatWriter, "add_weight", lambda s, n, v: right(s, n, change(v) if n.startswith(name) else v)
    )


@pytest.mark.parametrize("fault", [*FAULTS, "pair", "Clip"])
def test_what_is_written_wrongly_is_found(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = quantise(conv_net(), tmp_path, QuantFormat.QDQ, QuantType.QUInt8)
    if fault in FAULTS:
        change_weights(FAULTS[fault], monkeypatch, "c.w")
    elif fault == "pair":
        monkeypatch.delitem(rules.RULES, "DequantizeLinear")
    else:

        def write_wrongly(graph: Graph, roundings: Mapping[str, Any], least: object) -> list[str]:
            node = [n for n in graph.nodes if n.outputs[0] in roundings][3]
            node.op, node.inputs = "Clip", [node.inputs[0], graph.scalar(0), graph.scalar(0.2)]
            return []

        monkeypatch.setattr("fedprune_export.importing.quantised.conversion.write_clippings", write_wrongly)
    with pytest.raises(ModelError, match="quantised"):
        import_onnx(raw, "net")


@pytest.mark.parametrize("decides", [False, True])
def test_a_wrong_weight_is_found_behind_a_decision_or_a_large_bias(
    *, decides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole numbers say little of what they are decided by, and beside the bias normal numbers would hardly be seen."""
    body = "q = QuantizeLinear(image, one, z) d = DequantizeLinear(q, one, z) dw = DequantizeLinear(w, s) "
    if decides:
        body += "scores = Gemm(d, dw) y = ArgMax<axis = 1, keepdims = 0>(scores)"
    else:
        body += "y = Gemm(d, dw, bias)"
    values = {"s": np.float32(0.1), "one": np.float32(1), "z": np.uint8(0), "w": W, "bias": np.full(3, 900, np.float32)}
    raw = text_file(body, values, IMAGE, "int64[N] y" if decides else SCORES)
    assert import_onnx(raw, "net").architecture.classes == 3
    change_weights(FAULTS["scale"], monkeypatch)
    with pytest.raises(ModelError, match="quantised file differs"):
        import_onnx(raw, "net")


def test_norms_of_an_optimiser_stay_in_files_of_early_opsets() -> None:
    """onnxruntime writes LayerNormalization into the standard's domain, which has none before opset 17."""
    body = """d = DequantizeLinear(square, s) h = MatMul(image, d) n = LayerNormalization(h, gain, offset)
        y = MatMul(n, last)"""
    values = {"s": np.float32(0.1), "square": np.resize(W, (5, 5))}
    values |= tensors(gain=(5,), offset=(5,), last=(5, 3))
    raw = text_file(body, values, IMAGE, SCORES, opset=14)
    x = tensors(x=(3, 5))["x"]
    model = import_onnx(raw, "net")
    assert operators(model)["LayerNormalization"] == 1
    assert distance(outputs(model.graph, x), OnnxSession(raw, exact=True).run({"image": x})["y"]) < 1e-5


def test_draws_of_a_quantised_file_are_trained_with() -> None:
    body = """d = DequantizeLinear(w, s) h = MatMul(image, d) noise = RandomNormalLike<mean = 0.5>(h)
        a = Add(h, noise) q = QuantizeLinear(a, s, z) y = DequantizeLinear(q, s, z)"""
    values = {"s": np.float32(0.1), "z": np.uint8(128), "w": W}
    model = import_onnx(text_file(body, values, IMAGE, SCORES), "net")
    (dropout,) = (n for n in model.graph.nodes if n.op == "Dropout")
    assert read_draws(model.graph.metadata)[dropout.name].mean == 0.5
    assert any("draw" in note for note in model.notes)
