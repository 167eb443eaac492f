"""A loop over the first axis of values, as one Scan node: for what must go step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx import TensorProto, helper, numpy_helper

from fedprune_export.ir.graph import Graph

Step = Callable[[Graph, list[str], list[str]], tuple[list[str], list[str]]]
"""Writes one step into the graph it is given: from states and slices to the next states and the slices that go out.

It may read values of the graph around it.
"""


def scan(
    g: Graph, states: Sequence[str], sliced: Sequence[str], step: Step, *, backwards: bool = False
) -> tuple[list[str], list[str]]:
    """Take one step per index of the first axis.

    Args:
        g: The graph.
        states: What is carried from step to step.
        sliced: Values of which each step gets one index of the first axis.
        step: The step; all of its values are float32.
        backwards: Whether it goes from the last index to the first; the outputs lie in the order of the inputs.

    Returns:
        The last states, and the slices that went out, stacked.
    """
    body = Graph(name="step", _counter=g._counter)
    held, read = ([body.fresh(stem) for _ in values] for stem, values in (("state", states), ("slice", sliced)))
    following, written = step(body, held, read)
    # An output of a sub-graph can be neither two outputs nor an input.
    taken = {*held, *read}
    outputs: list[str] = []
    for name in [*following, *written]:
        outputs.append(body.emit("Identity", name) if name in taken else name)
        taken.add(name)
    g._counter = body._counter
    proto = helper.make_graph(
        [n.to_proto() for n in body.nodes],
        body.name,
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in [*held, *read]],
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
