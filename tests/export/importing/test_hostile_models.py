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
from fedprune_export.importing.inlining import MAX_NODES
from fedprune_export.importing.metadata import TIED_KEY, write_properties

Nodes = list[onnx.NodeProto]
Tensors = dict[str, np.ndarray[Any, Any]]
Shape = tuple[int | str, ...]

W = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


def model(
    tensors: Tensors, nodes: Nodes | None = None, shape: Shape = ("N", 6), classes: int = 4, listed: str | None = None
) -> bytes:
    """A model; by default one matrix product with the first of its tensors."""
    graph = helper.make_graph(
        nodes or [helper.make_node("Gemm", ["x", next(iter(tensors))], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", classes])],
        [numpy_helper.from_array(v, k) for k, v in tensors.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if listed is not None:
        proto.metadata_props.add(key=PARAMETERS_KEY, value=listed)
    raw: bytes = proto.SerializeToString()
    return raw


def _flat() -> Nodes:
    return [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w"], ["y"])]


def _with(value: float) -> np.ndarray[Any, Any]:
    out = W.copy()
    out[3, 2] = value
    return out


def _shift_nodes(constant: float) -> Nodes:
    filled = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.full(6, constant, np.float32)))
    return [filled, helper.make_node("Max", ["x", "c"], ["s"]), helper.make_node("Gemm", ["s", "w"], ["y"])]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model({"w": _with(np.nan)}), "tensor w: expected finite numbers, got NaN"),
        (lambda: model({"w": _with(np.inf)}), "tensor w: expected finite numbers, got an infinite"),
        (lambda: model({"w": W}, _shift_nodes(np.nan)), "expected finite numbers, got NaN"),
        (lambda: model({"w": W}, _shift_nodes(np.inf)), "output is not finite"),
        (lambda: model({"w": W}, shape=("N", -6)), "size of input x"),
        (lambda: model({"w": W}, _flat(), shape=("N", 10**6, 10**6)), "size of input x"),
        (lambda: model({"w": W[:, :0]}, classes=0), "the model's output"),
        (lambda: model({}, [helper.make_node("Relu", ["x"], ["y"])], classes=6), "no trainable tensor"),
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


HUGE = 2**40


def _growing(op: str) -> bytes:
    """A model that claims 2^40 numbers in a few bytes."""
    ints: Tensors = {"n": np.array([HUGE], np.int64)}
    zero = {"z": np.array(0, np.int64), "big": np.array(HUGE, np.int64), "i": np.array(1, np.int64)}
    scales = {"s": np.array([1, 2**20], np.float32)}
    make = {
        "ConstantOfShape": [helper.make_node("ConstantOfShape", ["n"], ["c"])],
        "Range": [helper.make_node("Range", ["z", "big", "i"], ["d"]), helper.make_node("Cast", ["d"], ["c"], to=1)],
        "Resize": [
            helper.make_node("Resize", ["x", "", "s"], ["a"]),
            helper.make_node("Resize", ["a", "", "s"], ["c"]),
        ],
        "product": [helper.make_node("Expand", ["x", "wide"], ["a"]), helper.make_node("MatMul", ["a", "b"], ["c"])],
    }[op]
    weights: Tensors = {"wide": np.array([2**20, 1, 1], np.int64), "b": np.zeros((6, 4096), np.float32)}
    total = [helper.make_node("ReduceMean", ["c"], ["m"], keepdims=0)]
    scaled = [helper.make_node("Mul", ["x", "m"], ["t"]), helper.make_node("Gemm", ["t", "w"], ["y"])]
    return model({"w": W, **ints, **zero, **scales, **weights}, [*make, *total, *scaled])


@pytest.mark.parametrize("op", ["ConstantOfShape", "Range", "Resize", "product"])
def test_a_claim_of_huge_values_is_refused_before_anything_is_made(op: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match="expected at most 268435456"):
        import_onnx(_growing(op), "net")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


def test_a_claim_of_endless_work_is_refused() -> None:
    """Matrices that fit, multiplied again and again."""
    wide: Tensors = {"w": W, "rows": np.array([8192, 1], np.int64), "one": np.array(1.0, np.float32)}
    grown = [
        helper.make_node("ReduceMean", ["x"], ["m"], keepdims=0),
        helper.make_node("ConstantOfShape", ["both"], ["ones"]),
        helper.make_node("Mul", ["ones", "m"], ["h0"]),
    ]
    wide["both"] = np.array([8192, 8192], np.int64)
    steps = [helper.make_node("MatMul", [f"h{i}", f"h{i}"], [f"h{i + 1}"]) for i in range(3)]
    last = [
        helper.make_node("ReduceMean", ["h3"], ["t"], keepdims=0),
        helper.make_node("Add", ["x", "t"], ["s"]),
        helper.make_node("Gemm", ["s", "w"], ["y"]),
    ]
    with pytest.raises(ModelError, match="at most 1099511627776"):
        import_onnx(model(wide, [*grown, *steps, *last]), "net")


def test_a_size_that_data_decide_is_refused() -> None:
    maximum = [helper.make_node("ReduceMax", ["x"], ["a"], keepdims=0), helper.make_node("Cast", ["a"], ["b"], to=7)]
    grown = [helper.make_node("Reshape", ["b", "one"], ["n"]), helper.make_node("ConstantOfShape", ["n"], ["c"])]
    total = [helper.make_node("ReduceSum", ["c"], ["m"], keepdims=0), helper.make_node("Add", ["x", "m"], ["t"])]
    raw = model(
        {"w": W, "one": np.array([1], np.int64)},
        [*maximum, *grown, *total, helper.make_node("Gemm", ["t", "w"], ["y"])],
    )
    with pytest.raises(ModelError, match="ConstantOfShape 'c'"):
        import_onnx(raw, "net")


def _edit_model(change: Callable[[onnx.ModelProto], object]) -> bytes:
    """A sound model of two layers, changed."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], name="first"), helper.make_node("Relu", ["h"], ["y"])]
    proto = onnx.load_model_from_string(model({"w": W}, nodes))
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
    with pytest.raises(ModelError, match="can't be printed") as caught:
        import_onnx(model({name: W}), "net")
    assert str(caught.value).isprintable()


def test_further_names_that_steer_a_terminal_are_refused() -> None:
    proto = onnx.load_model_from_string(model({"w": W}))
    write_properties(proto, {TIED_KEY: json.dumps({"w": ["a\x1b[31m"]})})
    with pytest.raises(ModelError, match="can't be printed"):
        import_onnx(proto.SerializeToString(), "net")


def _convolution(group: int) -> bytes:
    filters = np.ones((4, 6, 1), np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], group=group),
        helper.make_node("ReduceMean", ["c"], ["y"], axes=[2], keepdims=0),
    ]
    return model({"w": filters}, nodes, shape=("N", 6, 5))


def test_a_convolution_of_no_groups_is_refused_by_name() -> None:
    assert import_onnx(_convolution(1), "net").architecture.classes == 4
    for group in (0, -1):
        with pytest.raises(ModelError, match=rf"attribute group of 'Conv' '': expected 1 or more, got {group}"):
            import_onnx(_convolution(group), "net")


@pytest.mark.parametrize(("index", "sound"), [(0, True), (-6, True), (6, False), (-7, False)])
def test_a_constant_index_out_of_range_is_refused_by_name(index: int, sound: bool) -> None:
    nodes = [helper.make_node("Gather", ["x", "i"], ["p"], axis=1), helper.make_node("Gemm", ["p", "w"], ["y"])]
    raw = model({"w": W, "i": np.array([0, 1, 2, 3, 4, index])}, nodes)
    if sound:
        import_onnx(raw, "net")
    else:
        with pytest.raises(ModelError, match=rf"an index of 'Gather' 'p': expected from -6 to 5, got {index}"):
            import_onnx(raw, "net")


def test_too_many_operators_are_refused_at_once() -> None:
    steps = [helper.make_node("Neg", [f"h{i}"], [f"h{i + 1}"]) for i in range(MAX_NODES)]
    first = helper.make_node("Gemm", ["x", "w"], ["h0"])
    with pytest.raises(ModelError, match="number of operators"):
        import_onnx(model({"w": W}, [first, *steps]), "net")


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
