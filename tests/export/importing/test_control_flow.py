"""Branches and loops whose condition and length don't depend on the data are written out, with the same numbers."""

import importlib

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fedprune.core.errors import ModelError
from fedprune.model.features import Features
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import import_onnx, inlining
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.nets.onnx_text import text_file
from support.oracles.cutting import cut_error, distance, outputs, random_selection

STEPS, WIDTH = 5, 6

START = "zero = Constant<value_int=0>() start = Gather<axis=1>(x, zero)"


def model_bytes(body: str, opset: int = 17) -> bytes:
    """A model of `x` [N, 5, 6] whose body makes `h` [N, 6] with weights `w` and `u` [6, 6]."""
    rng = np.random.default_rng(0)
    shapes = {"w": (WIDTH, WIDTH), "u": (WIDTH, WIDTH), "v": (WIDTH, 3)}
    tensors = {name: (rng.standard_normal(shape) / 2).astype(np.float32) for name, shape in shapes.items()}
    x = f"float[N,{STEPS},{WIDTH}] x"
    return text_file(f"{body} y = MatMul(h, v)", tensors, x, "float[N,3] y", opset=opset)


def same(raw: bytes) -> Model:
    """The import, whose numbers are those of the file. It trains, and where it can be cut, the cut is right."""
    model = import_onnx(raw, "net")
    for batch in (1, 7):
        x = np.random.default_rng(batch).standard_normal((batch, STEPS, WIDTH)).astype(np.float32)
        assert distance(outputs(model.graph, x), OnnxSession(raw).run({"x": x})["y"]) < 1e-5
    assert not {n.op for n in model.graph.nodes} & {"If", "Loop"}
    training_graph(model, Features())
    assert cut_error(model, random_selection(model, 0.5, 1)) < 1e-5
    return model


def count(model: Model, op: str) -> int:
    return sum(n.op == op for n in model.graph.nodes)


TURN = """<body = turn (int64 i, bool on, float[N,6] s) => (bool go, float[N,6] t, float[N,6] row) {
    go = Identity(on) m = MatMul(s, w) t = Tanh(m) row = MatMul(t, u) }>"""


@pytest.mark.parametrize("opset", [11, 13, 21])
@pytest.mark.parametrize("of_shape", [False, True])
def test_a_loop_of_known_length_is_its_turns(opset: int, of_shape: bool) -> None:
    trips = "sizes = Shape(x) one = Constant<value = int64 {1}>() trips = Gather(sizes, one)"
    trips = trips if of_shape else "trips = Constant<value = int64 {4}>()"
    total = "ReduceSum<axes=[0], keepdims=0>(rows)" if opset < 13 else "ReduceSum<keepdims=0>(rows, first)"
    start = START.replace("<value_int=0>", "<value = int64 {0}>")
    for on in ('""', "on"):
        body = f"""{start} {trips} yes = Constant<value = int64 {{1}}>() on = Cast<to=9>(yes)
            first = Constant<value = int64[1] {{0}}>()
            last, rows = Loop(trips, {on}, start){TURN} total = {total} h = Add(last, total)"""
        model = same(model_bytes(body, opset))
        assert count(model, "Tanh") == (STEPS if of_shape else 4)
        assert sorted(t.name for t in model.architecture.tensors) == ["u", "v", "w"]


# TensorFlow's loops have a counter among their states, and compare it in floats.
COUNTED_TURN = """<body = turn (int64 i, bool on, int32 k, float[N,6] s) => (bool go, int32 next, float[N,6] t) {
    one = Constant<value = int32 {1}>() next = Add(k, one) count = Cast<to=1>(next) short = Less(count, limit)
    turn = Cast<to=1>(i) early = Less(turn, limit) go = And(short, early)
    m = MatMul(s, w) b = Add(m, bias) t = Tanh(b) }>"""


@pytest.mark.parametrize(("trips", "limit", "turns"), [("ten", 4, 4), ("two", 4, 2), ('""', 3, 3), ("ten", 0, 0)])
def test_a_loop_with_a_condition_on_its_counter_ends_by_it(trips: str, limit: int, turns: int) -> None:
    body = f"""{START} limit = Constant<value = float {{{limit}}}>() nil = Constant<value = float {{0}}>()
        starts = Less(nil, limit) first = Constant<value = int32 {{0}}>()
        ten = Constant<value_int=10>() two = Constant<value_int=2>()
        end, h = Loop({trips}, starts, first, start){COUNTED_TURN}"""
    proto = onnx.load_model_from_string(model_bytes(body))
    # Equal numbers, as fresh biases have: each iteration reads the same tensor, not one of its own.
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(WIDTH, np.float32), "bias"))
    model = same(proto.SerializeToString())
    assert count(model, "Tanh") == turns
    assert [t.name for t in model.architecture.tensors] == (["w", "bias", "v"] if turns else ["v"])


