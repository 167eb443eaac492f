"""Writes the small graphs under `device/graphs/`: needs onnx, which the tests that read them don't.

A linear classifier of 6 features and 3 classes, with its step written out by hand: `plain`, `full` (all loss
terms and the proximal pull), `inference`.

The others come from the compiler, of that classifier (`adamw`, `bce`, `bias`, `huber`, `mixup`), of one with a hidden
normalised layer that can be narrowed (`narrow`, `still`, `kept`, `masked`, `threshold`, `scaled`; `hidden` and
`hidden_half` predict, the latter with `hidden_half_int8` and `hidden_half_float16`, too), and of one that reads token
ids (`tokens`).
"""

import numpy as np
import onnx
from onnx import TensorProto, helper

from fedprune.core import tensorfile
from fedprune.model import step_contract
from fedprune.model.architecture import Architecture, Axis, TensorKind, TensorSpec
from fedprune.model.features import Features
from fedprune_export.bundles.inference import inference_model
from fedprune_export.importing import import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.precision import lower
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.paths import GRAPHS

FEATURES, CLASSES, HIDDEN, VOCABULARY = 6, 3, 8, 11
FOLDER = GRAPHS


def training(full: bool = False) -> Graph:
    g = Graph()
    f32, i64 = np.dtype(np.float32), np.dtype(np.int64)
    shapes = {"w": (CLASSES, FEATURES), "b": (CLASSES,)}
    g.inputs = [Port(step_contract.X, f32, ("N", FEATURES)), Port(step_contract.Y, i64, ("N",))]
    g.inputs += [Port(n, f32, ()) for n in (step_contract.LR, step_contract.MOMENTUM, step_contract.WEIGHT_DECAY)]
    for name, shape in shapes.items():
        g.inputs += [Port(name, f32, shape), Port(step_contract.momentum_name(name), f32, shape)]
        if full:
            g.inputs += [
                Port(step_contract.anchor_name(name), f32, shape),
                Port(step_contract.strength_name(name), f32, ()),
            ]
    if full:
        g.inputs += [
            Port(n, f32, (CLASSES,))
            for n in (step_contract.LOGIT_OFFSET, step_contract.CLASS_MASK, step_contract.CLASS_WEIGHT)
        ]
    x = step_contract.X
    z = g.emit("Gemm", x, "w", "b", attrs={"transB": 1}, out=step_contract.LOGITS)
    if full:
        z = g.emit("Mul", g.emit("Add", z, step_contract.LOGIT_OFFSET), step_contract.CLASS_MASK)
    hot = g.emit("OneHot", step_contract.Y, g.constant(CLASSES, np.int64), g.constant([0, 1], np.float32))
    log_p = g.emit("LogSoftmax", z, attrs={"axis": 1})
    each = g.emit("Neg", g.emit("ReduceSum", g.emit("Mul", hot, log_p), g.ints(1), attrs={"keepdims": 1}))
    if full:
        weight = g.emit("ReduceSum", g.emit("Mul", hot, step_contract.CLASS_WEIGHT), g.ints(1), attrs={"keepdims": 1})
    else:
        weight = g.emit("Mul", each, g.scalar(0))
        weight = g.emit("Add", weight, g.scalar(1))
    share = g.emit("Div", weight, g.emit("ReduceSum", weight, attrs={"keepdims": 1}))
    g.emit("ReduceSum", g.emit("Mul", each, share), out=step_contract.LOSS, attrs={"keepdims": 0})
    best = g.emit("ArgMax", z, attrs={"axis": 1, "keepdims": 0})
    equal = g.emit("Cast", g.emit("Equal", best, step_contract.Y), attrs={"to": int(TensorProto.INT64)})
    g.emit("ReduceSum", equal, out=step_contract.HITS, attrs={"keepdims": 0})
    dz = g.emit("Mul", g.emit("Sub", g.emit("Exp", log_p), hot), share)
    if full:
        dz = g.emit("Mul", dz, step_contract.CLASS_MASK)
    gradients = {
        "w": g.emit("Gemm", dz, x, attrs={"transA": 1}),
        "b": g.emit("ReduceSum", dz, g.ints(0), attrs={"keepdims": 0}),
    }
    for name, gradient in gradients.items():
        if full:
            pull = g.emit(
                "Mul", g.emit("Sub", name, step_contract.anchor_name(name)), step_contract.strength_name(name)
            )
            gradient = g.emit("Add", gradient, pull)
        gradient = g.emit("Add", gradient, g.emit("Mul", name, step_contract.WEIGHT_DECAY))
        old = g.emit("Mul", step_contract.momentum_name(name), step_contract.MOMENTUM)
        new = g.emit("Add", old, gradient, out=step_contract.next_name(step_contract.momentum_name(name)))
        g.emit("Sub", name, g.emit("Mul", new, step_contract.LR), out=step_contract.next_name(name))
        g.outputs += [
            Port(step_contract.next_name(n), f32, shapes[name]) for n in (name, step_contract.momentum_name(name))
        ]
    g.outputs += [Port(step_contract.LOSS, f32, ()), Port(step_contract.HITS, i64, ())]
    return g


