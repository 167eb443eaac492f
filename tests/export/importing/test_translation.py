"""Operators and forms of other opsets come in as those of opset 17, with the same numbers."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedprune.core.errors import ModelError
from fedprune.model.features import Features
from fedprune.model.recipe import Recipe
from fedprune.runtime.session import OnnxSession
from fedprune_export.checks.parity import step_feeds
from fedprune_export.importing import import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.nets.onnx_text import text_file
from support.oracles.cutting import distance, outputs

F32 = np.dtype(np.float32)
Build = Callable[[Graph], str]


def random(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def import_built(build: Build, shape: tuple[int, ...], size: int, opset: int) -> Model:
    """The import of an operator before a matrix that takes `size` numbers; its numbers are compared."""
    graph = Graph(inputs=[Port("image", F32, ("batch", *shape))], opset=opset)
    value = build(graph)
    graph.initializers["last"] = random(size, 3)
    graph.outputs = [Port(graph.emit("MatMul", graph.emit("Flatten", value), "last"), F32, ("batch", 3))]
    model = import_onnx(graph.to_bytes(), "net")
    x = np.random.default_rng(1).standard_normal((7, *shape)).astype(np.float32)
    before = OnnxSession(graph.to_bytes()).run({"image": x})[graph.outputs[0].name]
    assert distance(outputs(model.graph, x), before) < 1e-5
    return model


def ops(build: Build, shape: tuple[int, ...], size: int, opset: int) -> list[str]:
    return [n.op for n in import_built(build, shape, size, opset).graph.nodes][:-2]


def attention(*further: str, **attrs: Any) -> Build:
    def build(g: Graph) -> str:
        for name in "qkv":
            g.initializers[f"w{name}"] = random(8, 8) + ord(name) % 3
        q, k, v = (g.emit("MatMul", "image", f"w{name}") for name in "qkv")
        rng = np.random.default_rng(3)
        g.initializers["bias"] = rng.standard_normal((5, 5)).astype(np.float32)
        g.initializers["mask"] = (rng.random((5, 5)) < 0.5) | np.eye(5, dtype=np.bool_)
        return g.emit("Attention", q, k, v, *further, attrs={"q_num_heads": 2, "kv_num_heads": 2, **attrs})

    return build


@pytest.mark.parametrize(
    ("further", "attrs"),
    [((), {"scale": 0.3}), ((), {"is_causal": 1}), (("bias",), {}), (("mask",), {}), ((), {"softcap": 2.0})],
)
def test_attention_is_products_whose_heads_can_be_cut(further: tuple[str, ...], attrs: dict[str, Any]) -> None:
    model = import_built(attention(*further, **attrs), (5, 8), 40, 23)
    assert [group.size for group in model.groups] == [2]
    training_graph(model, Features())


def test_a_crop_is_its_definition() -> None:
    operators = ops(lambda g: g.emit("CenterCropPad", "image", g.ints(2, 7), attrs={"axes": [1, 2]}), (5, 4), 14, 18)
    assert set(operators) <= {"Pad", "Slice"}


def test_parts_of_a_concatenation_without_numbers_are_left_out() -> None:
    def build(g: Graph) -> str:
        empty = g.emit("Slice", "image", g.ints(0), g.ints(0), g.ints(1))
        return g.emit("Concat", empty, "image", empty, "image", attrs={"axis": 1})

    assert ops(build, (5,), 10, 17) == ["Concat"]


@pytest.mark.parametrize(
    ("op", "attrs", "size"),
    [
        *(("LRN", {"size": n, "alpha": 0.5, "beta": 0.6, "bias": 1.5}, 80) for n in (1, 3, 5)),
        *(("MeanVarianceNormalization", {"axes": axes}, 80) for axes in ([0, 2, 3], [1, -1])),
    ],
)
def test_seldom_norms_are_primitives(op: str, attrs: dict[str, Any], size: int) -> None:
    """Their numbers are the operator's, and a step on zeros moves a weight before them to a finite number."""

    def build(g: Graph) -> str:
        g.initializers["scale"] = random(4, 1, 1)
        return g.emit(op, g.emit("Mul", g.emit("Relu", "image"), "scale"), attrs=attrs)

    model = import_built(build, (4, 4, 5), size, 17)
    assert op not in {n.op for n in model.graph.nodes}
    step = OnnxSession(training_graph(model, Features()).to_bytes(), training=True)
    x, y = np.zeros((2, 4, 4, 5), np.float32), np.zeros(2, np.int64)
    following = step.run(step_feeds(step, Recipe(), model.tensors, x, y, 3))
    assert all(np.isfinite(value).all() for value in following.values())


