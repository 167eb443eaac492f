"""Runs the user's file in onnxruntime: an import has to compute the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from fedprune.runtime.session import OnnxSession
from fedprune_export.ir.graph import Array, Graph, Port


class Original:
    """A session of the user's file as it is: no function is inlined, no loop is unrolled, and the opset is its own.

    Raises `ModelError` if onnxruntime doesn't load the file.

    Args:
        inputs: The names of the file's inputs.
        outputs: The names of the outputs that are compared.
        row: A graph whose only input is the import's, and which computes the file's inputs from it.
    """

    def __init__(self, raw: bytes, inputs: list[str], outputs: list[str], row: Graph) -> None:
        self._inputs, self._outputs, self._row_name = inputs, outputs, row.inputs[0].name
        self._session = raw_session(raw, outputs)
        feeder = row.copy()
        # The row may be an input of the file itself, when it has only one.
        feeder.outputs = [Port(name, np.dtype(np.float32), ()) for name in inputs if name != self._row_name]
        self._feeder: OnnxSession | None = None
        if feeder.outputs:
            feeder.prune()
            proto = feeder.to_proto()
            for value in proto.graph.output:
                value.ClearField("type")  # of any type and shape
            self._feeder = OnnxSession(proto.SerializeToString())

    def run(self, x: Array) -> Array:
        """The outputs for samples of the import's input; several are concatenated, as by `pack_outputs`."""
        inputs = self._feeder.run({self._row_name: x}) if self._feeder is not None else {}
        values = self._session.run({name: inputs.get(name, x) for name in self._inputs}, self._outputs)
        if len(self._outputs) == 1:
            return values[self._outputs[0]]
        return np.concatenate([values[name].reshape(len(x), -1) for name in self._outputs], 1)


def raw_session(raw: bytes, outputs: list[str]) -> OnnxSession:
    """A session of a file, reduced to what its outputs depend on. Raises `ModelError` if onnxruntime refuses it.

    Dead nodes could ask for any amount of memory, because the import bounds only sizes of live values. Names of nodes
    and declared shapes are removed: they compute nothing, but may be duplicate or wrong.
    """
    model = onnx.load_model_from_string(raw)
    for value in [o for o in model.graph.output if o.name not in outputs]:
        model.graph.output.remove(value)
    for scope in (model.graph, *model.functions):
        _drop_dead(scope)
    return OnnxSession(model.SerializeToString())


def _drop_dead(scope: Any) -> set[str]:
    """Keep the nodes of a graph or function that its outputs depend on, also in sub-graphs.

    Returns the names that it reads from the graph around it.
    """
    needed = {o if isinstance(o, str) else o.name for o in scope.output}
    live_nodes = []
    for node in reversed(scope.node):
        if not needed.intersection(node.output):
            continue
        node.ClearField("name")
        if node.op_type == "Dropout" and node.domain in ("", "ai.onnx"):
            del node.input[2:]  # whether it trains: the model is compared as it predicts
        needed.difference_update(node.output)
        needed.update(i for i in node.input if i)
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                needed |= _drop_dead(inner)
        live_nodes.append(node)
    del scope.node[: len(scope.node)]
    scope.node.extend(live_nodes[::-1])
    del scope.value_info[:]
    input_names = {v if isinstance(v, str) else v.name for v in scope.input}
    return needed - input_names - {t.name for t in getattr(scope, "initializer", ())}
