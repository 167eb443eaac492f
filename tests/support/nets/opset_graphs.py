"""Graphs at every opset that can be written: what tests compare, and what `tests/support/nets/graphs/opsets.npz` holds.

`python tests/support/nets/opset_graphs.py` writes that file; boards, which have no onnx, run what is in it.
"""

from typing import Any

import numpy as np
import onnx

from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.ir.opset_lowering import WRITABLE_OPSETS
from fedprune_export.pruning.model import Model
from support.paths import GRAPHS

FILE = GRAPHS / "opsets.npz"
F32 = np.dtype(np.float32)
Arrays = dict[str, np.ndarray[Any, Any]]


def _values(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def forms() -> Graph:
    """One of each operator whose form depends on the opset; results are joined into one row per sample."""
    g = Graph(inputs=[Port("x", F32, ("N", 8, 6, 6))])
    g.initializers.update(s8=_values(8), b8=_values(8, 1)[:, 0], s6=_values(6), b6=_values(6, 1)[:, 0])
    out = [
        g.emit("Gelu", "x"),
        g.emit("Gelu", "x", attrs={"approximate": "tanh"}),
        g.emit("Mish", "x"),
        g.emit("HardSwish", "x"),
        g.emit("GroupNormalization", "x", "s8", "b8", attrs={"num_groups": 4, "epsilon": 1e-3}),
        g.emit("RMSNormalization", "x", "s6", attrs={"axis": -1, "epsilon": 1e-3}),
        g.emit("LayerNormalization", "x", "s6", "b6", attrs={"axis": -1, "epsilon": 1e-3}),
        *g.emit_many("LayerNormalization", "x", "s6", "b6", outputs=3, attrs={"axis": -1}),
        *(g.emit(f"Reduce{r}", "x", attrs={"axes": [2, 3]}) for r in ("Mean", "Max", "Min", "L1", "L2", "SumSquare")),
        g.emit("ReduceSum", "x", g.ints(1), attrs={"keepdims": 1}),
        *g.emit_many("Split", "x", outputs=2, attrs={"axis": 1}),
        g.emit("Pad", "x", g.ints(0, 0, 1, 1, 0, 0, 1, 1), attrs={"mode": "reflect"}),
        g.emit("Resize", "x", "", g.constant([1, 1, 2, 2], np.float32), attrs={"mode": "linear"}),
        g.emit("Expand", "s6", g.emit("Shape", "x")),
    ]
    target = g.emit("Concat", g.ints(-1), g.emit("Shape", "x", attrs={"start": 2}), attrs={"axis": 0})
    out.append(g.emit("Reshape", g.emit("ReduceMean", "x", attrs={"axes": [1]}), target))
    rows = [g.emit("Flatten", o, attrs={"axis": 1}) for o in out]
    g.outputs = [Port(g.emit("Concat", *rows, attrs={"axis": 1}, out="y"), F32, ("N", "K"))]
    return g


def network() -> Model:
    """A small network with a convolution, every norm that has gradients, and Gelu."""
    g = Graph(inputs=[Port("x", F32, ("N", 3, 8, 8))])
    g.initializers.update(
        k=_values(6, 3, 3, 3), s=np.abs(_values(6)) + 0.5, b=_values(6, 1)[:, 0], m=_values(6, 2)[:, 0] * 0,
        v=np.ones(6, np.float32), ls=np.abs(_values(6, 5)[:, 0]) + 0.5, lb=_values(6, 6)[:, 0], w=_values(6, 4),
    )  # fmt: skip
    value = g.emit("Conv", "x", "k", attrs={"pads": [1, 1, 1, 1]})
    value = g.emit("Relu", g.emit("BatchNormalization", value, "s", "b", "m", "v"))
    value = g.emit("MaxPool", value, attrs={"kernel_shape": [2, 2], "strides": [2, 2]})
    value = g.emit("Flatten", g.emit("GlobalAveragePool", value))
    value = g.emit("Gelu", g.emit("LayerNormalization", value, "ls", "lb", attrs={"axis": -1}))
    g.outputs = [Port(g.emit("MatMul", value, "w"), F32, ("N", 4))]
    return import_onnx(g.to_bytes(opset=20), "small")


def graphs() -> dict[str, tuple[Graph, Arrays]]:
    """Graphs by name with what they are fed."""
    rng = np.random.default_rng(0)
    image, picture = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 8, 6, 6), (5, 3, 8, 8)))
    return {"forms": (forms(), {"x": image}), "network": (network().graph, {"x": picture})}


def checked_bytes(graph: Graph, opset: int) -> bytes:
    """A graph at an opset, which onnx has checked."""
    raw = graph.to_bytes(opset=opset)
    proto = onnx.load_model_from_string(raw)
    onnx.checker.check_model(proto, full_check=True)
    if proto.opset_import[0].version != opset:
        raise ValueError(f"opset {proto.opset_import[0].version} instead of {opset}")
    return raw


def main() -> None:
    arrays: Arrays = {}
    for name, (graph, feeds) in graphs().items():
        arrays |= {f"{name}/in/{k}": v for k, v in feeds.items()}
        arrays |= {f"{name}/out/{k}": v for k, v in OnnxSession(graph.to_bytes()).run(feeds).items()}
        arrays |= {f"{name}/opset/{o}": np.frombuffer(checked_bytes(graph, o), np.uint8) for o in WRITABLE_OPSETS}
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
