"""Models that are made to do harm: each is one error of ours that says what is wrong."""

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from fedprune.core.errors import ModelError
from fedprune_export.importing import PARAMETERS_KEY, import_onnx, load, metadata
from fedprune_export.importing.inlining import MAX_NODES, inline_model
from fedprune_export.importing.metadata import TIED_KEY, write_properties
from support.nets.onnx_text import text_file

Tensors = dict[str, np.ndarray[Any, Any]]

W = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


def model(
    tensors: Tensors,
    body: str = "y = Gemm(x, w)",
    x: str = "float[N,6] x",
    y: str = "float[N,4] y",
    *,
    listed: str | None = None,
    constants: Tensors | None = None,
) -> bytes:
    """A model, and what it lists as its parameters."""
    proto = onnx.load_from_string(text_file(body, tensors, x, y, constants=constants))
    if listed is not None:
        proto.metadata_props.add(key=PARAMETERS_KEY, value=listed)
    raw: bytes = proto.SerializeToString()
    return raw


def _negative(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = -6


def _with(value: float) -> np.ndarray[Any, Any]:
    out = W.copy()
    out[3, 2] = value
    return out


def _shifted(constant: float) -> bytes:
    body = "s = Max(x, c) y = Gemm(s, w)"
    return model({"w": W}, body, constants={"c": np.full(6, constant, np.float32)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model({"w": _with(np.nan)}), "tensor w: expected finite numbers, got NaN"),
        (lambda: model({"w": _with(np.inf)}), "tensor w: expected finite numbers, got an infinite"),
        (lambda: _shifted(np.nan), "expected finite numbers, got NaN"),
        (lambda: _shifted(np.inf), "output is not finite"),
        (lambda: _edit_model(_negative), "size of input x"),
        (lambda: model({"w": W}, "f = Flatten(x) y = Gemm(f, w)", "float[N,1000000,1000000] x"), "size of input x"),
        (lambda: model({"w": W[:, :0]}, y="float[N,0] y"), "the model's output"),
        (lambda: model({}, "y = Relu(x)", y="float[N,6] y"), "no trainable tensor"),
        (lambda: model({"w": W}, listed='["zz"]'), "names a tensor that isn't there: got 'zz'"),
        (lambda: model({"w": W}, listed='"w"'), "expected a list of tensor names"),
        (lambda: model({"w": W}, listed="[" * 100_000), "expected a list of tensor names"),
        (lambda: model({"w": W}, listed=json.dumps(["w", "x" * 10**6])), "names a tensor that isn't there"),
    ],
)
def test_an_attack_is_one_error(make: Callable[[], bytes], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        import_onnx(make(), "net")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


READERS: dict[str, tuple[Callable[[dict[str, str]], object], list[str]]] = {
    metadata.UNUSED_KEY: (metadata.unused_parameters, ['{"a": "b"}', '["a", 5]', '["\\u001b[2J"]']),
    metadata.TRAINING_NOTES_KEY: (metadata.training_notes, ['{"a": "b"}', '["a", 5]', '["\\u001b[2J"]']),
    metadata.NAMES_KEY: (metadata.original_names, ['["a"]', '{"a": ["b"]}', '{"a": "\\r"}', '{"\\u001b[2J": "a"}']),
    TIED_KEY: (metadata.tied_names, ['["a"]', '{"a": "b"}', '{"a": [5]}', '{"a": ["\\r"]}', '{"\\r": ["a"]}']),
    metadata.ACTIVATION_RANGES_KEY: (metadata.activation_ranges, ['["a"]', '{"a": [1]}', '{"a": [2, 1]}']),
}


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, (_, texts) in READERS.items() for text in texts])
def test_metadata_that_is_something_else_is_one_error(key: str, text: str) -> None:
    for value in ("5", "{", text):
        with pytest.raises(ModelError) as caught:
            READERS[key][0]({key: value})
        assert str(caught.value).isprintable()


# Each claims 2^40 numbers in a few bytes.
HUGE = 2**40
GROWING = {
    "ConstantOfShape": "c = ConstantOfShape(n)",
    "Range": "d = Range(z, big, i) c = Cast<to = 1>(d)",
    "Resize": 'a = Resize(x, "", s) c = Resize(a, "", s)',
    "product": "a = Expand(x, wide) c = MatMul(a, b)",
}


@pytest.mark.parametrize("op", GROWING)
def test_a_claim_of_huge_values_is_refused_before_anything_is_made(op: str) -> None:
    tensors = {"w": W, "n": np.array([HUGE]), "z": np.array(0), "big": np.array(HUGE), "i": np.array(1)}
    tensors |= {"s": np.array([1, 2**20], np.float32), "wide": np.array([2**20, 1, 1])}
    tensors["b"] = np.zeros((6, 4096), np.float32)
    raw = model(tensors, f"{GROWING[op]} m = ReduceMean<keepdims = 0>(c) t = Mul(x, m) y = Gemm(t, w)")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match="expected at most 268435456"):
        import_onnx(raw, "net")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