@pytest.mark.parametrize("count", [2, 4])
def test_equal_parts_get_sizes(count: int) -> None:
    def build(g: Graph) -> str:
        pieces = g.emit_many("Split", "image", outputs=count, attrs={"num_outputs": count, "axis": 1})
        return g.emit("Concat", *pieces[::-1], attrs={"axis": 1})

    model = import_built(build, (7,), 7, 18)
    (node,) = [n for n in model.graph.nodes if n.op == "Split"]
    assert "num_outputs" not in node.attrs
    assert len(model.graph.initializers[node.inputs[1]]) == count


@pytest.mark.parametrize(("mode", "opset"), [("constant", 18), ("reflect", 18), ("edge", 18), ("wrap", 19)])
def test_pads_of_some_axes(mode: str, opset: int) -> None:
    def build(g: Graph) -> str:
        return g.emit("Pad", "image", g.ints(1, 0, 1, 2), "", g.ints(2, -1), attrs={"mode": mode})

    assert set(ops(build, (3, 5, 5), 147, opset)) == ({"Pad"} if mode != "wrap" else {"Slice", "Concat"})


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        (lambda g: ["", g.constant([2, 2], np.float32)], 300),
        (lambda g: ["", "", g.ints(10, 10)], 300),
        (lambda g: ["", "", g.ints(7, 9)], 189),
    ],
)
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resizing_some_axes_is_by_scales_of_all(inputs: Callable[[Graph], list[str]], size: int, mode: str) -> None:
    model = import_built(
        lambda g: g.emit("Resize", "image", *inputs(g), attrs={"axes": [2, 3], "mode": mode}), (3, 5, 5), size, 19
    )
    (node,) = [n for n in model.graph.nodes if n.op == "Resize"]
    if size == 189:  # no float32 gives 9 of 5
        assert model.graph.producers()[node.inputs[3]].op == "Concat"
    else:
        assert node.inputs[1] == ""
        assert list(model.graph.initializers[node.inputs[2]][:2]) == [1, 1]


@pytest.mark.parametrize("attrs", [{"antialias": 1}, {"coordinate_transformation_mode": "half_pixel_symmetric"}])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("amounts", [(3, 4), (1.5, 2.0)])
def test_resizing_in_new_ways_is_two_products(attrs: dict[str, Any], mode: str, amounts: tuple[float, float]) -> None:
    by_sizes = isinstance(amounts[0], int)
    size = 3 * math.prod(n if by_sizes else int(old * n) for n, old in zip(amounts, (5, 6), strict=True))
    chosen = {"axes": [2, 3], "mode": mode, **attrs}

    def build(g: Graph) -> str:
        further = ["", "", g.constant(amounts, np.int64)] if by_sizes else ["", g.constant(amounts, np.float32)]
        return g.emit("Resize", "image", *further, attrs=chosen)

    assert ops(build, (3, 5, 6), size, 19) == ["MatMul", "MatMul"]


@pytest.mark.parametrize("opset", [7, 9])
def test_resizing_before_opset_11_is_refused_where_its_positions_differ(opset: int) -> None:
    def build(g: Graph) -> str:
        if opset == 9:
            return g.emit("Upsample", "image", g.constant([1, 1, 2, 1.5], np.float32), attrs={"mode": "linear"})
        return g.emit("Upsample", "image", attrs={"mode": "linear", "scales": [1.0, 1.0, 2.0, 1.5]})

    with pytest.raises(ModelError, match="Export it again at opset 17"):
        import_built(build, (3, 8, 8), 576, opset)


def test_resizing_to_sizes_with_empty_scales_beside_them() -> None:
    def build(g: Graph) -> str:
        empty = g.constant(np.zeros(0), np.float32)
        sizes = g.emit(
            "Concat", g.emit("Slice", g.emit("Shape", "image"), g.ints(0), g.ints(2)), g.ints(6, 8), attrs={"axis": 0}
        )
        return g.emit("Resize", "image", empty, empty, sizes, attrs={"mode": "linear"})

    training_graph(import_built(build, (2, 3, 4), 96, 11), Features(loss="mse"))


