"""Files of other number types: what boards get is float32, and computes what the file does in its own types."""

import io
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fedprune.core.errors import ModelError
from fedprune.model.features import Features
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import import_onnx
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
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
    training_graph(model, Features())
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
    training_graph(model, Features())


@pytest.mark.parametrize("end", ["Random numbers", "Classes last"])
def test_files_of_float16_are_compared_whatever_else_is_rewritten(end: str) -> None:
    """Draws and the axis of classes change in both files alike; so does what an optimiser writes at an early opset."""
    last = ["y = MatMul(r, v)"]
    shape = "float16[N,3,4] y" if end == "Random numbers" else "int64[N,3] y"
    if end == "Classes last":
        last = ["scores = MatMul(r, v)", "y = ArgMax<axis=2, keepdims=0>(scores)"]
    noise = "RandomNormalLike<mean=0.5>(h)" if end == "Random numbers" else "Identity(h)"
    body = " ".join(["p = MatMul(x, w) h = LayerNormalization(p, g, g) n =", noise, "s = Add(h, n) r = Relu(s)", *last])
    head = '<ir_version: 8, opset_import: ["" : 14]>'
    proto = onnx.parser.parse_model(f"{head} net (float16[N,3,6] x) => ({shape}) {{ {body} }}")
    proto.graph.initializer.extend(
        tensor(n, *s, kind=np.float16) for n, s in (("w", (6, 5)), ("g", (5,)), ("v", (5, 4)))
    )
    model = import_onnx(proto.SerializeToString(), "net")
    (note,) = (note for note in model.notes if "The file computes in float16" in note)
    assert "agree" in note
    training_graph(model, Features())