def test_a_claim_of_endless_work_is_refused() -> None:
    """Matrices that fit, multiplied again and again."""
    body = """m = ReduceMean<keepdims = 0>(x) ones = ConstantOfShape(both) h0 = Mul(ones, m) h1 = MatMul(h0, h0)
        h2 = MatMul(h1, h1) h3 = MatMul(h2, h2) t = ReduceMean<keepdims = 0>(h3) s = Add(x, t) y = Gemm(s, w)"""
    with pytest.raises(ModelError, match="at most 1099511627776"):
        import_onnx(model({"w": W, "both": np.array([8192, 8192])}, body), "net")


def test_a_size_that_data_decide_is_refused() -> None:
    body = """a = ReduceMax<keepdims = 0>(x) b = Cast<to = 7>(a) n = Reshape(b, one) c = ConstantOfShape(n)
        m = ReduceSum<keepdims = 0>(c) t = Add(x, m) y = Gemm(t, w)"""
    raw = model({"w": W, "one": np.array([1])}, body)
    with pytest.raises(ModelError, match="ConstantOfShape 'c'"):
        import_onnx(raw, "net")


def _edit_model(change: Callable[[onnx.ModelProto], object]) -> bytes:
    """A sound model of two layers, changed."""
    proto = onnx.load_model_from_string(model({"w": W}, "[first] h = MatMul(x, w) y = Relu(h)"))
    change(proto)
    raw: bytes = proto.SerializeToString()
    return raw


def _cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "y"


def _nested(proto: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "g", [], [])
    for _ in range(25):
        node = helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner)
        inner = onnx.GraphProto()
        inner.node.append(node)
        inner.name = "g"
        del inner.node[0].attribute[1:]
    proto.graph.node.append(inner.node[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_cycle, "not valid ONNX"),
        (lambda p: p.graph.initializer.pop(), "not valid ONNX"),
        (lambda p: p.graph.initializer[0].dims.__setitem__(0, -6), "tensor 'w' can't be read|not valid"),
        (_nested, "not valid ONNX|sub-graph|branch"),
        (lambda p: p.opset_import[0].__setattr__("version", 2**40), "not valid ONNX|opset"),
    ],
)
def test_a_broken_structure_is_one_error(change: Callable[[onnx.ModelProto], object], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        import_onnx(_edit_model(change), "net")
    assert len(str(caught.value)) < 700


def test_a_name_that_is_not_text_is_refused() -> None:
    raw = _edit_model(lambda p: p.graph.node[0].__setattr__("name", "FIRST"))
    with pytest.raises(ModelError):
        import_onnx(raw.replace(b"FIRST", b"\xed\xa0\x80ab"), "net")  # half of a surrogate pair


@pytest.mark.parametrize("name", ["w\n", "w\x9b", "a\u2028b"])
def test_names_that_steer_a_terminal_are_refused(name: str) -> None:
    def rename(proto: onnx.ModelProto) -> None:
        proto.graph.initializer[0].name = proto.graph.node[0].input[1] = name

    with pytest.raises(ModelError, match="can't be printed") as caught:
        import_onnx(_edit_model(rename), "net")
    assert str(caught.value).isprintable()


def test_further_names_that_steer_a_terminal_are_refused() -> None:
    proto = onnx.load_model_from_string(model({"w": W}))
    write_properties(proto, {TIED_KEY: json.dumps({"w": ["a\x1b[31m"]})})
    with pytest.raises(ModelError, match="can't be printed"):
        import_onnx(proto.SerializeToString(), "net")


def _convolution(group: int) -> bytes:
    body = f"c = Conv<group = {group}>(x, w) y = ReduceMean<axes = [2], keepdims = 0>(c)"
    return model({"w": np.ones((4, 6, 1), np.float32)}, body, "float[N,6,5] x")


def test_a_convolution_of_no_groups_is_refused_by_name() -> None:
    assert import_onnx(_convolution(1), "net").architecture.classes == 4
    for group in (0, -1):
        with pytest.raises(ModelError, match=rf"attribute group of 'Conv' '': expected 1 or more, got {group}"):
            import_onnx(_convolution(group), "net")


@pytest.mark.parametrize(("index", "sound"), [(0, True), (-6, True), (6, False), (-7, False)])
def test_a_constant_index_out_of_range_is_refused_by_name(index: int, sound: bool) -> None:
    raw = model({"w": W, "i": np.array([0, 1, 2, 3, 4, index])}, "p = Gather<axis = 1>(x, i) y = Gemm(p, w)")
    if sound:
        import_onnx(raw, "net")
    else:
        with pytest.raises(ModelError, match=rf"an index of 'Gather' 'p': expected from -6 to 5, got {index}"):
            import_onnx(raw, "net")


def test_too_many_operators_are_refused_at_once() -> None:
    steps = " ".join(f"h{i + 1} = Neg(h{i})" for i in range(MAX_NODES))
    with pytest.raises(ModelError, match="number of operators"):
        import_onnx(model({"w": W}, f"h0 = Gemm(x, w) {steps}"), "net")


def test_functions_that_call_each_other_for_ever_are_refused() -> None:
    functions = [
        helper.make_function(
            "own",
            name,
            ["a"],
            ["b"],
            [helper.make_node(callee, ["a"], ["b"], domain="own")],
            [helper.make_opsetid("own", 1)],
        )
        for name, callee in (("F", "G"), ("G", "F"))
    ]

    def change(proto: onnx.ModelProto) -> None:
        proto.functions.extend(functions)
        proto.opset_import.append(helper.make_opsetid("own", 1))
        proto.graph.node[1].CopyFrom(helper.make_node("F", ["h"], ["y"], domain="own"))

    with pytest.raises(ModelError, match="local functions"):
        import_onnx(_edit_model(change), "net")


def test_functions_that_grow_beyond_measure_are_refused() -> None:
    """Ten functions, each of which calls the next ten times: ten thousand million operators."""

    def function(i: int) -> onnx.FunctionProto:
        op, domain = (f"F{i + 1}", "own") if i < 9 else ("Neg", "")
        steps = [helper.make_node(op, [f"v{j}"], [f"v{j + 1}"], domain=domain) for j in range(10)]
        imports = [helper.make_opsetid("own", 1), helper.make_opsetid("", 17)]
        return helper.make_function("own", f"F{i}", ["v0"], ["v10"], steps, imports)

    def change(proto: onnx.ModelProto) -> None:
        proto.functions.extend(function(i) for i in range(10))
        proto.opset_import.append(helper.make_opsetid("own", 1))
        proto.graph.node[1].CopyFrom(helper.make_node("F0", ["h"], ["y"], domain="own"))

    with pytest.raises(ModelError, match="number of operators"):
        import_onnx(_edit_model(change), "net")


def test_a_constant_of_a_long_loop_is_stored_once() -> None:
    big = np.ones((1000, 1000), np.float32)
    body = """l = Loop(trips, "", x)<body = turn (int64 i, bool on, float[N,6] s) => (bool on, float[N,6] t) {
        m = ReduceMean<keepdims = 0>(big) t = Mul(s, m) }> y = Gemm(l, w)"""
    proto = onnx.load_from_string(model({"w": W, "trips": np.array(300)}, body))
    constant = helper.make_node("Constant", [], ["big"], value=numpy_helper.from_array(big))
    proto.graph.node[0].attribute[0].g.node.insert(0, constant)
    raw = proto.SerializeToString()
    assert inline_model(onnx.load_model_from_string(raw)).ByteSize() < 2 * len(raw)


def _external(folder: Path, location: str) -> Path:
    proto = onnx.load_model_from_string(model({"w": W}))
    (tensor,) = proto.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(W.nbytes))):
        tensor.external_data.add(key=key, value=value)
    path = folder / "models" / "m.onnx"
    path.parent.mkdir()
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_data_beside_the_model_is_read(tmp_path: Path) -> None:
    path = _external(tmp_path, "w.bin")
    (path.parent / "w.bin").write_bytes(W.tobytes())
    np.testing.assert_array_equal(load(path).tensors["w"], W)