def test_a_size_that_follows_from_a_comparison() -> None:
    """onnx infers no shape of GreaterOrEqual before opset 16; attention masks of transformers are made by it."""

    def build(g: Graph) -> str:
        mask = g.emit("Expand", g.emit("GreaterOrEqual", g.ints(0, 1, 2), g.ints(1)), g.emit("Shape", "image"))
        return g.emit("Where", mask, "image", g.scalar(0))

    training_graph(import_built(build, (3,), 3, 14), Features(loss="mse"))


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp"])
def test_reductions_over_axes_of_an_input(op: str) -> None:
    model = import_built(lambda g: g.emit(op, "image", g.ints(-1), attrs={"keepdims": 0}), (3, 5), 3, 20)
    assert model.graph.nodes[0].attrs["axes"] == [-1]


def _raw(body: str, tensors: dict[str, Any], sizes: str, opset: int) -> bytes:
    return text_file(body, tensors, f"float[N,{sizes}] x", "float[N,2] y", opset=opset)


def _same(raw: bytes, shape: tuple[int, ...]) -> Model:
    model, x = import_onnx(raw, "net"), random(7, *shape)
    assert distance(outputs(model.graph, x), OnnxSession(raw).run({"x": x})["y"]) < 1e-5
    return model


INTS = {"i0": np.int64(0), "i1": np.int64(1), "i4": np.int64(4), "last": np.int64(-1), "sizes": np.array([2, 4])}
SEQUENCES = {
    "chunks": (
        """s = SplitToSequence<axis = 1>(x, i4) a = SequenceAt(s, i1) b = SequenceAt(s, i0)
        c = Concat<axis = 1>(a, b)""",
        ["Split", "Concat"],
    ),
    "parts of sizes": (
        """s = SplitToSequence<axis = -1>(x, sizes) a = SequenceAt(s, last) b = SequenceAt(s, i0)
        c = Concat<axis = 1>(a, b)""",
        ["Split", "Concat"],
    ),
    "single rows and a stack": (
        "s = SplitToSequence<axis = 1, keepdims = 0>(x) c = ConcatFromSequence<axis = 1, new_axis = 1>(s)",
        ["Split", *["Squeeze"] * 6, *["Unsqueeze"] * 6, "Concat"],
    ),
    "built by hand": (
        """e = SequenceEmpty() f = SequenceInsert(e, x) g = SequenceInsert(f, x, i0) h = SequenceAt(g, last)
        i = SequenceConstruct(h) c = ConcatFromSequence<axis = 1>(i)""",
        [],
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("opset", [13, 18])
def test_sequences_are_tensors(name: str, opset: int) -> None:
    body, expected = SEQUENCES[name]
    model = _same(_raw(f"{body} y = Gemm(c, w)", {**INTS, "w": random(6, 2)}, "6", opset), (6,))
    assert [n.op for n in model.graph.nodes if n.op not in ("Gemm", "Flatten")] == expected


@pytest.mark.parametrize("yes", [False, True])
def test_branches_within_branches(yes: bool) -> None:
    """Names within a branch may be those of another; tensors of branches join the graph's."""

    def branch(name: str, op: str) -> str:
        return f"{name} = b () => (float[N,6] z) <float[6] k = {{1, -2, 3, -4, 5, -6}}> {{ t = Add(x, k) z = {op}(t) }}"

    inner = f"z = If(yes)<{branch('then_branch', 'Relu')}, {branch('else_branch', 'Tanh')}>"
    outer = f"then_branch = o () => (float[N,6] z) {{ {inner} }}"
    body = f"h = If(on)<{outer}, {branch('else_branch', 'Sigmoid')}> y = Gemm(h, w)"
    raw = _raw(body, {"yes": np.bool_(yes), "on": np.bool_(1), "w": random(6, 2)}, "6", 17)
    assert [n.op for n in _same(raw, (6,)).graph.nodes] == ["Add", "Relu" if yes else "Tanh", "Gemm"]


@pytest.mark.parametrize("opset", [9, 11, 12])
def test_opsets_before_13_are_raised(opset: int) -> None:
    clip = "Clip<min = -1.0, max = 1.0>(s)" if opset < 11 else "Clip(s, low, high)"
    ratio = "" if opset >= 12 else "<ratio = 0.3>"
    body = f"""r = ReduceSum<axes = [2], keepdims = 1>(x) s = Squeeze<axes = [2]>(r) c = {clip}
        p = Softmax<axis = 1>(c) d = Dropout{ratio}(p) y = MatMul(d, w)"""
    tensors = {"w": random(6, 2), **({} if opset < 11 else {"low": np.float32(-1), "high": np.float32(1)})}
    assert set(_same(_raw(body, tensors, "6, 3", opset), (6, 3)).tensors) == {"w"}


def test_a_softmax_of_an_early_opset_is_the_end_where_its_shape_is_computed() -> None:
    body = """s = Shape(x) n = Slice(s, begin, end) f = Concat<axis = 0>(n, last) v = Reshape(x, f) l = MatMul(v, w)
        y = Softmax<axis = 1>(l)"""
    tensors = {"begin": np.array([0]), "end": np.array([1]), "last": np.array([-1]), "w": random(18, 2)}
    nodes = import_onnx(_raw(body, tensors, "6, 3", 11), "net").graph.nodes
    assert [n.op for n in nodes] == ["Flatten", "MatMul"]


def test_what_a_vector_computes_alone_is_folded_unless_it_is_a_weight() -> None:
    tensors = {"a": np.float32(2), "b": np.float32(0.5), "w": random(6, 2)}
    model = _same(_raw("c = Add(a, b) v = Mul(w, c) y = Gemm(x, v)", tensors, "6", 17), (6,))
    assert [n.op for n in model.graph.nodes] == ["Mul", "Gemm"]
    assert list(model.tensors) == ["w"]
    assert math.isclose(sum(float(v) for n, v in model.graph.initializers.items() if v.size == 1), 2.5)


# -- spectra --------------------------------------------------------------------------------------------------------


def dft(opset: int, axis: int, *, length: int | None = None, **attrs: int) -> Build:
    def build(g: Graph) -> str:
        inputs = ["image", g.constant(length, np.int64) if length is not None else ""]
        if opset < 20:
            return g.emit("DFT", *inputs, attrs={"axis": axis, **attrs})
        return g.emit("DFT", *inputs, g.constant(axis, np.int64), attrs=attrs)

    return build


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize(
    ("shape", "axis", "length", "attrs"),
    [
        ((12, 1), 1, None, {"onesided": 1}),
        ((11, 2), 1, None, {"inverse": 1}),
        ((4, 9, 1), 2, 7, {"onesided": 1}),
        ((4, 9, 1), 2, 12, {}),
    ],
)
def test_a_transform_is_a_product(
    opset: int, shape: tuple[int, ...], axis: int, length: int | None, attrs: dict[str, int]
) -> None:
    count = shape[axis - 1] if length is None else length
    count = count // 2 + 1 if attrs.get("onesided") else count
    size = 2 * count * math.prod(shape[:-1]) // shape[axis - 1]
    operators = ops(dft(opset, axis, length=length, **attrs), shape, size, opset)
    assert "MatMul" in operators
    assert set(operators) <= {"MatMul", "Reshape", "Transpose"}


@pytest.mark.parametrize(("count", "length"), [(7, None), (7, 13), (7, 9), (2, None), (1, 1)])
def test_a_transform_back_from_one_side_is_a_product(count: int, length: int | None) -> None:
    back = dft(20, 1, length=length, inverse=1, onesided=1)

    def build(g: Graph) -> str:
        # The imaginary part of what is real is 0, or isn't there.
        return g.emit("Slice", back(g), g.ints(0), g.ints(1), g.ints(-1))

    assert "MatMul" in ops(build, (count, 2), 2 * (count - 1) if length is None else length, 20)


def test_a_transform_of_too_many_samples_is_refused_before_its_matrix_is_made() -> None:
    with pytest.raises(ModelError, match="a matrix of 5000 samples and 5 frequencies"):
        import_built(dft(20, 1, length=8, onesided=1), (5000, 1), 10, 20)


@pytest.mark.parametrize(
    ("image", "block", "attrs"),
    [
        ((6, 8), (2, 2), {"strides": [2, 2]}),
        ((7, 6), (3, 2), {"pads": [1, 0, 1, 1]}),
        ((9, 8), (2, 3), {"strides": [2, 1], "dilations": [2, 1], "pads": [0, 1, 1, 0]}),
        ((8, 7), (3, 3), {"strides": [3, 2]}),
    ],
)
def test_blocks_are_folded_by_a_convolution(
    image: tuple[int, ...], block: tuple[int, ...], attrs: dict[str, list[int]]
) -> None:
    strides, dilations, pads = (
        attrs.get(n, d) for n, d in (("strides", [1, 1]), ("dilations", [1, 1]), ("pads", [0] * 4))
    )
    counts = [
        (n + pads[i] + pads[2 + i] - dilations[i] * (b - 1) - 1) // strides[i] + 1
        for i, (n, b) in enumerate(zip(image, block, strict=True))
    ]
    operators = ops(
        lambda g: g.emit("Col2Im", "image", g.ints(*image), g.ints(*block), attrs=attrs),
        (3 * math.prod(block), math.prod(counts)),
        3 * math.prod(image),
        18,
    )
    assert operators.count("ConvTranspose") == 1


@pytest.mark.parametrize(("components", "onesided"), [(1, 0), (1, 1), (2, 0), (0, 1)])
@pytest.mark.parametrize("window", [True, False])
def test_a_transform_of_frames_is_a_convolution(components: int, onesided: int, window: bool) -> None:
    def build(g: Graph) -> str:
        hann = g.constant(np.hanning(16), np.float32) if window else ""
        length = "" if window else g.constant(16, np.int64)
        return g.emit("STFT", "image", g.constant(6, np.int64), hann, length, attrs={"onesided": onesided})

    operators = ops(
        build, (100, components) if components else (100,), (1 + (100 - 16) // 6) * 2 * (9 if onesided else 16), 17
    )  # onnxruntime and torch leave out one part
    assert operators.count("Conv") == 1
    assert set(operators) <= {"Conv", "Reshape", "Transpose", "Unsqueeze"}


@pytest.mark.parametrize(
    ("shape", "attrs", "size", "text"),
    [
        ((12, 2), {"axis": 0}, 24, "DFT .*transforms the batch"),
        ((9000, 1), {"axis": 1}, 18000, "9000 samples and 9000 frequencies: expected at most .* numbers"),
    ],
)
def test_transforms_that_are_no_constant_product_are_named(
    shape: tuple[int, ...], attrs: dict[str, int], size: int, text: str
) -> None:
    with pytest.raises(ModelError, match=text):
        import_built(lambda g: g.emit("DFT", "image", attrs=attrs), shape, size, 17)


# -- rotary embeddings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("attrs", [{"interleaved": 1}, {"rotary_embedding_dim": 4}])
def test_rotary_embeddings_are_products(flat: bool, table: bool, attrs: dict[str, int]) -> None:
    pairs = attrs.get("rotary_embedding_dim", 8) // 2

    def build(g: Graph) -> str:
        angles = np.random.default_rng(2).uniform(0, 6, (9, pairs))
        cosines, sines = (g.constant(f(angles), np.float32) for f in (np.cos, np.sin))
        batch = g.emit("Shape", "image", attrs={"start": 0, "end": 1})
        further = []
        if table:
            positions = g.emit(
                "Expand", g.constant([[0, 3, 4, 8, 1]], np.int64), g.emit("Concat", batch, g.ints(5), attrs={"axis": 0})
            )
            further = [positions]
        else:
            rows = g.emit("Concat", batch, g.ints(5, pairs), attrs={"axis": 0})
            cosines, sines = (
                g.emit("Expand", g.emit("Slice", t, g.ints(0), g.ints(5), g.ints(0)), rows) for t in (cosines, sines)
            )
        g.initializers["wq"] = random(6, 16)
        value = g.emit("MatMul", "image", "wq")
        if not flat:
            value = g.emit("Transpose", g.emit("Reshape", value, g.ints(0, 5, 2, 8)), attrs={"perm": [0, 2, 1, 3]})
        head_attrs = {"num_heads": 2} if flat else {}
        return g.emit("RotaryEmbedding", value, cosines, sines, *further, attrs={**attrs, **head_attrs})

    model = import_built(build, (5, 6), 80, 23)
    assert "RotaryEmbedding" not in {n.op for n in model.graph.nodes}
    assert [t.name for t in model.architecture.tensors] == ["wq", "last"]
