"""Files of other number types: what boards get is float32, and computes what the file does in its own types."""

import io
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from fedprune.core.errors import ModelError
from fedprune.model.features import Features
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import import_onnx
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.nets.onnx_text import text_file
from support.oracles.cutting import distance, outputs

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # of torch's older exporter

F32 = np.dtype(np.float32)
RANDOM = np.random.default_rng(0)


class Scores(torch.nn.Module):
    """Token ids with a mask of the type's lowest number, and a clip to its range."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = torch.nn.Embedding(20, 16), torch.nn.Linear(16, 4)
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.table(x)
        limits = torch.finfo(h.dtype)
        padding = torch.zeros_like(x, dtype=h.dtype).masked_fill(x == 0, limits.min)[:, None]
        h = torch.softmax(h @ h.transpose(1, 2) + padding, -1) @ h
        out: torch.Tensor = self.last(self.layer(torch.clamp(h, limits.min, limits.max)).mean(1))
        return out


def convolutions() -> torch.nn.Module:
    return torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 6, 3, stride=2)),
        *(torch.nn.GroupNorm(3, 6), torch.nn.SiLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()),
        torch.nn.Linear(6, 4),
    )


def normal(kind: Any = np.float32, **shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: RANDOM.standard_normal(shape).astype(kind) for name, shape in shapes.items()}


def exported(module: torch.nn.Module, x: torch.Tensor) -> bytes:
    file = io.BytesIO()
    axes = {"x": {0: "n"}}
    torch.onnx.export(module, (x,), file, dynamo=False, opset_version=17, dynamic_axes=axes, input_names=["x"])
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "tolerance", "is_run"),
    [(torch.float16, 0.01, True), (torch.bfloat16, 0.08, False), (torch.float64, 1e-5, False)],
)
@pytest.mark.parametrize("takes_tokens", [True, False])
def test_a_module_of_another_type_is_trained_in_float32(
    kind: torch.dtype, tolerance: float, is_run: bool, takes_tokens: bool
) -> None:
    torch.manual_seed(0)
    module = (Scores() if takes_tokens else convolutions()).to(kind).eval()
    x = torch.randint(0, 20, (3, 6)) if takes_tokens else torch.randn(3, 3, 9, 9, dtype=kind)
    model = import_onnx(exported(module, x), "net")
    assert {v.dtype for v in model.tensors.values()} == {F32}
    training_graph(model, Features(loss="mse"))
    with torch.no_grad():
        expected = module(x).float().numpy()
    assert distance(outputs(model.graph, x.numpy() if takes_tokens else x.float().numpy()), expected) < tolerance
    name = str(kind).removeprefix("torch.")
    (note,) = (note for note in model.notes if "float32" in note)
    assert name in note
    # onnxruntime has kernels for all of float16, but no convolution of float64.
    assert ("alone" in note) != (is_run or (name == "float64" and takes_tokens))


@pytest.mark.parametrize("keeps_types", [True, False])
@pytest.mark.parametrize("kept", [None, ["Gemm", "Softmax"]])
def test_files_of_the_float16_converter_are_read(keeps_types: bool, kept: list[str] | None) -> None:
    """It appends Casts at the end of the file, so that nodes are out of order, and may keep blocks in float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    torch.manual_seed(0)
    proto = onnx.load_model_from_string(exported(convolutions().eval(), torch.randn(2, 3, 9, 9)))
    raw = convert_float_to_float16(proto, keep_io_types=keeps_types, op_block_list=kept).SerializeToString()
    model = import_onnx(raw, "net")
    x = RANDOM.standard_normal((3, 3, 9, 9)).astype(np.float16)
    session = OnnxSession(raw)
    expected = session.run({"x": x.astype(np.float32 if keeps_types else np.float16)})[session.outputs[0]]
    assert distance(outputs(model.graph, x.astype(np.float32)), expected.astype(np.float32)) < 0.01
    assert any("float16" in note for note in model.notes)
    training_graph(model, Features(loss="mse"))


