"""Precisions and the names of their files. Command lines import this before numpy is loaded."""

from __future__ import annotations

FLOAT32 = "float32"
INT8 = "int8"
# `folded` is float32 with norms inside the layers before them.
PRECISIONS = ("folded", "float16", INT8)

# The precisions at which boards of a fleet may serve. Not `folded`: onnxruntime folds norms of float32 graphs by
# itself.
FLEET_PRECISIONS = ("float16", INT8)

FASTEST = "fastest"

# Values of a board's option `serve`: a precision, or the fastest of them.
SERVE_CHOICES = (FLOAT32, *FLEET_PRECISIONS, FASTEST)


def graph_file(precision: str) -> str:
    return f"{precision}.onnx"


def weights_file(precision: str) -> str:
    """The file of a precision's tensors, in the folder of its graph."""
    return f"{precision}.safetensors"


def prepare_file(precision: str) -> str:
    """The graph that makes a precision's tensors from float32 weights."""
    return f"prepare-{precision}.onnx"


def calibrate_file(precision: str) -> str:
    """The graph that measures ranges of activations, in the folder of the float32 weights."""
    return f"calibrate-{precision}.onnx"


def served_files(precision: str) -> tuple[str, str]:
    """The files that predict: a graph and its tensors."""
    if precision == FLOAT32:
        return "inference.onnx", "weights.safetensors"
    return graph_file(precision), weights_file(precision)


def files_of(precision: str) -> tuple[str, ...]:
    """The files of a bundle that a precision consists of."""
    return (*precision_graphs(precision), weights_file(precision))


def precision_graphs(precision: str) -> tuple[str, ...]:
    graphs = (graph_file(precision), prepare_file(precision))
    return (*graphs, calibrate_file(precision)) if precision == INT8 else graphs
