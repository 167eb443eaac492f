"""Precisions and the names of their files, without anything that loads numpy."""

from __future__ import annotations

FLOAT32 = "float32"
INT8 = "int8"
# `folded` is float32 with norms inside the layers before them.
PRECISIONS = ("folded", "float16", INT8)

# Those that boards of a fleet may serve at: what `folded` does, onnxruntime does to float32 by itself.
SERVED = ("float16", INT8)

FASTEST = "fastest"

# Values of a board's option `serve`: a precision, or the fastest of them.
SERVE = (FLOAT32, *SERVED, FASTEST)


def graph_file(precision: str) -> str:
    return f"{precision}.onnx"


def weights_file(precision: str) -> str:
    """The file of its tensors, in the same folder."""
    return f"{precision}.safetensors"


def prepare_file(precision: str) -> str:
    """The graph that makes its tensors."""
    return f"prepare-{precision}.onnx"


def calibrate_file(precision: str) -> str:
    """The graph that measures ranges, in the folder of the float32 weights."""
    return f"calibrate-{precision}.onnx"


def served_files(precision: str) -> tuple[str, str]:
    """The files that predict: a graph and its tensors."""
    if precision == FLOAT32:
        return "inference.onnx", "weights.safetensors"
    return graph_file(precision), weights_file(precision)


def files_of(precision: str) -> tuple[str, ...]:
    """The files of a bundle that a precision consists of."""
    return (*graphs_of(precision), weights_file(precision))


def graphs_of(precision: str) -> tuple[str, ...]:
    graphs = (graph_file(precision), prepare_file(precision))
    return (*graphs, calibrate_file(precision)) if precision == INT8 else graphs
