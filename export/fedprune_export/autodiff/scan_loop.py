"""A loop in a training graph: a Scan node that takes one step per index of the first axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx import TensorProto, helper, numpy_helper

from fedprune_export.ir.graph import Graph

# Writes one step of a loop into its body: takes the names of states and of slices of the inputs, and returns those of
# the next states and of slices of the outputs. It may read values of the graph around the body.
Step = Callable[[Graph, list[str], list[str]], tuple[list[str], list[str]]]


def scan(
    g: Graph, states: Sequence[str], sliced: Sequence[str], step: Step, *, backwards: bool = False
) -> tuple[list[str], list[str]]:
    """Take one step per index of the first axis.

    Args:
        states: What is carried from step to step.
        sliced: Values of which each step gets one index of the first axis.
        step: The step; all of its values are float32.
        backwards: Whether it goes from the last index to the first; the outputs are in the order of the inputs.

    Returns:
        The last states, and the slices that went out, stacked.
    """
    # Names continue those of the outer graph, because a body sees its values.
    body = Graph(name="step", _counter=g._counter)
    states_in, slices_in = (
        [body.fresh(stem) for _ in values] for stem, values in (("state", states), ("slice", sliced))
    )
    following, written = step(body, states_in, slices_in)
    # An output of a sub-graph can be neither two outputs nor an input.
    used_names = {*states_in, *slices_in}
    outputs: list[str] = []
    for name in [*following, *written]:
        outputs.append(body.emit("Identity", name) if name in used_names else name)
        used_names.add(name)
    g._counter = body._counter
    proto = helper.make_graph(
        [n.to_proto() for n in body.nodes],
        body.name,
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in [*states_in, *slices_in]],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(v, k) for k, v in body.initializers.items()],
    )
    attrs = {
        "body": proto,
        "num_scan_inputs": len(sliced),
        "scan_input_directions": [int(backwards)] * len(sliced),
        "scan_output_directions": [int(backwards)] * len(written),
    }
    names = g.emit_many("Scan", *states, *sliced, outputs=len(outputs), attrs=attrs)
    return names[: len(following)], names[len(following) :]
