"""Compares a float model with the quantised file that it was written from, rounding by rounding.

Rounding to integers turns the last digit of a float into a step, and steps add up over a network. So the two are not
compared at their ends alone. Both are run as one graph in which the float model reads, behind each of its roundings,
what the file has there. From one rounding to the next it then has to compute the same number, up to the step of the
next one. All parts together are the float model; only the roundings are left out in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from fedprune.core.errors import ModelError, value_text
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing.batches.layout import move_batch_first, possible_layouts
from fedprune_export.importing.graph_writer import FLOAT_TYPES, value_types
from fedprune_export.importing.original import relative_distance
from fedprune_export.importing.quantised.numbers import FLOAT_MODEL_HINT, Quantisation
from fedprune_export.importing.quantised.rewriter import Rewriter, Rounding
from fedprune_export.importing.raw_file import BatchLayout
from fedprune_export.importing.sample_shapes import check_sizes
from fedprune_export.importing.translation import upgrade_model
from fedprune_export.ir.graph import Array, Graph, Port, node_label
from fedprune_export.ir.sample_inputs import sample_feeds
from fedprune_export.ir.shape_inference import ShapeError
from fedprune_export.ir.trace import shapes_at_batch

_FLOAT = onnx.TensorProto.FLOAT
_PREFIX = "float/"  # of the float model's values, in the graph that has both
_BATCHES = (2, 1)
_TOLERANCE = 1e-4  # between float outputs, relative to the largest number
_STEP_TOLERANCE = 1e-2  # float32 rounds numbers that are up to 2^16 steps large


# By operator: the place of the other factor's zero point, or None where that factor is uint8, and the places of weights
# and their zero points.
_WEIGHT_PLACES: dict[str, tuple[int | None, tuple[tuple[int, int], ...]]] = {
    "QLinearConv": (2, ((3, 5),)),
    "QLinearMatMul": (2, ((3, 5),)),
    "QGemm": (2, ((3, 5),)),
    "MatMulInteger": (2, ((1, 3),)),
    "ConvInteger": (2, ((1, 3),)),
    "MatMulIntegerToFloat": (4, ((1, 5),)),
    "DynamicQuantizeMatMul": (None, ((1, 3),)),
    "DynamicQuantizeLSTM": (None, ((1, 9), (2, 11))),
    "QAttention": (6, ((1, 7),)),
}


def prove(state: Rewriter, floats: onnx.ModelProto) -> None:
    """Raise `ModelError` if a float model computes something else than the quantised file, up to its rounding."""
    graph = Graph.from_proto(upgrade_model(floats))
    check_sizes(graph)
    layout, moved = _fitting_layout(graph)
    probe, steps, pairs = _probe(state)
    model = state.write(probe)
    for value in model.graph.output:
        value.ClearField("type")  # of any type and shape
    avoid_saturation(model.graph)
    session = OnnxSession(model.SerializeToString(), exact=True)
    for batch in _BATCHES if layout.size is None else (layout.size,):
        feeds = {
            name: np.ascontiguousarray(np.moveaxis(value, 0, layout.inputs.get(name, 0)))
            for name, value in _samples(state, moved, batch).items()
        }
        outputs = session.run(feeds)
        for name, rounding in steps.items():
            _check_steps(state, rounding, float(outputs[name]))
        for old, new in pairs:
            if not relative_distance(outputs[old], outputs[new]) <= _TOLERANCE:
                raise ModelError(
                    f"the float model of a quantised file differs at its output {value_text(old)}",
                    expected=f"what the file computes from the same numbers, to {_TOLERANCE:g}",
                    hint=FLOAT_MODEL_HINT,
                )


def _fitting_layout(graph: Graph) -> tuple[BatchLayout, Graph]:
    """Where a file has its batch, and its graph with the batch first. The sizes of all values are known then, so that
    running the file is safe."""
    reason: ModelError | None = None
    for layout in possible_layouts(graph):
        moved = move_batch_first(graph, layout)
        try:
            shapes_at_batch(moved, layout.size or max(_BATCHES))
        except ShapeError as error:
            reason = reason or error
            continue
        return layout, moved
    raise reason or ModelError("the sizes of the file's values aren't known")


def _samples(state: Rewriter, moved: Graph, batch: int) -> dict[str, Array]:
    """Samples for the file's inputs: over the whole range of an input that is rounded at once, normal ones else."""
    feeds = sample_feeds(moved, batch, seed=batch)
    ranges = {r.value: (r.quantisation, r.bounds) for r in state.roundings if r.quantisation is not None and r.bounds}
    out: dict[str, Array] = {}
    for port in moved.inputs:
        value, (quantisation, bounds) = feeds[port.name], ranges.get(port.name, (None, None))
        scale = None if quantisation is None else state.constant(quantisation.scale)
        if quantisation is not None and bounds is not None and scale is not None and scale.size == 1:
            zero = state.constant(quantisation.zero)
            offset = 0.0 if zero is None else float(zero.reshape(-1)[0])
            low, high = (float(scale.reshape(-1)[0]) * (b - offset) for b in bounds)
            value = np.random.default_rng(batch).uniform(low, high, value.shape).astype(np.float32)
        elif port.dtype.kind in "iu" and value.dtype != port.dtype:
            kinds = np.iinfo(port.dtype)
            value = np.random.default_rng(batch).integers(max(kinds.min, 0), min(kinds.max, 1) + 1, value.shape)
        out[port.name] = value.astype(port.dtype)
    return out


