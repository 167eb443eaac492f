"""Files with a fixed batch, or with the batch on the second axis: what boards get computes what the file does."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import fedprune_export as fx
from fedprune.core.errors import ModelError
from fedprune.model.features import Features
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.oracles.cutting import distance, outputs

F32 = np.dtype(np.float32)
RANDOM = np.random.default_rng(0)

Build = Callable[[Graph], str]


def file_of(build: Build, shape: tuple[Any, ...], rank: int, **tensors: tuple[int, ...]) -> bytes:
    """A file of one input `image` and the nodes that `build` emits, with random tensors of these shapes."""
    graph = Graph(inputs=[Port("image", F32, shape)])
    graph.initializers |= {name: RANDOM.standard_normal(size).astype(np.float32) for name, size in tensors.items()}
    graph.outputs = [Port(build(graph), F32, (None,) * rank)]
    return graph.to_bytes()


def check_equal(model: Model, raw: bytes, size: int, *, axis: int = 0, output_axis: int | None = 0) -> None:
    """The model's outputs for 2 · `size` samples are those of the file, one batch after the other; and it trains."""
    x = np.random.default_rng(1).standard_normal((2 * size, *model.architecture.input_shape)).astype(np.float32)
    session = OnnxSession(raw)
    rows = []
    for part in np.split(x, 2):
        y = session.run({"image": np.moveaxis(part, 0, axis)})[session.outputs[0]]
        rows.append(y[None] if output_axis is None else np.moveaxis(y, output_axis, 0))
    assert distance(outputs(model.graph, x), np.concatenate(rows)) < 1e-5
    training_graph(model, Features(loss="mse"))


def mlp_end(graph: Graph, value: str) -> str:
    return graph.emit("Gemm", graph.emit("Relu", graph.emit("Gemm", value, "w")), "v")


def reshaped_pictures(size: int) -> Build:
    def build(g: Graph) -> str:
        return mlp_end(g, g.emit("Reshape", g.emit("Relu", g.emit("Conv", "image", "k")), g.ints(size, -1)))

    return build


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("declared", [True, False])
def test_a_reshape_to_the_batch(size: int, declared: bool) -> None:
    raw = file_of(reshaped_pictures(size), (size if declared else "N", 2, 4, 4), 2, k=(3, 2, 1, 1), w=(48, 6), v=(6, 2))
    model = import_onnx(raw, "net")
    check_equal(model, raw, size)
    assert f"The file's batch of {size} was made free." in model.notes
    free = file_of(reshaped_pictures(0), ("N", 2, 4, 4), 2, k=(3, 2, 1, 1), w=(48, 6), v=(6, 2))
    assert model.architecture.digest == import_onnx(free, "net").architecture.digest


def all_sizes(g: Graph) -> str:
    return g.emit("MatMul", g.emit("Reshape", g.emit("MatMul", "image", "w"), g.ints(2, 3, 2)), "v")


def row_at_end(g: Graph) -> str:
    return g.emit("Reshape", g.emit("Gemm", g.emit("Relu", g.emit("Gemm", "image", "w")), "v"), g.ints(1, -1))


@pytest.mark.parametrize(("build", "size", "rank", "v"), [(all_sizes, 2, 3, (2, 4)), (row_at_end, 1, 2, (6, 4))])
def test_sizes_inside_a_file_that_takes_any_batch(build: Build, size: int, rank: int, v: tuple[int, int]) -> None:
    raw = file_of(build, (None, 6), rank, w=(6, 6), v=v)
    check_equal(import_onnx(raw, "net"), raw, size)


def class_token(size: int) -> Build:
    def build(g: Graph) -> str:
        tokens = g.emit("MatMul", "image", "w")
        token = g.emit("Expand", "token", g.ints(size, 1, 6)) if size > 1 else "token"
        both = g.emit("Tanh", g.emit("Add", g.emit("Concat", token, tokens, attrs={"axis": 1}), "places"))
        return g.emit("Gemm", g.emit("ReduceMean", both, attrs={"axes": [1], "keepdims": 0}), "v")

    return build


