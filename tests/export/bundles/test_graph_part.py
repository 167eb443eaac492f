"""Parts of graphs with branches and loops, which read names from outside."""

import numpy as np
import onnx
from onnx import TensorProto, helper

from fedprune.runtime.onnx_subgraph import subgraph_for
from fedprune.runtime.session import OnnxSession


def value(name: str, shape: list[int], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def branching() -> bytes:
    """`a` is doubled or, where `c` says so, handed through from outside; `b` has nothing to do with it."""
    then = helper.make_graph([helper.make_node("Add", ["a2", "two"], ["t"])], "then", [], [value("t", [3])])
    handed = helper.make_graph([helper.make_node("Identity", ["a3"], ["e"])], "else", [], [value("e", [3])])
    inner = helper.make_node("If", ["c"], ["i"], then_branch=then, else_branch=handed)
    outer = helper.make_graph([inner], "outer", [], [value("i", [3])])
    else_graph = helper.make_graph([helper.make_node("Neg", ["a4"], ["o"])], "other", [], [value("o", [3])])
    nodes = [
        helper.make_node("Add", ["a", "one"], ["a2"]),
        helper.make_node("Mul", ["a", "two"], ["a3"]),
        helper.make_node("Sub", ["a", "two"], ["a4"]),
        helper.make_node("Mul", ["b", "unused"], ["b2"]),
        helper.make_node("If", ["d"], ["y"], then_branch=outer, else_branch=else_graph),
        helper.make_node("Neg", ["b2"], ["z"]),
    ]
    constants = [helper.make_tensor(n, TensorProto.FLOAT, [], [v]) for n, v in (("one", 1), ("two", 2), ("unused", 3))]
    inputs = [value("a", [3]), value("b", [3]), value("c", [], TensorProto.BOOL), value("d", [], TensorProto.BOOL)]
    graph = helper.make_graph(nodes, "g", inputs, [value("y", [3]), value("z", [3])], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    raw: bytes = model.SerializeToString(deterministic=True)
    return raw


def test_what_branches_read_from_outside_is_kept() -> None:
    raw = branching()
    full_session, subgraph_session = OnnxSession(raw), OnnxSession(subgraph_for(raw, ["y"]))
    assert set(subgraph_session.inputs) == {"a", "c", "d"}
    for c in (True, False):
        for d in (True, False):
            feeds = {"a": np.float32([1, 2, 3]), "b": np.zeros(3, np.float32), "c": np.array(c), "d": np.array(d)}
            got = subgraph_session.run({n: feeds[n] for n in subgraph_session.inputs}, ["y"])["y"]
            np.testing.assert_array_equal(got, full_session.run(feeds, ["y"])["y"])


def test_what_is_absent_makes_nothing_that_is_needed() -> None:
    """An optional input that is absent has the same name as an optional output that is: none."""
    make, value = helper.make_node, helper.make_tensor_value_info
    operators = [
        make("LSTM", ["other", "w", "r"], ["", "", "last"], hidden_size=2),
        make("Clip", ["x", "", "top"], ["loss"]),
    ]
    shapes = {"x": [2], "top": [], "other": [1, 1, 2], "w": [1, 8, 2], "r": [1, 8, 2], "loss": [2], "last": [1, 1, 2]}
    values = {n: value(n, TensorProto.FLOAT, s) for n, s in shapes.items()}
    ins, outs = (list(map(values.pop, names)) for names in (("x", "top", "other", "w", "r"), ("loss", "last")))
    opsets = [helper.make_opsetid("", 17)]
    full_model = helper.make_model(helper.make_graph(operators, "g", ins, outs), opset_imports=opsets)
    subgraph = onnx.load_from_string(subgraph_for(full_model.SerializeToString(), ["loss"])).graph
    assert [n.op_type for n in subgraph.node] == ["Clip"]
    assert [n.name for n in subgraph.input] == ["x", "top"]