@pytest.mark.parametrize("end", ["Random numbers", "Classes last"])
def test_files_of_float16_are_compared_whatever_else_is_rewritten(end: str) -> None:
    """Draws and the axis of classes change in both files alike; so does what an optimiser writes at an early opset."""
    is_random = end == "Random numbers"
    noise = "RandomNormalLike<mean=0.5>(h)" if is_random else "Identity(h)"
    last = "y = MatMul(r, v)" if is_random else "scores = MatMul(r, v) y = ArgMax<axis=2, keepdims=0>(scores)"
    y = "float16[N,3,4] y" if is_random else "int64[N,3] y"
    body = f"p = MatMul(x, w) h = LayerNormalization(p, g, g) n = {noise} s = Add(h, n) r = Relu(s) {last}"
    raw = text_file(body, normal(np.float16, w=(6, 5), g=(5,), v=(5, 4)), "float16[N,3,6] x", y, opset=14)
    model = import_onnx(raw, "net")
    (note,) = (note for note in model.notes if "The file computes in float16" in note)
    assert "agree" in note
    training_graph(model, Features(loss="mse"))


def test_a_file_that_computes_something_else_in_float32_is_refused() -> None:
    """10⁹ + x is 10⁹ in float32, as long as x is small."""
    body = """double = Cast<to = 11>(x) sum = Add(double, large) rest = Sub(sum, large) float = Cast<to = 1>(rest)
        product = MatMul(float, w) y = Add(product, b)"""
    with pytest.raises(ModelError, match="roundings"):
        import_onnx(text_file(body, {"large": np.array(1e9), **normal(w=(6, 4), b=(4,))}), "net")


MADE = {
    "ConstantOfShape": "size = Shape(x) made = ConstantOfShape<value = float16[1] {2}>(size) z = Mul(x, made)",
    "EyeLike": "made = EyeLike<dtype = 10>(square) z = MatMul(x, made)",
    "If": """made = If(yes)<then_branch = a () => (float16[1] p) { p = Constant<value = float16[1] {2}>() },
        else_branch = b () => (float16[1] q) { q = Constant<value = float16[1] {2}>() }> z = Mul(x, made)""",
}


@pytest.mark.parametrize("operator", MADE)
def test_attributes_and_constants_of_float16_become_float32(operator: str) -> None:
    """Each node makes something that is multiplied with samples of float16."""
    tensors = {**normal(np.float16, w=(6, 5), b=(5,), v=(5, 4), square=(6, 6)), "yes": np.array(True)}
    body = f"{MADE[operator]} hidden = Gemm(z, w, b) active = Relu(hidden) y = MatMul(active, v)"
    raw = text_file(body, tensors, "float16[N,6] x", "float16[N,4] y")
    model = import_onnx(raw, "net")
    assert sorted(model.tensors) == ["b", "v", "w"]
    x = RANDOM.standard_normal((3, 6)).astype(np.float16)
    expected = OnnxSession(raw).run({"x": x})["y"].astype(np.float32)
    assert distance(outputs(model.graph, x.astype(np.float32)), expected) < 0.01
    training_graph(model, Features(loss="mse"))


def mlp(first: str, bias: str, last: str) -> str:
    return f"product = MatMul(x, {first}) sum = Add(product, {bias}) hidden = Relu(sum) y = MatMul(hidden, {last})"


def check_weights(raw: bytes, *shapes: tuple[int, ...]) -> Model:
    """The model trains tensors of these shapes, its hidden channels can be cut, and it computes what the file does."""
    model = import_onnx(raw, "net")
    assert sorted(v.shape for v in model.tensors.values()) == sorted(shapes)
    assert {v.dtype for v in model.tensors.values()} == {F32}
    assert len(model.architecture.groups) == 1
    x = RANDOM.standard_normal((3, 6)).astype(np.float32)
    assert distance(outputs(model.graph, x), OnnxSession(raw).run({"x": x})["y"]) < 1e-5
    return model


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_weights_that_are_turned_and_then_cast_are_trained(kind: Any) -> None:
    body = "wt = Transpose(w) wf = Cast<to = 1>(wt) vi = Cast<to = 1>(v) vf = Identity(vi)"
    tensors = {**normal(b=(5,)), **normal(kind, w=(5, 6), v=(5, 4))}
    check_weights(text_file(f"{body} {mlp('wf', 'b', 'vf')}", tensors), (5, 6), (5,), (5, 4))


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_weights_in_constant_nodes_behind_others_are_trained(kind: Any) -> None:
    body = "wc = Cast<to = 1>(w) wf = Transpose(wc) bf = Cast<to = 1>(b) vf = Cast<to = 1>(v)"
    constants = normal(kind, w=(5, 6), b=(5,), v=(5, 4))
    check_weights(text_file(f"{body} {mlp('wf', 'bf', 'vf')}", {}, constants=constants), (5, 6), (5,), (5, 4))