def recurrent(size: int, *, learned: bool, first: bool) -> Build:
    def build(g: Graph) -> str:
        steps = g.emit("Transpose", "image", attrs={"perm": [1, 0, 2]}) if first else "image"
        start = "start" if learned else g.constant(np.zeros((1, size, 4)), np.float32)
        if learned and size > 1:
            start = g.emit("Expand", start, g.ints(1, size, 4))
        states = g.emit(
            "GRU", steps, "gates", "back", "", "", start, attrs={"hidden_size": 4, "linear_before_reset": 1}
        )
        return g.emit("Gemm", g.emit("Gather", g.emit("Squeeze", states, g.ints(1)), g.constant(-1, np.int64)), "v")

    return build


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_recurrent_layer_with_a_first_state(size: int, learned: bool, first: bool) -> None:
    shape = (size, 5, 3) if first else (5, size, 3)
    build = recurrent(size, learned=learned, first=first)
    raw = file_of(build, shape, 2, gates=(1, 12, 3), back=(1, 12, 4), start=(1, 1, 4), v=(4, 2))
    model = import_onnx(raw, "net")
    assert model.architecture.input_shape == (5, 3)
    check_equal(model, raw, size, axis=0 if first else 1)


def attention_second(size: int) -> Build:
    """One head per half of the features, as torch writes it for [steps, batch, features]."""

    def build(g: Graph) -> str:
        def heads(weight: str) -> str:
            rows = g.emit("Reshape", g.emit("MatMul", "image", weight), g.ints(5, size * 2, 3))
            return g.emit("Transpose", rows, attrs={"perm": [1, 0, 2]})

        keys = g.emit("Transpose", heads("k"), attrs={"perm": [0, 2, 1]})
        mixed = g.emit("MatMul", g.emit("Softmax", g.emit("MatMul", heads("q"), keys), attrs={"axis": -1}), heads("m"))
        rows = g.emit("Reshape", g.emit("Transpose", mixed, attrs={"perm": [1, 0, 2]}), g.ints(5 * size, 6))
        return g.emit("Reshape", g.emit("Gemm", rows, "v"), g.ints(5, size, 6))

    return build


@pytest.mark.parametrize("size", [1, 3])
def test_attention_with_the_batch_second(size: int) -> None:
    raw = file_of(attention_second(size), (5, size, 6), 3, **dict.fromkeys(("q", "k", "m", "v"), (6, 6)))
    model = import_onnx(raw, "net")
    assert model.architecture.input_shape == (5, 6)
    check_equal(model, raw, size, axis=1, output_axis=1)


@pytest.mark.parametrize("shape", [(5, "batch", 3), ("T", "batch", 3), (5, None, 3)])
def test_a_free_batch_on_the_second_axis(shape: tuple[Any, ...]) -> None:
    def build(g: Graph) -> str:
        states = g.emit("RNN", "image", "gates", "back", attrs={"hidden_size": 4})
        return g.emit("MatMul", g.emit("Squeeze", states, g.ints(1)), "v")

    raw = file_of(build, shape, 3, gates=(1, 4, 3), back=(1, 4, 4), v=(4, 2))
    if shape[0] == "T":
        with pytest.raises(ModelError, match=r"axis 0 \('T'\).*--input-shape T,3"):
            import_onnx(raw, "net")
        return
    model = import_onnx(raw, "net")
    check_equal(model, raw, 3, axis=1, output_axis=1)
    assert sum("second axis" in note for note in model.notes) == 2


def squeezed(g: Graph) -> str:
    return g.emit("Add", g.emit("MatMul", g.emit("Squeeze", g.emit("GlobalAveragePool", "image")), "v"), "b")