BACKWARD = """
    steps = Transpose<perm=[1, 0, 2]>(x) sizes = Shape(steps) zero = Constant<value = int64[1] {0}>()
    one = Constant<value = int64[1] {1}>() length = Gather(sizes, zero) batch = Gather(sizes, one)
    lengths = Expand(length, batch) turned = ReverseSequence<time_axis=0, batch_axis=1>(steps, lengths)"""


def test_a_reversal_of_all_steps_is_a_slice() -> None:
    rest = "m = MatMul(turned, w) t = Tanh(m) first = Constant<value_int=0>() h = Gather(t, first)"
    assert count(same(model_bytes(f"{BACKWARD} {rest}")), "Slice") == 1
    part = import_onnx(model_bytes(f"{BACKWARD.replace('Expand(length', 'Expand(one')} {rest}"), "net")
    with pytest.raises(ModelError, match="ReverseSequence"):
        training_graph(part, Features())


def test_a_backward_layer_of_a_file_for_one_sample_is_read_for_any() -> None:
    """As TensorFlow's exporter writes it: the state begins with stored zeros, and its product loses the batch of 1."""
    proto = onnx.load_model_from_string(
        model_bytes(
            BACKWARD
            + """ trips = Constant<value_int=5>()
        last, rows = Loop(trips, "", start)<body = turn (int64 i, bool on, float[1,6] s) =>
            (bool on, float[1,6] t, float[1,6] row)
            { part = Gather(turned, i) m = MatMul(s, w) b = Squeeze(m) g = Gemm(part, u, b) t = Tanh(g)
              row = Identity(t) }>
        minus = Constant<value = int64[1] {-1}>() end = Constant<value = int64[1] {9}>()
        final = Slice(rows, minus, end, zero) h = Squeeze(final, zero)"""
        )
    )
    for port in (proto.graph.input[0], proto.graph.output[0]):
        port.type.tensor_type.shape.dim[0].dim_value = 1
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((1, WIDTH), np.float32), "start"))
    raw = proto.SerializeToString()
    model = import_onnx(raw, "net")
    x = np.random.default_rng(0).standard_normal((3, STEPS, WIDTH)).astype(np.float32)
    session = OnnxSession(raw)
    expected = np.concatenate([session.run({"x": x[i : i + 1]})["y"] for i in range(3)])
    assert distance(outputs(model.graph, x), expected) < 1e-5
    # The zeros are a state, not a weight.
    assert sorted(t.name for t in model.architecture.tensors) == ["u", "v", "w"]


def test_a_state_may_be_a_row_too() -> None:
    """As torch's exporter writes a list to which the state is appended."""
    turn = TURN.replace("float[N,6] row)", "float[N,6] t)").replace("row = MatMul(t, u)", "")
    body = f"""{START} trips = Constant<value_int=3>() last, rows = Loop(trips, "", start){turn}
        total = ReduceMax<axes=[0], keepdims=0>(rows) h = Add(last, total)"""
    assert count(same(model_bytes(body)), "Tanh") == 3


def test_a_loop_of_no_turns_passes_its_states() -> None:
    turn = TURN.replace(", float[N,6] row)", ")").replace("row = MatMul(t, u)", "")
    body = f'{START} none = Constant<value_int=0>() last = Loop(none, "", start){turn} r = Relu(last) h = MatMul(r, u)'
    assert count(same(model_bytes(body)), "Tanh") == 0


def test_control_flow_within_a_loop_may_depend_on_its_turn() -> None:
    turn = TURN.replace(
        "m = MatMul(s, w)",
        """
        two = Constant<value_int=2>() early = Less(i, two)
        m = If(early)<then_branch = a () => (float[N,6] p) { p = MatMul(s, w) },
                      else_branch = b () => (float[N,6] q) { r = Relu(s) q = MatMul(r, u) }>""",
    )
    body = f'{START} trips = Constant<value_int=5>() h, rows = Loop(trips, "", start){turn}'
    assert count(same(model_bytes(body)), "Relu") == 3


