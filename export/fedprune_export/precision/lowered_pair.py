"""A model on its way to a lower precision: the graph that a board will run, and the graph that makes its tensors.

Weights change after every round, so that a board has to convert them itself, with onnxruntime alone: every tensor that
the lowered graph reads is an output of the `prepare` graph, which takes the float32 weights by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core import tensorfile
from fedprune.core.errors import ModelError
from fedprune_export.bundles.inference import add_external
from fedprune_export.ir.graph import Graph, Node, Port
from fedprune_export.ir.shape_inference import infer
from fedprune_export.pruning.cut import at_widths
from fedprune_export.pruning.model import Model

Array = npt.NDArray[Any]


class LoweredPair:
    """A graph and the graph that prepares its tensors, edited side by side by the passes of this package.

    Raises `BundleError` if the widths don't fit the architecture.

    Attributes:
        graph: The graph that a board will run; passes rewrite it. Its weights are not among its initialisers.
        prepare: The graph that makes its tensors; passes add to it.
        tensors: Every tensor that `graph` may read: its name there, and its name in `prepare`.
    """

    def __init__(self, model: Model, widths: Sequence[int]) -> None:
        self.graph = at_widths(model, widths)
        # Constants and nodes may move from one graph into the other: names continue from where they are.
        self.prepare = Graph(name="prepare", _counter=self.graph._counter)
        self._weights = model.architecture.shapes(widths)
        self.tensors: dict[str, str] = {}
        complete = self.graph.copy()
        complete.initializers |= self.zero_weights()
        inferred = infer(complete, batch=2)
        self._shapes, self._dtypes = inferred.shapes, inferred.dtypes
        self._move_weight_nodes()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """A value's shape for a batch of two samples; None where it can't be inferred."""
        return self._shapes.get(name)

    def is_float(self, name: str) -> bool:
        """Whether a value is known to be float32."""
        return self._dtypes.get(name) == np.float32

    def is_tensor(self, name: str) -> bool:
        """Whether a value is a weight, or a tensor that `prepare` makes of weights."""
        return name in self.tensors or name in self._weights

    def output_names(self) -> set[str]:
        return {p.name for p in self.graph.outputs}

    def prepared_value(self, name: str) -> str:
        """A weight, a tensor or a constant of the graph as a value of `prepare`.

        Raises `ModelError` if it is neither.
        """
        if name in self.tensors:
            return self.tensors[name]
        if name in self._weights:
            self.prepare.inputs.append(Port(name, np.dtype(np.float32), (None,) * len(self._weights[name])))
            self.tensors[name] = name
        elif name in self.graph.initializers:
            self.prepare.initializers[name] = self.graph.initializers[name]
        else:
            raise ModelError(f"{name} is no weight and no constant")
        return name

    def define_tensor(self, name: str, value: str, dtype: npt.DTypeLike = np.float32, like: str | None = None) -> str:
        """A new tensor of the graph.

        Args:
            name: Its name; nothing else may have it.
            value: The value of `prepare` that becomes the tensor.
            like: A tensor of the same shape, for later passes that ask for the shape.
        """
        self.tensors[name], self._dtypes[name] = value, np.dtype(dtype)
        if like is not None:
            self._shapes[name] = self._shapes[like]
        return name

    def _move_weight_nodes(self) -> None:
        """Move nodes that depend on weights alone to `prepare`, which computes them once per round, not per batch."""
        remaining: list[Node] = []
        output_names = self.output_names()
        for node in self.graph.nodes:
            reads = [i for i in node.inputs if i]
            from_weights = all(self.is_tensor(i) or i in self.graph.initializers for i in reads)
            if not from_weights or not any(map(self.is_tensor, reads)) or output_names & set(node.outputs):
                remaining.append(node)
                continue
            for name in reads:
                self.prepared_value(name)
            self.prepare.nodes.append(node)
            self.tensors |= {o: o for o in node.outputs if o}
        self.graph.nodes = remaining

    def finish(self) -> None:
        """Make the tensors that the graph reads the outputs of the prepare graph, in the order of reading."""
        names: dict[str, str] = {}
        for node in self.graph.nodes:
            for i, name in enumerate(node.inputs):
                if name and self.is_tensor(name):
                    value = self.prepared_value(name)
                    # A weight that stays as it is needs another name: an input can't be an output.
                    out = f"{name}~float32" if name in self._weights else name
                    if name not in names and out != value:
                        self.prepare.emit("Identity", value, out=out)
                    names[name] = node.inputs[i] = out
        self.prepare.outputs = [Port(out, self._dtypes.get(n, np.dtype(np.float32)), ()) for n, out in names.items()]
        self.prepare.prune()
        read = {i for n in self.prepare.nodes for i in n.inputs}
        self.prepare.inputs = [p for p in self.prepare.inputs if p.name in read]
        self.graph.prune()

    def zero_weights(self) -> dict[str, Array]:
        return {n: np.zeros(s, np.float32) for n, s in self._weights.items()}

    def prepare_bytes(self, tensors: Mapping[str, Array]) -> bytes:
        """The prepare graph with the types of its outputs.

        `tensors`: its outputs, for their types and ranks.
        """
        self.prepare.outputs = [Port(n, v.dtype, (None,) * v.ndim) for n, v in tensors.items()]
        return self.prepare.to_bytes()

    def graph_bytes(self, tensors: Mapping[str, Array], file: str) -> bytes:
        """The lowered graph; its tensors are external data.

        `tensors`: all tensors of the file, for their types and shapes; `file`: the file next to the graph that holds
        them.
        """
        proto = self.graph.to_proto()
        # Tensors stand in the file in this order, one after the other, behind a header of fixed length.
        offset = len(tensorfile.header_for_tensors(tensors))
        read = {i for n in self.graph.nodes for i in n.inputs}
        for name, value in tensors.items():
            if name in read:
                add_external(proto, name, value.dtype, value.shape, file, offset)
            offset += value.nbytes
        raw: bytes = proto.SerializeToString(deterministic=True)
        return raw


def node_text(node: Node) -> str:
    """A node in lists of nodes that stay in float32."""
    return f"{node.op} {node.name or node.outputs[0]}"