def _probe(state: Rewriter) -> tuple[Graph, dict[str, Rounding], list[tuple[str, str]]]:
    """One graph of the file and the float model, which reads what the file has behind each rounding.

    Returns it with its outputs: by name how far apart a rounding's numbers are, in steps; and pairs of outputs.
    """
    probe, floats = state.file.copy(), state.graph
    inputs = {p.name for p in probe.inputs}
    by_passed = {r.passed: r for r in state.roundings}
    probe.initializers |= {_PREFIX + name: value for name, value in floats.initializers.items()}
    probe.outputs, steps = [], dict[str, Rounding]()

    def renamed(name: str) -> str:
        return name if not name or name in inputs else _PREFIX + name

    for node in floats.nodes:
        rounding = by_passed.get(node.outputs[0])
        if rounding is not None:
            steps[_emit_steps(state, probe, rounding, renamed(rounding.value))] = rounding
            continue
        copy = node.copy()
        copy.inputs, copy.outputs = [renamed(i) for i in node.inputs], [renamed(o) for o in node.outputs]
        copy.name = ""
        probe.nodes.append(copy)
    file_types = {p.name: p.dtype for p in state.file.outputs}
    ends = [p.name for p in floats.outputs if file_types[p.name] == p.dtype]
    pairs = [(name, _PREFIX + name) for name in _last_floats(state, ends)]
    names = [*steps, *(name for pair in pairs for name in pair)]
    probe.outputs = [Port(name, np.dtype(np.float32), ()) for name in names]
    probe.prune()
    return probe, steps, pairs


def _last_floats(state: Rewriter, ends: Sequence[str]) -> list[str]:
    """The float values that outputs are, or are decided by: equal numbers may differ by a rounding error and then
    decide otherwise."""
    types = value_types(state.proto)
    makers, passed = state.graph.producers(), {r.passed for r in state.roundings}
    out, pending, visited = dict[str, None](), list(ends), set(ends)
    while pending:
        name = pending.pop()
        if name in passed:
            continue
        if types.get(name) in FLOAT_TYPES and name in state.makers:
            out[name] = None
        elif name in makers:
            new = [i for i in makers[name].inputs if i and i not in visited]
            visited.update(new)
            pending += new
    return list(out)


def _emit_steps(state: Rewriter, probe: Graph, rounding: Rounding, value: str) -> str:
    """Write what the file has behind a rounding where the float model reads it, and how far that is from `value`."""
    quantisation = rounding.quantisation
    if quantisation is None:
        number = probe.emit("Identity", rounding.integers, out=_PREFIX + rounding.passed)
        largest = probe.emit("ReduceMax", probe.emit("Abs", number), attrs={"keepdims": 0})
        distance = probe.emit("Abs", probe.emit("Sub", value, number))
        return probe.emit("Div", probe.emit("ReduceMax", distance, attrs={"keepdims": 0}), largest)
    constant = state.constant(quantisation.scale)
    kind = _FLOAT if constant is None else onnx.helper.np_dtype_to_tensor_dtype(constant.dtype)
    scale = probe.emit("Cast", _spread(state, probe, quantisation.scale, quantisation.axis), attrs={"to": _FLOAT})
    number = probe.emit("Cast", rounding.integers, attrs={"to": _FLOAT})
    if quantisation.zero:
        zero = _spread(state, probe, quantisation.zero, quantisation.axis)
        number = probe.emit("Sub", number, probe.emit("Cast", zero, attrs={"to": _FLOAT}))
    number = probe.emit("Mul", number, scale)
    probe.emit("Cast", number, attrs={"to": kind}, out=_PREFIX + rounding.passed)
    value = probe.emit("Cast", value, attrs={"to": _FLOAT})
    if rounding.bounds is not None and constant is not None:
        value = _clamped(state, probe, quantisation, rounding.bounds, value, constant)
    steps = probe.emit("Div", probe.emit("Sub", value, number), scale)
    return probe.emit("ReduceMax", probe.emit("Abs", steps), attrs={"keepdims": 0})