@pytest.mark.parametrize("axis", [0, 1])
def test_a_squeeze_leaves_the_batch_on_another_axis_of_1(axis: int) -> None:
    raw = file_of(lambda g: g.emit("Squeeze", g.emit("MatMul", "image", "v"), g.ints(axis)), (1, 1, 4), 2, v=(4, 3))
    model = import_onnx(raw, "net")
    assert model.architecture.output_shape == (3,)
    check_equal(model, raw, 1, axis=1)


def test_a_squeeze_keeps_a_batch_of_1_unless_later_axes_are_counted_from_the_first() -> None:
    def shares(g: Graph) -> str:
        return g.emit("Mul", g.emit("Softmax", squeezed(g), attrs={"axis": 0}), "b")

    raw, other = (file_of(build, (1, 3, 4, 4), 1, v=(3, 2), b=(2,)) for build in (squeezed, shares))
    check_equal(import_onnx(raw, "net"), raw, 1, output_axis=None)
    with pytest.raises(ModelError, match=r"depend on each other.*dynamic batch"):
        import_onnx(other, "net")


def mean_of_samples(g: Graph) -> str:
    return g.emit("ReduceMean", "image", attrs={"axes": [0], "keepdims": 1})


def products_of_samples(g: Graph) -> str:
    return g.emit("MatMul", g.emit("MatMul", "image", g.emit("Transpose", "image", attrs={"perm": [1, 0]})), "image")


def writes(g: Graph) -> str:
    return g.emit(
        "ScatterND", "image", g.constant([[[0, 1]], [[1, 1]], [[2, 1]]], np.int64), g.constant(np.ones((3, 1)), F32)
    )


@pytest.mark.parametrize(
    ("batch", "build", "text"),
    [
        (3, lambda g: g.emit("Sub", "image", mean_of_samples(g)), "ReduceMean"),
        ("N", mean_of_samples, "ReduceMean"),
        (3, products_of_samples, "MatMul"),
        (3, lambda g: g.emit("Mul", "image", "places"), "depend on each other"),
        (3, writes, "depend on each other"),
    ],
)
def test_samples_that_depend_on_each_other_are_refused(batch: int | str, build: Build, text: str) -> None:
    with pytest.raises(ModelError, match=f"{text}.*dynamic batch"):
        import_onnx(file_of(lambda g: g.emit("MatMul", build(g), "v"), (batch, 4), 2, places=(3, 4), v=(4, 2)), "net")


def test_inputs_and_states_with_the_same_batch() -> None:
    graph = Graph(inputs=[Port("image", F32, (1, 5, 3)), Port("state", F32, (2, 1, 4))])
    graph.initializers |= {"w": RANDOM.standard_normal((3, 4)).astype(np.float32)}
    states = graph.emit("ReduceSum", "state", graph.ints(0), attrs={"keepdims": 0})
    means = graph.emit("ReduceMean", graph.emit("MatMul", "image", "w"), attrs={"axes": [1], "keepdims": 0})
    graph.outputs = [Port(graph.emit("Add", means, states), F32, (1, 4))]
    model = import_onnx(graph.to_bytes(), "net")
    x = RANDOM.standard_normal((3, 23)).astype(np.float32)
    image, state = x[:, :15].reshape(3, 1, 5, 3), x[:, 15:].reshape(3, 2, 1, 4)
    session = OnnxSession(graph.to_bytes())
    expected = [next(iter(session.run({"image": i, "state": s}).values())) for i, s in zip(image, state, strict=True)]
    assert distance(outputs(model.graph, x), np.concatenate(expected)) < 1e-5


def test_a_difference_of_inputs_is_proved_with_numbers_that_differ() -> None:
    graph = Graph(inputs=[Port(name, F32, (3, 4)) for name in ("left", "right")])
    places = graph.constant(RANDOM.standard_normal((3, 4)), F32)
    graph.outputs = [Port(graph.emit("Mul", graph.emit("Sub", "left", "right"), places), F32, (3, 4))]
    with pytest.raises(ModelError, match="depend on each other"):
        import_onnx(graph.to_bytes(), "net")


