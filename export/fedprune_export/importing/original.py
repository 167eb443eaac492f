"""Compares what an import computes with what the user's file computes."""

from __future__ import annotations

from copy import copy

import numpy as np
import onnx

from fedprune.core.errors import ModelError, value_text
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing.raw_file import BatchLayout, RawFile, raw_session
from fedprune_export.ir.graph import Array, Graph, Port, read_dims
from fedprune_export.ir.rounding import round_array, round_weights

# Sizes that stand for free ones where a file is compared with what was written from it.
_TRIED_BATCH, _TRIED_SIZE = 2, 4


class Original:
    """A session of the user's file as it is: no function is inlined, no loop is unrolled, and the opset is its own.

    Raises `ModelError` if onnxruntime doesn't load the file.

    Args:
        inputs: The names of the file's inputs.
        outputs: The names of the outputs that are compared.
        row: A graph whose only input is the import's, and which computes the file's inputs, batch first, from it.
        layout: Where the file has its batch.
    """

    def __init__(self, raw: bytes, inputs: list[str], outputs: list[str], row: Graph, layout: BatchLayout) -> None:
        self._inputs, self._outputs, self._row_name = inputs, outputs, row.inputs[0].name
        self._raw, self._file = raw, RawFile(raw, outputs, layout)
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
        values = self._file.run({name: inputs.get(name, x) for name in self._inputs})
        if len(self._outputs) == 1:
            return values[self._outputs[0]]
        return np.concatenate([values[name].reshape(len(x), -1) for name in self._outputs], 1)

    def rerun(self, x: Array, random: np.random.Generator) -> Array:
        """The outputs once samples and weights have moved by a rounding."""
        moved = copy(self)
        moved._file = RawFile(round_weights(self._raw, random), self._outputs, self._file.layout)
        return moved.run(round_array(x, random))


def check_rewriting(raw: bytes, rewritten: onnx.ModelProto) -> None:
    """Compare the outputs of a user's file with those of a model that was written from it, on random numbers.

    Raises `ModelError` if they differ. Files that don't run at the sizes which are tried are not compared.
    """
    outputs = [o.name for o in rewritten.graph.output if o.type.HasField("tensor_type")]
    feeds = random_feeds(rewritten.graph, seed=0, below=1)
    try:
        expected = raw_session(raw, outputs).run(feeds, outputs)
    except ModelError:
        return
    values = raw_session(rewritten.SerializeToString(), outputs).run(feeds, outputs)
    for name, value in expected.items():
        is_float = value.dtype.kind == "f"
        if value.shape == values[name].shape and (
            np.allclose(value, values[name], 1e-4, 1e-5) if is_float else np.array_equal(value, values[name])
        ):
            continue
        raise ModelError(
            f"output {value_text(name)} differs once the file's functions and branches are written out",
            hint="Please report this with the model.",
        )


def random_feeds(graph: onnx.GraphProto, *, seed: int, below: int) -> dict[str, Array]:
    """Normal numbers, and whole ones from 0 to below a number, for the inputs of a file, at sizes that are tried."""
    tensors, generator = {t.name for t in graph.initializer}, np.random.default_rng(seed)
    values, feeds = [v for v in graph.input if v.name not in tensors], dict[str, Array]()
    # An axis of the same name has the same size, whichever input it is of.
    batches = {dim for v in values for dim in read_dims(v)[:1]}
    for value in values:
        shape = [
            d if isinstance(d, int) else _TRIED_SIZE if axis and (d is None or d not in batches) else _TRIED_BATCH
            for axis, d in enumerate(read_dims(value))
        ]
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        numbers: Array = generator.standard_normal(shape) if dtype.kind == "f" else generator.integers(0, below, shape)
        feeds[value.name] = numbers.astype(dtype)
    return feeds