def test_a_branch_by_a_size_is_taken() -> None:
    body = f"""{START} sizes = Shape(x) one = Constant<value_int=1>() many = Gather(sizes, one) is = Equal(many, one)
        m = MatMul(start, w)
        h = If(is)<then_branch = a () => (float[N,6] p) {{ p = Relu(m) }},
                   else_branch = b () => (float[N,6] q) {{ q = Tanh(m) }}>"""
    model = same(model_bytes(body))
    assert (count(model, "Tanh"), count(model, "Relu")) == (1, 0)


BY_BATCH = "sizes = Shape(x) trips = Gather(sizes, zero)"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (f'{START} {BY_BATCH} h, rows = Loop(trips, "", start){TURN}', r"sub-graph \(Loop\)"),
        (
            f'{START} trips = Constant<value_int=20000>() h, rows = Loop(trips, "", start){TURN}',
            "Loop .*unrolled: expected at most 40000 operators",
        ),
        (
            f"""{START} trips = Constant<value_int=4>() h, rows = Loop(trips, "", start)
            {TURN.replace("go = Identity(on)", "big = ReduceMax<keepdims=0>(s) go = Less(big, big)")}""",
            r"sub-graph \(Loop\)",
        ),
        (
            f"""{START} h, rows = Scan<num_scan_inputs=1, scan_input_axes=[1], body = turn
            (float[N,6] s, float[N,6] r) => (float[N,6] t, float[N,6] o) {{ t = Add(s, r) o = Tanh(t) }}>(start, x)""",
            r"sub-graph \(Scan\)",
        ),
    ],
)
def test_loops_that_depend_on_the_data_or_are_too_long_are_named(body: str, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        import_onnx(model_bytes(body), "net")


def test_a_branch_that_is_taken_wrongly_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = model_bytes(f"""{START} yes = Constant<value_int=1>() is = Cast<to=9>(yes) m = MatMul(start, w)
        h = If(is)<then_branch = a () => (float[N,6] p) {{ p = Relu(m) }},
                   else_branch = b () => (float[N,6] q) {{ q = Tanh(m) }}>""")
    same(raw)

    def mistaken(model: onnx.ModelProto) -> onnx.ModelProto:
        out = inlining.inline_model(model)
        for node in out.graph.node:
            node.op_type = "Tanh" if node.op_type == "Relu" else node.op_type
        return out

    monkeypatch.setattr(importlib.import_module("fedprune_export.importing.model_building"), "inline_model", mistaken)
    with pytest.raises(ModelError, match="outputs differ"):
        import_onnx(raw, "net")


def test_names_that_are_constructed_clash_with_none_of_the_file() -> None:
    """Values and tensors of a branch and of a loop's body, where the file has what they would be called."""
    steps = "one = Constant<value_int=1>() is = Cast<to=9>(one) trips = Constant<value_int=2>()"
    choice = """c = If(is)<then_branch = a () => (float[N,6] p) { ka = Relu(m) p = Tanh(ka) },
                           else_branch = b () => (float[N,6] q) { kb = Relu(m) q = Tanh(kb) }>"""
    turn = """<body = turn (int64 i, bool on, float[N,6] s) => (bool go, float[N,6] out1) {
        go = Identity(on) out0 = Sin(s) out1 = Cos(out0) }>"""
    names = ["c.ka", "c.ka_", "l.0.out0", "l.0.out1", "l.1.out0", "l.0.turn", "l.0.on"]
    additions = " ".join(f'"{name}" = Add(m, m)' for name in names)
    sums = "h = Sum(c, l, " + ", ".join(f'"{name}"' for name in names) + ")"
    plain = {name: f"v{i}" for i, name in enumerate(names)}
    for old, new in plain.items():
        additions, sums = additions.replace(f'"{old}"', new), sums.replace(f'"{old}"', new)
    body = f'{START} {steps} m = MatMul(start, w) {additions} {choice} l = Loop(trips, "", m){turn} {sums}'
    proto = onnx.load_model_from_string(model_bytes(body))
    for node in proto.graph.node:
        for values in (node.input, node.output):
            values[:] = [next((old for old, new in plain.items() if new == value), value) for value in values]
    same(proto.SerializeToString())


def test_a_loop_without_operators_is_not_turned_for_ever() -> None:
    body = f"""{START} trips = Constant<value_int=1000000000000>() last = Loop(trips, "", start)<body = turn
        (int64 i, bool on, float[N,6] s) => (bool on, float[N,6] s) {{ }}> h = MatMul(last, w)"""
    with pytest.raises(ModelError, match="unrolled"):
        import_onnx(model_bytes(body), "net")