def masked(size: int, *, flat: bool) -> Build:
    """Positions of a mask [n, 4] as masks of attention read them: by [sample, position], or in a row of all samples."""

    def build(g: Graph) -> str:
        samples, places = np.meshgrid(np.arange(size), [2, 0], indexing="ij")
        if flat:
            read = g.emit("Gather", g.emit("Reshape", "image", g.ints(-1)), g.constant(samples * 4 + places, np.int64))
        else:
            read = g.emit("GatherND", "image", g.constant(np.stack([samples, places], -1), np.int64))
        return g.emit("MatMul", g.emit("Mul", read, "scale"), "v")

    return build


LAYERS: dict[str, tuple[Callable[[int], Build], tuple[int, ...], dict[str, tuple[int, ...]]]] = {
    "class token": (class_token, (4, 5), {"token": (1, 1, 6), "places": (1, 5, 6), "w": (5, 6), "v": (6, 2)}),
    "positions in a row": (partial(masked, flat=True), (4,), {"scale": (2,), "v": (2, 3)}),
    "positions": (partial(masked, flat=False), (4,), {"scale": (2,), "v": (2, 3)}),
}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_repeated_for_each_sample(layer: str, size: int) -> None:
    make, shape, tensors = LAYERS[layer]
    raw = file_of(make(size), (size, *shape), 2, **tensors)
    check_equal(import_onnx(raw, "net"), raw, size)


def test_a_row_that_is_stored_for_each_sample() -> None:
    rows = np.repeat(RANDOM.standard_normal((1, 4)), 3, 0)
    raw = file_of(lambda g: g.emit("Gemm", g.emit("Add", "image", g.constant(rows, F32)), "v"), (3, 4), 2, v=(4, 2))
    check_equal(import_onnx(raw, "net"), raw, 3)


@pytest.mark.parametrize("batch", ["N", 1, 3])
def test_positions_that_follow_from_the_batch(batch: int | str) -> None:
    """Token types and masks as torch writes them: zeros like the tokens, and [sample, position] by ranges."""

    def build(g: Graph) -> str:
        sizes = g.emit("Shape", "image")
        types = g.emit("Gather", "types", g.emit("Expand", g.constant(1, np.int64), sizes))
        count = g.emit("Gather", sizes, g.constant(0, np.int64))
        samples = g.emit("Range", g.constant(0, np.int64), count, g.constant(1, np.int64))
        starts = g.emit("Mul", g.emit("Unsqueeze", samples, g.ints(1)), g.ints(4))
        flat = g.emit("Reshape", g.emit("Flatten", "image", attrs={"axis": 0}), g.ints(-1))
        read = g.emit("Gather", flat, g.emit("Add", starts, g.constant([[2, 0, 1, 1]], np.int64)))
        tokens = g.emit("Add", g.emit("Unsqueeze", g.emit("Tanh", read), g.ints(2)), types)
        return g.emit("MatMul", g.emit("Tanh", tokens), "v")

    raw = file_of(build, (batch, 4), 3, types=(2, 5), v=(5, 3))
    model = import_onnx(raw, "net")
    assert {"types", "v"} <= set(model.tensors)
    check_equal(model, raw, batch if isinstance(batch, int) else 2)


@pytest.mark.parametrize("size", [1, 4])
def test_a_plan_is_that_of_a_free_batch(size: int) -> None:
    def plan_of(batch: int | str) -> Any:
        tensors = {"k": (8, 2, 3, 3), "w": (32, 6), "v": (6, 2)}

        def build(g: Graph) -> str:
            maps = g.emit("Relu", g.emit("Conv", "image", "k"))
            return mlp_end(g, g.emit("Reshape", maps, g.ints(batch, -1) if isinstance(batch, int) else g.ints(0, -1)))

        model = import_onnx(file_of(build, (batch, 2, 4, 4), 2, **tensors), "net")
        return fx.plan(model, "raspberry-pi-5", density=0.5)

    assert plan_of(size) == plan_of("N")