def _clamped(
    state: Rewriter, probe: Graph, quantisation: Quantisation, bounds: tuple[int, int], value: str, scale: Array
) -> str:
    """A number within the range of a quantisation."""
    zero = state.constant(quantisation.zero)
    offset = np.zeros(1) if zero is None else np.asarray(zero, np.float64)
    for operator, bound in zip(("Max", "Min"), bounds, strict=True):
        end = (bound - offset).reshape(-1) * np.asarray(scale, np.float64).reshape(-1)
        value = probe.emit(operator, value, probe.constant(_along(end, quantisation.axis), np.float32))
    return value


def _spread(state: Rewriter, probe: Graph, name: str, axis: int) -> str:
    """A scale or zero point in a shape that is broadcast over the numbers."""
    constant = state.constant(name)
    return name if constant is None else probe.constant(_along(constant, axis), constant.dtype)


def _along(parameter: Array, axis: int) -> Array:
    """One number, or numbers along an axis that is counted from the end."""
    return parameter.reshape(()) if parameter.size == 1 else parameter.reshape([-1, *[1] * (-axis - 1)])


def _check_steps(state: Rewriter, rounding: Rounding, steps: float) -> None:
    if rounding.quantisation is None:
        limit, unit = rounding.steps, "of the largest number"
    else:
        limit, unit = rounding.steps + _STEP_TOLERANCE, "of its steps"
    if not steps <= limit:
        raise ModelError(
            f"the float model of a quantised file differs at {node_label(state.makers[rounding.integers])}",
            expected=f"what the file has there, to {rounding.steps:g} {unit}",
            got=f"{steps:.3g}",
            hint=FLOAT_MODEL_HINT,
        )


def avoid_saturation(graph: onnx.GraphProto) -> None:
    """Give the graph's products of uint8 and constant int8 numbers weights in uint8.

    On x86 processors with AVX2 and without VNNI, onnxruntime adds up pairs of products of uint8 and int8 in 16 bits,
    which saturate (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). Weights and their
    zero points that are 128 higher come to the same sums.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    unsigned = {name for name, tensor in constants.items() if tensor.data_type == onnx.TensorProto.UINT8}
    unsigned |= {name for node in graph.node if node.op_type == "DynamicQuantizeLinear" for name in node.output}
    for node in graph.node:
        other, places = _WEIGHT_PLACES.get(node.op_type, (None, ()))
        if other is not None and (len(node.input) <= other or node.input[other] not in unsigned):
            continue
        for weight, zero in places:
            _raise_weight(graph, node, constants, weight, zero)


def _raise_weight(
    graph: onnx.GraphProto, node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], weight: int, zero: int
) -> None:
    zero_name = node.input[zero] if zero < len(node.input) else ""
    tensors = [constants.get(node.input[weight]), constants.get(zero_name) if zero_name else None]
    if tensors[0] is None or tensors[0].data_type != onnx.TensorProto.INT8 or (zero_name and tensors[1] is None):
        return
    node.input.extend([""] * (zero + 1 - len(node.input)))
    for place, tensor in zip((weight, zero), tensors, strict=True):
        values = np.zeros((), np.int8) if tensor is None else numpy_helper.to_array(tensor)
        # Their own names: others may read the same weights.
        name = f"raised/{len(graph.initializer)}"
        raised = numpy_helper.from_array((values.astype(np.int16) + 128).astype(np.uint8), name)
        graph.initializer.append(raised)
        node.input[place] = name
