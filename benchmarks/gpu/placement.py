"""Which provider ran each operator of a graph."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from fedprune.planning.probe_report import CUDA
from fedprune.runtime.session import CUDA_OPTIONS

PROVIDER = "CUDAExecutionProvider"

# A shape has one number per dimension; graphs join some of them. Real work on whole numbers has a batch's size.
MAX_SHAPE_NUMBERS = 16

# Types of shapes and of comparisons of shapes.
_SHAPE_TYPES = {"int64", "int32", "bool"}


def is_shape_arithmetic(node: Mapping[str, Any]) -> bool:
    """Whether an operator of a profile computes nothing but a shape. onnxruntime leaves these to the processor on
    purpose: kernels are launched from there with these numbers."""
    outputs = [entry for output in node["output_type_shape"] for entry in output.items()]
    return all(kind in _SHAPE_TYPES and np.prod(shape, dtype=int) <= MAX_SHAPE_NUMBERS for kind, shape in outputs)


def count_nodes(nodes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Operators by provider; of the processor's those that compute shapes, those that work, and the copies."""
    nodes = list(nodes)
    copies = [n for n in nodes if n["op_name"].startswith("Memcpy")]
    left = [n for n in nodes if n["provider"] != PROVIDER and n not in copies]
    return {
        "operators": dict(Counter(n["provider"] for n in nodes)),
        "shapes": dict(Counter(n["op_name"] for n in left if is_shape_arithmetic(n))),
        "work": dict(Counter(n["op_name"] for n in left if not is_shape_arithmetic(n))),
        "copies": dict(Counter(n["op_name"] for n in copies)),
        "copied_bytes": sum(int(n["output_size"]) for n in copies),
        "work_us": sum(n["microseconds"] for n in left if not is_shape_arithmetic(n)),
        "copy_us": sum(n["microseconds"] for n in copies),
    }


def placement(graph: bytes | Path, feeds: Mapping[str, Any], device: str, *, training: bool = False) -> dict[str, Any]:
    """`count_nodes` of a graph's second run, optimised as in a board's session."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if training:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    providers = [(PROVIDER, CUDA_OPTIONS)] if device == CUDA else []
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/run"
        model = str(graph) if isinstance(graph, Path) else graph
        session = onnxruntime.InferenceSession(model, options, providers=[*providers, "CPUExecutionProvider"])
        for _ in range(2):  # the first loads kernels
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    return count_nodes({**e["args"], "microseconds": e["dur"]} for e in kernels[len(kernels) // 2 :])
