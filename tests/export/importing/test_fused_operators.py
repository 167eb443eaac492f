"""Fused operators become operators of the standard: with onnxruntime's numbers, trainable, and cut as before."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from fedprune.core.errors import ModelError
from fedprune.model.architecture import widths_at
from fedprune.model.features import Features
from fedprune.planning.costs import workload
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import ImportChoices, import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.nets.onnx_text import text_file
from support.oracles.cutting import cut_error, distance, outputs, random_selection

Array = npt.NDArray[Any]

POSITIONS, WIDTH, HEADS = 6, 8, 2

TABLES = {
    "w": (WIDTH, WIDTH),
    "qkv": (WIDTH, 3 * WIDTH),
    "b3": (3 * WIDTH,),
    "b": (WIDTH,),
    "c": (WIDTH,),
    "narrow": (WIDTH, 2 * WIDTH + 4),
    "scores": (1, HEADS, POSITIONS, POSITIONS),
    "words": (20, WIDTH),
    "places": (POSITIONS, WIDTH),
    "kernel": (WIDTH, 3, 3, 3),
    "point": (WIDTH, WIDTH, 1, 1),
    "dense": (WIDTH, WIDTH, 3, 3),
    "v": (WIDTH, 3),
}


def file_of(body: str, *, opset: int = 17, x: str = f"float[N,{POSITIONS},{WIDTH}]") -> bytes:
    """A model of `x` whose body makes `h`, with the tensors that it names; its channels end in three classes."""
    rng = np.random.default_rng(0)
    words = set(re.findall(r"\w+", body)) | {"v"}
    tensors = {n: (rng.standard_normal(s) / 2).astype(np.float32) for n, s in TABLES.items() if n in words}
    return text_file(f"{body} y = MatMul(h, v)", tensors, f"{x} x", "float[N,k,3] y", opset=opset)


def samples(model: Model, batch: int) -> Array:
    rng = np.random.default_rng(batch)
    shape = (batch, *model.architecture.input_shape)
    if model.graph.inputs[0].dtype == np.int64:
        return rng.integers(0, 20, shape)
    return rng.standard_normal(shape).astype(np.float32)


def check_import(raw: bytes) -> Model:
    """The import computes what onnxruntime computes by the file; it trains, and the cut is right."""
    model = import_onnx(raw, "net")
    for batch in (1, 7):
        x = samples(model, batch)
        before = OnnxSession(raw).run({"x": x})["y"]
        assert distance(outputs(model.graph, x), before) < 1e-5
    assert not any(n.domain for n in model.graph.nodes)
    training_graph(model, Features(loss="mse"))
    if model.graph.inputs[0].dtype == np.float32:
        assert cut_error(model, random_selection(model, 0.5, 1)) < 1e-5
    return model


PROJECTED = "q = MatMul(x, w)"
LENGTHS = "long = ReduceSum<keepdims=0>(marks, last) mask = Cast<to=6>(long)"
MARKS = (
    "last = Constant<value_ints=[-1]>() zero = Constant<value_float=0.0>() first = Constant<value_ints=[0]>() "
    "column = Gather<axis=2>(x, first) flat = Squeeze(column, last) on = Greater(flat, zero) marks = Cast<to=7>(on)"
)

BODIES = {
    "FusedMatMul": "h = ms.FusedMatMul<alpha = 0.5, transB = 1>(x, w)",
    "FusedMatMul of two values": """p = ms.FusedMatMul<transA = 1, alpha = 2.0>(x, x) m = MatMul(x, p)
        h = MatMul(m, w)""",
    "FusedMatMul by batches": """shape = Constant<value_ints=[0, 0, 2, 4]>() r = Reshape(x, shape)
        t = Transpose<perm=[0, 2, 1, 3]>(r) u = Transpose<perm=[2, 0, 1, 3]>(r) a = Relu(t)
        p = ms.FusedMatMul<transB = 1>(a, t) s = ms.FusedMatMul(p, t) o = Transpose<perm=[0, 2, 1, 3]>(s)
        back = Constant<value_ints=[0, 0, 8]>() m = Reshape(o, back) h = MatMul(m, w)""",
    "BiasGelu": f"{PROJECTED} a = ms.BiasGelu(q, b) h = MatMul(a, w)",
    "FastGelu": f"{PROJECTED} a = ms.FastGelu(q, b) h = MatMul(a, w)",
    "FastGelu without a bias": f"{PROJECTED} a = ms.FastGelu(q) h = MatMul(a, w)",
    "Gelu": f"{PROJECTED} a = ms.Gelu(q) h = MatMul(a, w)",
    "QuickGelu": f"{PROJECTED} h = ms.QuickGelu<alpha = 1.5>(q)",
    "QuickGelu as Swish": f"{PROJECTED} h = ms.QuickGelu<alpha = 1.0>(q)",
    "LayerNormalization": f"{PROJECTED} h = LayerNormalization<axis = -1>(q, b, c)",
    "SimplifiedLayerNormalization": f"{PROJECTED} h = SimplifiedLayerNormalization<epsilon = 0.01>(q, b)",
    "SkipLayerNormalization": f"{PROJECTED} h = ms.SkipLayerNormalization<epsilon = 0.01>(q, x, b, c)",
    "SkipLayerNormalization with its sum": f"""{PROJECTED}
        n, "", "", total = ms.SkipLayerNormalization<epsilon = 0.001>(q, x, b, c, b) h = Add(n, total)""",
    "SkipLayerNormalization without beta": f'{PROJECTED} h = ms.SkipLayerNormalization(q, x, b, "", c)',
    "SkipSimplifiedLayerNormalization": f"""{PROJECTED}
        n, "", "", total = ms.SkipSimplifiedLayerNormalization(q, x, b, c) h = Add(n, total)""",
    "Attention": f"{PROJECTED} h = ms.Attention<num_heads = {HEADS}>(q, qkv, b3)",
    "Attention with sizes": f"""{PROJECTED} narrow_b = Constant<value_floats=[{", ".join(["0.1"] * 20)}]>()
        a = ms.Attention<num_heads = {HEADS}, qkv_hidden_sizes = [8, 8, 4], scale = 0.3>(q, narrow, narrow_b)
        rows = Slice(w, s0, s4, s0) h = MatMul(a, rows)""",
    "Attention to earlier positions": f"""{PROJECTED}
        h = ms.Attention<num_heads = {HEADS}, unidirectional = 1>(q, qkv, b3, "", "", scores)""",
    "Attention by lengths": f"{MARKS} {LENGTHS} h = ms.Attention<num_heads = {HEADS}>(x, qkv, b3, mask)",
    "Attention by a mask": f"""{MARKS} mask = Cast<to=6>(on)
        h = ms.Attention<num_heads = {HEADS}, unidirectional = 1>(x, qkv, b3, mask)""",
    "Attention by a matrix": f"""{MARKS} rows = Unsqueeze(marks, last) one = Constant<value_ints=[1]>()
        columns = Unsqueeze(marks, one) pairs = Mul(rows, columns) mask = Cast<to=6>(pairs)
        h = ms.Attention<num_heads = {HEADS}, mask_filter_value = -50.0>(x, qkv, b3, mask)""",
    "MultiHeadAttention": f"""{PROJECTED} k = MatMul(x, w) r = Relu(x) u = MatMul(r, w)
        h = ms.MultiHeadAttention<num_heads = {HEADS}>(q, k, u, b3, "", scores)""",
    "MultiHeadAttention by a mask": f"""{PROJECTED} {MARKS} mask = Cast<to=6>(on)
        h = ms.MultiHeadAttention<num_heads = {HEADS}, scale = 0.2>(q, x, x, "", mask)""",
}


@pytest.mark.parametrize("name", BODIES)
def test_a_fused_operator_computes_what_onnxruntime_does(name: str) -> None:
    body = BODIES[name]
    if "s0" in body:
        body = "s0 = Constant<value_ints=[0]>() s4 = Constant<value_ints=[4]>() " + body
    model = check_import(file_of(body))
    assert any("taken apart" in note for note in model.notes) or name == "LayerNormalization"


LABELS = {"x": f"int64[N,{POSITIONS}]"}
IDS = "ids = Cast<to=6>(x)"
EMBEDDINGS = {
    "words and places": f"""{IDS} h, "" = ms.EmbedLayerNormalization(ids, "", words, places, "", b, c)""",
    "with segments, a mask and the sum": f"""{IDS} ten = Constant<value = int32 {{10}}>()
        over = Greater(ids, ten) kinds = Cast<to=6>(over) n, mask, total =
        ms.EmbedLayerNormalization<epsilon = 0.001>(ids, kinds, words, places, words, b, c, kinds)
        a = ms.Attention<num_heads = {HEADS}>(n, qkv, b3, mask) h = Add(a, total)""",
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_and_their_norm(name: str) -> None:
    model = check_import(file_of(EMBEDDINGS[name], x=LABELS["x"]))
    assert {"words", "places"} <= {t.name for t in model.architecture.tensors}


MAPS = f"float[N,3,{POSITIONS},{POSITIONS}]"
END = "rows = Constant<value_ints=[0, 8, -1]>() r = Reshape(m, rows) h = Transpose<perm=[0, 2, 1]>(r)"
CONVOLUTIONS = {
    "Relu": 'm = ms.FusedConv<activation = "Relu", pads = [1, 1, 1, 1]>(x, kernel, b)',
    "LeakyRelu": 'm = ms.FusedConv<activation = "LeakyRelu", activation_params = [0.3]>(x, kernel, b)',
    "Clip": 'm = ms.FusedConv<activation = "Clip", activation_params = [-0.5, 0.7]>(x, kernel, b)',
    "HardSigmoid": 'm = ms.FusedConv<activation = "HardSigmoid", activation_params = [0.1, 0.4]>(x, kernel, b)',
    "a sum": """a = ms.FusedConv<activation = "Relu", pads = [1, 1, 1, 1]>(x, kernel)
        m = ms.FusedConv<activation = "Relu", pads = [1, 1, 1, 1]>(a, dense, b, a)""",
    "FusedGemm": """g = GlobalAveragePool(x) f = Flatten(g) wide = Constant<value_ints=[0, 1]>() a = Conv(x, kernel)
        s = ReduceMax<axes = [2, 3], keepdims = 0>(a)
        d = ms.FusedGemm<activation = "LeakyRelu", activation_alpha = 0.2, transB = 1, alpha = 0.5>(s, w, b)
        back = Constant<value_ints=[0, 8, 1, 1]>() m = Reshape(d, back)""",
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_with_activations_and_sums(name: str) -> None:
    check_import(file_of(f"{CONVOLUTIONS[name]} {END}", x=MAPS))


REFUSED = {
    "past": (
        """a, p = ms.Attention<num_heads = 2>(x, qkv, b3) s = ReduceSum<keepdims = 0>(p) h = Add(a, s)""",
        "cache",
    ),
    "rotation": ("h = ms.Attention<num_heads = 2, do_rotary = 1>(x, qkv, b3)", "rotates"),
    "mask": (
        """mask = Constant<value = int32[7] {1, 2, 3, 4, 5, 6, 7}>()
        h = ms.Attention<num_heads = 2>(x, qkv, b3, mask)""",
        "mask has the shape",
    ),
    "activation": (
        """r = Transpose<perm = [0, 2, 1]>(x) i = Constant<value_ints = [-1]>() u = Unsqueeze(r, i)
        s = Constant<value_ints = [0, 0, -1]>()
        m = ms.FusedConv<activation = "Odd">(u, point, b) k = Reshape(m, s) h = Transpose<perm = [0, 2, 1]>(k)""",
        "activation is Odd",
    ),
    "heads apart": (
        """shape = Constant<value_ints=[0, 0, 2, 4]>() r = Reshape(x, shape) k = Transpose<perm=[0, 2, 1, 3]>(r)
        h = ms.MultiHeadAttention<num_heads = 2>(x, k, k)""",
        "axis for heads",
    ),
    "no kernel for CPUs": ("a = MatMul(x, w) h = ms.BiasDropout(a, b, x)", "one kind of processor"),
    "no rule": ("h = ms.BiasSoftmax<axis = 2, is_inner_broadcast = 1>(x, b)", "one kind of processor"),
    "statistics": ("n, mean = ms.SkipLayerNormalization(x, x, b, c) h = Add(n, mean)", "mean or deviation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_forms_that_are_not_taken_are_refused_with_the_node_and_a_way_out(name: str) -> None:
    body, text = REFUSED[name]
    raw = file_of(body)
    with pytest.raises(ModelError, match=text) as refusal:
        import_onnx(raw, "net")
    assert "can't be taken apart" in str(refusal.value)
    assert refusal.value.hint


EARLY = """q = MatMul(x, w) n = LayerNormalization<axis = -1>(q, b, c) r = SimplifiedLayerNormalization<axis = -1>(n, b)
    h = ms.SkipLayerNormalization(r, x, b, c)"""


@pytest.mark.parametrize("opset", [11, 13, 16, 18, 20, 23])
def test_files_of_every_opset_also_with_norms_that_it_lacks(opset: int) -> None:
    model = check_import(file_of(EARLY, opset=opset))
    norms = [n.op for n in model.graph.nodes if n.op.endswith("Normalization")]
    assert norms == ["LayerNormalization", "RMSNormalization", "LayerNormalization"]
    # A choice is written into the file, which is checked before.
    assert import_onnx(file_of(EARLY, opset=opset), "net", ImportChoices(prefer="fine")).architecture.tensors


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_is_made_free_behind_fused_operators(batch: int) -> None:
    body = f"""{MARKS} mask = Cast<to=6>(on) a = ms.Attention<num_heads = {HEADS}>(x, qkv, b3, mask)
        n = ms.SkipLayerNormalization(a, x, b, c) p = ms.FusedMatMul<transB = 1, alpha = 0.5>(n, n)
        m = MatMul(p, x) h = ms.BiasGelu(m, b)"""
    proto = onnx.load_from_string(file_of(body))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    raw = proto.SerializeToString()
    model = import_onnx(raw, "net")
    x = samples(model, 3 * batch)
    rows = [OnnxSession(raw).run({"x": part})["y"] for part in np.split(x, 3)]
    assert distance(outputs(model.graph, x), np.concatenate(rows)) < 1e-5
    notes = " ".join(model.notes)
    assert "made free" in notes
    assert "taken apart" in notes
    training_graph(model, Features(loss="mse"))


def transformer_block() -> Graph:
    """A transformer's layer behind its class scores, as exporters write it."""
    graph = Graph(inputs=[Port("x", np.dtype(np.float32), ("N", POSITIONS, WIDTH))])
    rng = np.random.default_rng(3)

    def tensor(name: str, *shape: int) -> str:
        graph.initializers[name] = (rng.standard_normal(shape) / 2).astype(np.float32)
        return name

    def linear(value: str, name: str, columns: int) -> str:
        product = graph.emit("MatMul", value, tensor(f"{name}.weight", WIDTH if name != "down" else 3 * WIDTH, columns))
        return graph.emit("Add", product, tensor(f"{name}.bias", columns))

    def heads(value: str, *order: int) -> str:
        rows = graph.emit("Reshape", value, graph.ints(0, 0, HEADS, WIDTH // HEADS))
        return graph.emit("Transpose", rows, attrs={"perm": order})

    def norm(value: str, name: str) -> str:
        vectors = [tensor(f"{name}.{kind}", WIDTH) for kind in ("scale", "bias")]
        return graph.emit("LayerNormalization", value, *vectors, attrs={"axis": -1, "epsilon": 1e-5})

    value = norm("x", "first")
    query, key = heads(linear(value, "query", WIDTH), 0, 2, 1, 3), heads(linear(value, "key", WIDTH), 0, 2, 3, 1)
    scores = graph.emit("Div", graph.emit("MatMul", query, key), graph.scalar(2))
    values = heads(linear(value, "value", WIDTH), 0, 2, 1, 3)
    mixed = graph.emit("MatMul", graph.emit("Softmax", scores, attrs={"axis": -1}), values)
    rows = graph.emit("Transpose", mixed, attrs={"perm": [0, 2, 1, 3]})
    merged = linear(graph.emit("Reshape", rows, graph.ints(0, 0, WIDTH)), "out", WIDTH)
    value = norm(graph.emit("Add", merged, value), "second")
    curve = graph.emit("Gelu", linear(value, "up", 3 * WIDTH), attrs={"approximate": "none"})
    value = norm(graph.emit("Add", linear(curve, "down", WIDTH), value), "third")
    pooled = graph.emit("ReduceMean", value, attrs={"axes": [1], "keepdims": 0})
    graph.emit("Identity", linear(pooled, "head", 3), out="y")
    graph.outputs = [Port("y", np.dtype(np.float32), ("N", 3))]
    return graph


def optimise(raw: bytes, how: str, folder: Path) -> bytes:
    """The file that onnxruntime writes when it loads one, or that its optimiser of transformers makes."""
    before, after = folder / "before.onnx", folder / "after.onnx"
    before.write_bytes(raw)
    if how == "transformers":
        optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
        optimised = optimizer.optimize_model(str(before), "bert", num_heads=HEADS, hidden_size=WIDTH, opt_level=0)
        optimised.save_model_to_file(str(after))
        return after.read_bytes()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{how}")
    options.optimized_model_filepath = str(after)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(before), options, providers=["CPUExecutionProvider"])
    return after.read_bytes()


# What must be among the operators, so that the test doesn't pass because nothing was fused.
OPTIMISED = [
    ("BASIC", 17, set[str]()),
    ("EXTENDED", 13, {"BiasGelu"}),
    ("EXTENDED", 20, {"BiasGelu", "SkipLayerNormalization", "FusedMatMul"}),
    ("ALL", 17, {"BiasGelu"}),
    ("transformers", 17, {"Attention", "SkipLayerNormalization", "BiasGelu"}),
    ("transformers", 20, {"Attention", "SkipLayerNormalization"}),
]


@pytest.mark.parametrize(("how", "opset", "fused"), OPTIMISED)
def test_an_optimised_transformer_is_cut_as_the_file_before(
    how: str, opset: int, fused: set[str], tmp_path: Path
) -> None:
    raw = transformer_block().to_bytes(opset=opset)
    optimised = optimise(raw, how, tmp_path)
    model, before = check_import(optimised), import_onnx(raw, "net")
    assert sorted(g.size for g in model.architecture.groups) == sorted(g.size for g in before.architecture.groups)
    for density in (0.25, 0.5, 1.0):
        macs = [
            workload(m.architecture).forward_macs([widths_at(m.architecture, density)]).tolist()
            for m in (model, before)
        ]
        assert macs[0] == macs[1]
    assert fused <= {n.op_type for n in onnx.load_from_string(optimised).graph.node}


SHAPED = {
    "norms and sums": """q = MatMul(x, w) n, "", "", t = ms.SkipLayerNormalization(q, x, b, c)
        r = SimplifiedLayerNormalization<axis = -1>(t, b) h = ms.BiasGelu(r, c)""",
    "products": "q = ms.FusedMatMul<transA = 1>(x, x) m = ms.FusedMatMul<transB = 1>(x, q) h = ms.QuickGelu(m)",
    "attention": f"a = ms.Attention<num_heads = {HEADS}>(x, qkv, b3) h = ms.FastGelu(a, b)",
    "layers": """s = Constant<value_ints = [0, 3, 4, 4]>() i = Reshape(x, s)
        m = ms.FusedConv<activation = "Relu", pads = [1, 1, 1, 1]>(i, kernel, b) r = Constant<value_ints = [0, 8, -1]>()
        f = Reshape(m, r) h = Transpose<perm = [0, 2, 1]>(f)""",
}


@pytest.mark.parametrize("name", SHAPED)
def test_a_decision_behind_fused_operators_is_left_to_predictions(name: str) -> None:
    """A file of an optimiser states no shapes within, and training ends where a shape is known."""
    proto = onnx.load_from_string(file_of(SHAPED[name]))
    proto.graph.node.append(onnx.helper.make_node("ArgMax", ["y"], ["best"], axis=1))
    del proto.graph.output[:]
    proto.graph.output.append(onnx.helper.make_tensor_value_info("best", onnx.TensorProto.INT64, ["N", 1, 3]))
    raw = proto.SerializeToString()
    for model in (import_onnx(raw, "net"), import_onnx(raw, "net", ImportChoices(output="y"))):
        x = samples(model, 5)  # of `y`, where the model ends, the file tells the largest
        assert (outputs(model.graph, x).argmax(1)[:, None] == OnnxSession(raw).run({"x": x})["best"]).all()


def test_fused_operators_in_branches_and_functions() -> None:
    raw = file_of("""yes = Constant<value_int=1>() on = Cast<to=9>(yes) q = MatMul(x, w)
        g = If(on)<then_branch = a () => (float[N,6,8] p) { p = ms.BiasGelu(q, b) },
                   else_branch = e () => (float[N,6,8] o) { o = Relu(q) }> h = MatMul(g, w)""")
    check_import(raw)
    proto = onnx.load_from_string(file_of("h = ms.BiasGelu(x, b)"))
    call = proto.graph.node[0]
    own = onnx.helper.make_function(
        "own",
        "act",
        ["p", "q"],
        ["r"],
        [onnx.helper.make_node("BiasGelu", ["p", "q"], ["r"], domain="com.microsoft")],
        list(proto.opset_import),
    )
    call.domain, call.op_type = "own", "act"
    proto.functions.append(own)
    proto.opset_import.append(onnx.helper.make_opsetid("own", 1))
    check_import(proto.SerializeToString())


def test_a_file_for_one_processor_is_refused_with_a_way_out(tmp_path: Path) -> None:
    graph = Graph(inputs=[Port("x", np.dtype(np.float32), ("N", 32, 5, 5))])
    graph.initializers["w"] = np.ones((32, 32, 3, 3), np.float32)
    graph.outputs = [Port(graph.emit("GlobalAveragePool", graph.emit("Conv", "x", "w")), np.dtype(np.float32), ())]
    raw = optimise(graph.to_bytes(), "ALL", tmp_path)
    if "com.microsoft.nchwc" not in {n.domain for n in onnx.load_from_string(raw).graph.node}:
        pytest.skip("onnxruntime has no blocks of channels for this processor")
    with pytest.raises(ModelError, match="for one kind of processor") as refusal:
        import_onnx(raw, "net")
    assert "ORT_ENABLE_BASIC" in str(refusal.value.hint)