def linear() -> Model:
    g = Graph(inputs=[Port("x", np.dtype(np.float32), ("N", FEATURES))])
    g.initializers = {"w": np.zeros((CLASSES, FEATURES), np.float32), "b": np.zeros(CLASSES, np.float32)}
    g.emit("Gemm", "x", "w", "b", attrs={"transB": 1}, out="logits")
    g.outputs = [Port("logits", np.dtype(np.float32), ("N", CLASSES))]
    return import_onnx(g.to_bytes(), "linear")


def hidden_layer_model() -> Model:
    """Two layers with a normalisation between them."""
    rng = np.random.default_rng(0)
    g = Graph(inputs=[Port("x", np.dtype(np.float32), ("N", FEATURES))])
    shapes = {
        "w1": (HIDDEN, FEATURES),
        "gamma": (HIDDEN,),
        "beta": (HIDDEN,),
        "w2": (CLASSES, HIDDEN),
        "b2": (CLASSES,),
    }
    g.initializers = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    g.initializers |= {"mean": np.zeros(HIDDEN, np.float32), "var": np.ones(HIDDEN, np.float32)}
    h = g.emit("Gemm", "x", "w1", attrs={"transB": 1})
    h = g.emit("Relu", g.emit("BatchNormalization", h, "gamma", "beta", "mean", "var"))
    g.emit("Gemm", h, "w2", "b2", attrs={"transB": 1}, out="logits")
    g.outputs = [Port("logits", np.dtype(np.float32), ("N", CLASSES))]
    return import_onnx(g.to_bytes(), "hidden")


def tokens() -> Model:
    """The mean of the tokens' rows of a table."""
    table = np.random.default_rng(0).standard_normal((VOCABULARY, CLASSES)).astype(np.float32)
    g = Graph(inputs=[Port("x", np.dtype(np.int64), ("N", 5))], initializers={"table": table})
    g.emit("ReduceMean", g.emit("Gather", "table", "x"), attrs={"axes": [1], "keepdims": 0}, out="logits")
    g.outputs = [Port("logits", np.dtype(np.float32), ("N", CLASSES))]
    spec = TensorSpec("table", TensorKind.WEIGHT, (Axis.fixed(VOCABULARY), Axis.fixed(CLASSES)))
    return Model(g, Architecture("tokens", (), (spec,), (), (), (5,), (CLASSES,)))


COMPILED = {
    "adamw": (linear, Features(optimizer="adamw", clip=True, accumulate=True, label_smoothing=True, class_weight=True)),
    "bce": (linear, Features(loss="bce", class_weight=True)),
    "bias": (linear, Features(trainable=("b",))),
    "huber": (linear, Features(loss="huber", accumulate=True)),
    "narrow": (hidden_layer_model, Features(ordered_dropout=True, optimizer="adam", proximal=True)),
    "still": (hidden_layer_model, Features(frozen=("w1", "gamma", "mean", "var"))),
    "tokens": (tokens, Features()),
    "mixup": (linear, Features(label_pairs=True, accumulate=True, label_smoothing=True, class_weight=True)),
    "kept": (hidden_layer_model, Features(axes=True)),
    "prior": (hidden_layer_model, Features(logit_offset=True)),
    "masked": (hidden_layer_model, Features(element_mask=True, axes=True, gradients=True)),
    "drift": (hidden_layer_model, Features(element_mask=True, axes=True, drift=True, decay=False)),
    "threshold": (hidden_layer_model, Features(threshold=True, axes=True)),
    "scaled": (hidden_layer_model, Features(scale=True, axes=True, gradients=True)),
}


def inference() -> onnx.ModelProto:
    shapes = {"w": (CLASSES, FEATURES), "b": (CLASSES,)}
    where = tensorfile.tensor_offsets(tensorfile.encode({n: np.zeros(s, np.float32) for n, s in shapes.items()}))
    tensors = []
    for name, shape in shapes.items():
        _, _, start, end = where[name]
        tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": "weights.safetensors", "offset": start, "length": end - start}.items():
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["logits"], transB=1)],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", FEATURES])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, graph in {"plain": training(), "full": training(full=True)}.items():
        (FOLDER / f"{name}.onnx").write_bytes(graph.to_bytes())
    for name, (model, features) in COMPILED.items():
        (FOLDER / f"{name}.onnx").write_bytes(training_graph(model(), features).to_bytes())
    hidden_model = hidden_layer_model()
    (FOLDER / "hidden.onnx").write_bytes(inference_model(hidden_model, hidden_model.architecture.sizes))
    (FOLDER / "hidden_half.onnx").write_bytes(inference_model(hidden_model, [HIDDEN // 2]))
    for precision in ("float16", "int8"):
        kit = lower(hidden_model, [HIDDEN // 2], precision).packed
        (FOLDER / f"hidden_half_{precision}.safetensors").write_bytes(kit)
    (FOLDER / "inference.onnx").write_bytes(inference().SerializeToString(deterministic=True))