@pytest.mark.timeout(60)
def test_a_pipe_as_external_data_or_model_is_refused_without_waiting(tmp_path: Path) -> None:
    path = _external(tmp_path, "w.bin")
    os.mkfifo(path.parent / "w.bin")
    with pytest.raises(ModelError, match=r"external data.*regular file"):
        load(path)
    with pytest.raises(ModelError, match=r"regular file"):
        load(path.parent / "w.bin")
    with pytest.raises(ModelError, match=r"/dev/zero"):
        load(Path("/dev/zero"))


@pytest.mark.parametrize("place", ["above", "absolute", "symlink"])
def test_external_data_elsewhere_is_refused(tmp_path: Path, place: str) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(W.tobytes())
    path = _external(tmp_path, {"above": "../secret.bin", "absolute": str(secret), "symlink": "link.bin"}[place])
    if place == "symlink":
        (path.parent / "link.bin").symlink_to(secret)
    with pytest.raises(ModelError, match=r"m\.onnx: its external data"):
        load(path)


@pytest.mark.parametrize(("key", "value"), [("length", "1000000000000"), ("offset", "-4"), ("", "")])
def test_external_data_that_do_not_fit_are_refused(tmp_path: Path, key: str, value: str) -> None:
    path = _external(tmp_path, "w.bin")
    (path.parent / "w.bin").write_bytes(W.tobytes())
    proto = onnx.load_model_from_string(path.read_bytes())
    tensor = proto.graph.initializer[0]
    for entry in [e for e in tensor.external_data if e.key == key]:
        entry.value = value
    if not key:  # a size of which the file could only hold a part
        tensor.dims[0] = 2**40
        tensor.external_data.pop()
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"m\.onnx: its external data"):
        load(path)