@pytest.mark.parametrize("in_node", [True, False])
def test_sparse_weights_are_refused(in_node: bool) -> None:
    values, places = numpy_helper.from_array(np.ones(2, np.float32), "w"), numpy_helper.from_array(np.array([1, 8]))
    sparse = helper.make_sparse_tensor(values, places, [6, 5])
    proto = onnx.load_from_string(text_file(mlp("w", "b", "v"), normal(b=(5,), v=(5, 4))))
    if in_node:
        proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], sparse_value=sparse))
    else:
        proto.graph.sparse_initializer.append(sparse)
    with pytest.raises(ModelError, match="also zeros"):
        import_onnx(proto.SerializeToString(), "net")


def test_weights_that_a_node_fills_are_trained() -> None:
    body = "b = ConstantOfShape(s) v = ConstantOfShape<value = float[1] {1}>(t)"
    tensors = {**normal(w=(6, 5)), "s": np.array([5]), "t": np.array([5, 4])}
    check_weights(text_file(f"{body} {mlp('w', 'b', 'v')}", tensors), (6, 5), (5,), (5, 4))


@pytest.mark.parametrize(
    ("kind", "computed"),
    [
        (np.uint8, np.float16),
        *((kind, np.float32) for kind in (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.bool_)),
    ],
)
def test_pictures_of_whole_numbers_are_taken_as_they_are(kind: Any, computed: Any) -> None:
    x = f"{np.dtype(kind).name}[n,8,8,3] x"
    body = f"""pixels = Cast<to = {helper.np_dtype_to_tensor_dtype(np.dtype(computed))}>(x)
        shares = Mul(pixels, scale) centred = Sub(shares, mean) planes = Transpose<perm = [0, 3, 1, 2]>(centred)
        maps = Conv(planes, k, b) active = Relu(maps) means = GlobalAveragePool(active) features = Flatten(means)
        scores = Gemm(features, w) y = Cast<to = 1>(scores)"""
    constants = {"mean": np.array([0.4, 0.5, 0.6], computed).reshape((1, 1, 1, 3)), "scale": computed(1 / 255)}
    raw = text_file(body, {**constants, **normal(computed, k=(6, 3, 3, 3), b=(6,), w=(6, 4))}, x)
    model = import_onnx(raw, "net")
    assert model.graph.inputs[0].dtype == kind
    assert len(model.architecture.groups) == 1
    samples = RANDOM.integers(0, 2 if kind is np.bool_ else 100, (3, 8, 8, 3)).astype(kind)
    expected = OnnxSession(raw).run({"x": samples})["y"]
    assert distance(outputs(model.graph, samples), expected) < (1e-5 if computed is np.float32 else 0.01)
    OnnxSession(training_graph(model, Features()).to_bytes(), training=True)


@pytest.mark.parametrize("kind", ["int32", "int16", "uint8"])
def test_token_ids_of_any_width_are_taken(kind: str) -> None:
    body = """ids = Cast<to = 6>(x) words = Gather(table, ids) text = ReduceMean<axes = [1], keepdims = 0>(words)
        hidden = Gemm(text, w) active = Relu(hidden) y = Gemm(active, v)"""
    raw = text_file(body, normal(table=(30, 8), w=(8, 5), v=(5, 4)), f"{kind}[n,6] x")
    model = import_onnx(raw, "net")
    ids = RANDOM.integers(0, 30, (3, 6)).astype(model.graph.inputs[0].dtype)
    assert distance(outputs(model.graph, ids), OnnxSession(raw).run({"x": ids})["y"]) < 1e-5
    # Its gradient scatters into the table, for which onnxruntime takes indices of 64 bits alone.
    OnnxSession(training_graph(model, Features()).to_bytes(), training=True)