def test_a_file_that_computes_something_else_in_float32_is_refused() -> None:
    """10⁹ + x is 10⁹ in float32, as long as x is small."""
    nodes = [
        helper.make_node("Cast", ["x"], ["double"], to=TensorProto.DOUBLE),
        helper.make_node("Add", ["double", "large"], ["sum"]),
        helper.make_node("Sub", ["sum", "large"], ["rest"]),
        helper.make_node("Cast", ["rest"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["float", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["y"]),
    ]
    large = numpy_helper.from_array(np.array(1e9), "large")
    with pytest.raises(ModelError, match="roundings"):
        import_onnx(file_of(nodes, [large, tensor("w", 6, 4), tensor("b", 4)]), "net")


@pytest.mark.parametrize("operator", ["ConstantOfShape", "EyeLike", "Range", "CastLike", "If"])
def test_attributes_and_constants_of_float16_become_float32(operator: str) -> None:
    """Each node makes something that is multiplied with samples of float16."""
    half, names = TensorProto.FLOAT16, ("then", "else")
    two = numpy_helper.from_array(np.array([2], np.float16))
    branches = [
        helper.make_graph(
            [helper.make_node("Constant", [], [n], value=two)], n, [], [helper.make_tensor_value_info(n, half, [1])]
        )
        for n in names
    ]
    makers = {
        "ConstantOfShape": [
            helper.make_node("Shape", ["x"], ["size"]),
            helper.make_node("ConstantOfShape", ["size"], ["made"], value=two),
        ],
        "EyeLike": [helper.make_node("EyeLike", ["square"], ["made"], dtype=half)],
        "Range": [
            helper.make_node("Range", ["0", "6", "1"], ["steps"]),
            helper.make_node("Cast", ["steps"], ["made"], to=half),
        ],
        "CastLike": [helper.make_node("CastLike", ["float", "x"], ["made"])],
        "If": [helper.make_node("If", ["yes"], ["made"], then_branch=branches[0], else_branch=branches[1])],
    }
    nodes = [
        *makers[operator],
        helper.make_node("MatMul" if operator == "EyeLike" else "Mul", ["x", "made"], ["z"]),
        helper.make_node("Gemm", ["z", "w", "b"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "v"], ["y"]),
    ]
    others = {"square": np.zeros((6, 6), np.float16), "float": np.float32(3), "yes": np.array(True)}
    others |= {name: np.float64(name) for name in ("0", "6", "1")}
    tensors = [tensor(n, *s, kind=np.float16) for n, s in (("w", (6, 5)), ("b", (5,)), ("v", (5, 4)))]
    tensors += [numpy_helper.from_array(np.asarray(value), name) for name, value in others.items()]
    raw = file_of(nodes, tensors, kind=half)
    model = import_onnx(raw, "net")
    assert sorted(model.tensors) == ["b", "v", "w"]
    x = RANDOM.standard_normal((3, 6)).astype(np.float16)
    expected = OnnxSession(raw).run({"x": x})["y"].astype(np.float32)
    assert distance(outputs(model.graph, x.astype(np.float32)), expected) < 0.01
    training_graph(model, Features())


def file_of(
    nodes: list[Any], tensors: list[Any], sparse: list[Any] | None = None, kind: int = TensorProto.FLOAT
) -> bytes:
    """A file of the input `x` [n, 6] and the output `y` [n, 4]."""
    x, y = (helper.make_tensor_value_info(n, kind, ("n", d)) for n, d in (("x", 6), ("y", 4)))
    graph = helper.make_graph(nodes, "g", [x], [y], tensors, sparse_initializer=sparse)
    raw: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return raw


def mlp(first: str, bias: str, last: str) -> list[Any]:
    return [
        helper.make_node("MatMul", ["x", first], ["product"]),
        helper.make_node("Add", ["product", bias], ["sum"]),
        helper.make_node("Relu", ["sum"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", last], ["y"]),
    ]


def check_weights(raw: bytes, *shapes: tuple[int, ...]) -> Model:
    """The model trains tensors of these shapes, its hidden channels can be cut, and it computes what the file does."""
    model = import_onnx(raw, "net")
    assert sorted(v.shape for v in model.tensors.values()) == sorted(shapes)
    assert {v.dtype for v in model.tensors.values()} == {F32}
    assert len(model.architecture.groups) == 1
    x = RANDOM.standard_normal((3, 6)).astype(np.float32)
    assert distance(outputs(model.graph, x), OnnxSession(raw).run({"x": x})["y"]) < 1e-5
    return model


def tensor(name: str, *shape: int, kind: Any = np.float32) -> Any:
    return numpy_helper.from_array(RANDOM.standard_normal(shape).astype(kind), name)


def constant(name: str, *shape: int, kind: Any = np.float32) -> Any:
    return helper.make_node("Constant", [], [name], value=tensor(name, *shape, kind=kind))


def cast(source: str, target: str) -> Any:
    return helper.make_node("Cast", [source], [target], to=TensorProto.FLOAT)


def turned(source: str, target: str) -> Any:
    return helper.make_node("Transpose", [source], [target])


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_weights_that_are_turned_and_then_cast_are_trained(kind: Any) -> None:
    nodes = [turned("w", "wt"), cast("wt", "wf"), cast("v", "vi"), helper.make_node("Identity", ["vi"], ["vf"])]
    tensors = [tensor("w", 5, 6, kind=kind), tensor("b", 5), tensor("v", 5, 4, kind=kind)]
    check_weights(file_of(nodes + mlp("wf", "b", "vf"), tensors), (5, 6), (5,), (5, 4))


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_weights_in_constant_nodes_behind_others_are_trained(kind: Any) -> None:
    nodes = [
        *(constant("w", 5, 6, kind=kind), constant("b", 5, kind=kind), constant("v", 5, 4, kind=kind)),
        *(cast("w", "wc"), turned("wc", "wf"), cast("b", "bf"), cast("v", "vf")),
    ]
    check_weights(file_of(nodes + mlp("wf", "bf", "vf"), []), (5, 6), (5,), (5, 4))


@pytest.mark.parametrize("per_axis", [True, False])
@pytest.mark.parametrize("in_node", [True, False])
def test_sparse_weights_are_trained_densely(per_axis: bool, in_node: bool) -> None:
    dense = RANDOM.standard_normal((6, 5)).astype(np.float32)
    dense[np.abs(dense) < 1] = 0
    indices = np.argwhere(dense) if per_axis else np.flatnonzero(dense)
    values = numpy_helper.from_array(dense[dense != 0], "w")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(indices.astype(np.int64), "w.places"), [6, 5])
    nodes = [helper.make_node("Constant", [], ["w"], sparse_value=sparse)] if in_node else []
    raw = file_of(nodes + mlp("w", "b", "v"), [tensor("b", 5), tensor("v", 5, 4)], [] if in_node else [sparse])
    model = check_weights(raw, (6, 5), (5,), (5, 4))
    assert any("sparse" in note for note in model.notes)
    np.testing.assert_array_equal(model.tensors["w"], dense)


def test_a_huge_sparse_tensor_is_refused() -> None:
    values, places = (numpy_helper.from_array(np.ones(1, kind), "w") for kind in (np.float32, np.int64))
    sparse = helper.make_sparse_tensor(values, places, [2**20, 2**20])
    with pytest.raises(ModelError, match="'w'"):
        import_onnx(file_of(mlp("w", "b", "v"), [tensor("b", 5), tensor("v", 5, 4)], [sparse]), "net")


def test_weights_that_a_node_fills_are_trained() -> None:
    sizes = [numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in (("s", [5]), ("t", [5, 4]))]
    zeros, ones = (numpy_helper.from_array(np.array([number], np.float32)) for number in (0, 1))
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["b"], value=zeros),
        helper.make_node("ConstantOfShape", ["t"], ["v"], value=ones),
    ]
    check_weights(file_of(nodes + mlp("w", "b", "v"), [tensor("w", 6, 5), *sizes]), (6, 5), (5,), (5, 4))


def pictures(kind: int, *, colours_last: bool, computed: Any = np.float32) -> bytes:
    """A file of the input `x` that casts pictures, scales them, and classifies them."""
    cast_to = int(helper.np_dtype_to_tensor_dtype(np.dtype(computed)))
    turn = [helper.make_node("Transpose", ["centred"], ["planes"], perm=[0, 3, 1, 2])] if colours_last else []
    nodes = [
        helper.make_node("Cast", ["x"], ["pixels"], to=cast_to),
        helper.make_node("Mul", ["pixels", "scale"], ["shares"]),
        helper.make_node("Sub", ["shares", "mean"], ["centred"]),
        *turn,
        helper.make_node("Conv", ["planes" if turn else "centred", "k", "b"], ["maps"]),
        helper.make_node("Relu", ["maps"], ["active"]),
        helper.make_node("GlobalAveragePool", ["active"], ["mean map"]),
        helper.make_node("Flatten", ["mean map"], ["features"]),
        helper.make_node("Gemm", ["features", "w"], ["scores"]),
        helper.make_node("Cast", ["scores"], ["y"], to=TensorProto.FLOAT),
    ]
    mean = np.array([0.4, 0.5, 0.6], computed).reshape((1, 1, 1, 3) if colours_last else (1, 3, 1, 1))
    tensors = [numpy_helper.from_array(mean, "mean"), numpy_helper.from_array(computed(1 / 255), "scale")]
    tensors += [tensor(n, *s, kind=computed) for n, s in (("k", (6, 3, 3, 3)), ("b", (6,)), ("w", (6, 4)))]
    x = helper.make_tensor_value_info("x", kind, ("n", 8, 8, 3) if colours_last else ("n", 3, 8, 8))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", 4))
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    raw: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return raw


@pytest.mark.parametrize(
    ("kind", "computed"),
    [
        (np.uint8, np.float16),
        *((kind, np.float32) for kind in (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.bool_)),
    ],
)
def test_pictures_of_whole_numbers_are_taken_as_they_are(kind: Any, computed: Any) -> None:
    raw = pictures(int(helper.np_dtype_to_tensor_dtype(np.dtype(kind))), colours_last=True, computed=computed)
    model = import_onnx(raw, "net")
    assert model.graph.inputs[0].dtype == kind
    assert len(model.architecture.groups) == 1
    x = RANDOM.integers(0, 2 if kind is np.bool_ else 100, (3, 8, 8, 3)).astype(kind)
    expected = OnnxSession(raw).run({"x": x})["y"]
    assert distance(outputs(model.graph, x), expected) < (1e-5 if computed is np.float32 else 0.01)
    OnnxSession(training_graph(model, Features()).to_bytes(), training=True)


@pytest.mark.parametrize("kind", [TensorProto.INT32, TensorProto.INT16, TensorProto.UINT8])
def test_token_ids_of_any_width_are_taken(kind: int) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["ids"], to=TensorProto.INT32),
        helper.make_node("Gather", ["table", "ids"], ["words"]),
        helper.make_node("ReduceMean", ["words"], ["text"], axes=[1], keepdims=0),
        helper.make_node("Gemm", ["text", "w"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Gemm", ["active", "v"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", kind, ("n", 6))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", 4))
    graph = helper.make_graph(nodes, "g", [x], [y], [tensor("table", 30, 8), tensor("w", 8, 5), tensor("v", 5, 4)])
    raw = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    model = import_onnx(raw, "net")
    ids = RANDOM.integers(0, 30, (3, 6)).astype(model.graph.inputs[0].dtype)
    assert distance(outputs(model.graph, ids), OnnxSession(raw).run({"x": ids})["y"]) < 1e-5
    # Its gradient scatters into the table, for which onnxruntime takes indices of 64 bits alone.
    OnnxSession(training_graph(model, Features()).to_bytes(), training=True)
