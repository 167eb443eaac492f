"""A file of float16, bfloat16 or float64 in float32, and how far onnxruntime's runs of the two may differ."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from fedprune.core.errors import ModelError, error_reason
from fedprune_export.importing.model_file import parse_model
from fedprune_export.importing.number_types.conversion import convert_to_float32
from fedprune_export.importing.number_types.float_types import SIGNIFICANT_BITS, computed_types
from fedprune_export.importing.original import random_feeds, relative_distance
from fedprune_export.importing.raw_file import raw_session
from fedprune_export.ir.graph import Array, Graph
from fedprune_export.ir.operators import REARRANGEMENTS
from fedprune_export.ir.sample_inputs import vocabulary_size

# Rounding errors of n operators in a row add up as a random walk does, to about √n roundings (Higham and Mary, "A new
# approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41(5), 2019). The factor is for operators
# that enlarge an error, such as a softmax of large scores.
_ERROR_FACTOR = 8

_SEEDS = (1, 2)  # batches of random samples, by the seeds that draw them

# What computes nothing rounds nothing.
_EXACT_OPERATORS = REARRANGEMENTS | {"Cast", "CastLike", "Concat", "Constant", "Gather", "Relu", "Shape", "Slice"}
_TYPE_NAMES: dict[int, str] = {
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}


@dataclass(frozen=True)
class SinglePrecision:
    """A file in float32.

    Attributes:
        raw: The file in float32.
        own: The file in its own types.
        types: The types, as numbers of `onnx.TensorProto`, that are computed in float32.
        depth: The most operators in a row that round.
    """

    raw: bytes
    own: bytes
    types: tuple[int, ...]
    depth: int

    @property
    def tolerance(self) -> float:
        """How far outputs in float32 and in the file's own types may differ, relative to the largest number."""
        bits = min(24, *(SIGNIFICANT_BITS[kind] for kind in self.types))
        return max(_ERROR_FACTOR * math.sqrt(self.depth) * 2.0**-bits, 1e-6)

    def compare(self, ended: bytes, graph: Graph) -> str:
        """Compare onnxruntime's runs of the file in its own types and in float32. Returns the note for the user.

        Raises `ModelError` if they differ by more than rounding explains.

        Args:
            ended: The file in float32 as it was imported: perhaps without what is behind its training end.
            graph: The imported graph, whose embeddings say which identifiers are valid.
        """
        names = " and ".join(_TYPE_NAMES[kind] for kind in self.types)
        note = f"The file computes in {names}, the model in float32"
        proto = parse_model(ended, run_checker=False)
        outputs = [o.name for o in proto.graph.output]
        try:
            # Optimised, onnxruntime would compute part of it in float32, and it crashes on some files of float16.
            own = raw_session(_ended_like(self.own, proto), outputs, exact=True)
        except ModelError as error:
            reason = error_reason(error.__cause__ or error).rpartition(" : ")[2]
            return (
                f"{note}. onnxruntime doesn't run the file as it is here, so its float32 was compared alone: {reason}"
            )
        single, below = raw_session(ended, outputs), vocabulary_size(graph)
        for seed in _SEEDS:
            numbers = random_feeds(proto.graph, seed=seed, below=below)
            # Rounded in the file's own types first, which float32 then takes as they are.
            feeds = {n: _as_type(v, own.inputs[n][0]) for n, v in numbers.items() if n in own.inputs}
            expected = own.run(feeds, outputs)
            found = single.run({n: _as_type(v, single.inputs[n][0]) for n, v in feeds.items()}, outputs)
            for name in outputs:
                old, new = expected[name].astype(np.float64), found[name]
                if not np.isfinite(old).all() and np.isfinite(new).all():
                    return f"{note}: in its own type its output isn't finite for random inputs."
                worst = relative_distance(new, old)
                if not worst <= self.tolerance:
                    raise ModelError(
                        f"the file computes in {names}, and its output differs in float32",
                        expected=f"agreement to {self.tolerance:.2g}, which {self.depth} roundings in a row explain",
                        got=f"{worst:.2g}",
                        hint="Export the model in float32.",
                    )
        return (
            f"{note}. Outputs of the two agree to {self.tolerance:.1g}, which {self.depth} roundings in a row explain."
        )


def as_single_precision(raw: bytes, inlined: onnx.ModelProto) -> SinglePrecision | None:
    """A file in float32; None if it computes in float32 already, or in whole numbers.

    `inlined` is the file's model without functions, loops and branches. Raises `ModelError` if a tensor is damaged.
    """
    types = computed_types(inlined)
    if not types:
        return None
    model = parse_model(raw, run_checker=False)
    convert_to_float32(model)
    single: bytes = model.SerializeToString(deterministic=True)
    return SinglePrecision(single, raw, tuple(sorted(types)), _depth(inlined.graph.node))


def _depth(nodes: Iterable[onnx.NodeProto]) -> int:
    """The most rounding operators in a row."""
    depths: dict[str, int] = {}
    for node in nodes:
        own = 0 if node.op_type in _EXACT_OPERATORS else 1
        depth = own + max((depths.get(i, 0) for i in node.input), default=0)
        depths.update(dict.fromkeys(node.output, depth))
    return max(1, *depths.values())


def _ended_like(own: bytes, ended: onnx.ModelProto) -> bytes:
    """A file that ends as another does: with its outputs, which may be inner values, of whatever type they have in it,
    and with the transpositions that were put before them."""
    model = parse_model(own, run_checker=False)
    declared, inputs = {o.name for o in model.graph.output}, {n.output[0]: list(n.input) for n in model.graph.node}
    changed = [n for n in ended.graph.node if list(n.input) != inputs.get(n.output[0])]
    changed_values = {name for node in changed for name in node.output}
    nodes = [n for n in model.graph.node if changed_values.isdisjoint(n.output)]
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *changed])
    names = [o.name for o in ended.graph.output]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in declared)
    out: bytes = model.SerializeToString(deterministic=True)
    return out


_NUMPY_NAMES = {"float": "float32", "double": "float64"}


def _as_type(value: Array, type_name: str) -> Array:
    """An array in onnxruntime's type of an input, such as "tensor(float16)"."""
    name = type_name.removeprefix("tensor(").removesuffix(")")
    return value.astype(_NUMPY_NAMES.get(name, name))
