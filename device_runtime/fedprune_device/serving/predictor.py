"""Loads an inference graph with its weights and predicts with it; checks a new model before a device serves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, ModelError, shape_text
from fedprune.core.rng import keyed_generator
from fedprune.model import step_contract as step
from fedprune.model.input_type import InputType
from fedprune.model.lengths import fits_shape, free_axis, pad_to_bound, upper_shape, with_lengths
from fedprune.runtime.onnx_subgraph import metadata_of
from fedprune.runtime.precision_files import FLOAT32, served_files
from fedprune.runtime.prediction_head import PredictionHead
from fedprune.runtime.session import OnnxSession, RunsGraph
from fedprune_device.data.stored_array import Inputs

Array = npt.NDArray[Any]

# The graph's weights are external data in the file next to it.
GRAPH, WEIGHTS = served_files(FLOAT32)


class Predictor:
    """A loaded inference graph with its weights: a folder, or `inference.onnx` in it next to `weights.safetensors`.

    `session` replaces that of onnxruntime; `cuda` lets that compute on an NVIDIA GPU. Raises `ModelError` if a file is
    missing, or onnxruntime refuses the graph with these weights.
    """

    def __init__(
        self, model: str | Path, *, threads: int = 1, session: RunsGraph | None = None, cuda: bool = False
    ) -> None:
        model = Path(model)
        path = model / GRAPH if model.is_dir() else model
        if not path.is_file():
            raise ModelError(f"there is no model at {path.absolute()}")
        self.session: RunsGraph = session or OnnxSession(path, threads=threads, cuda=cuda)
        if step.X not in self.session.inputs or step.LOGITS not in self.session.outputs:
            raise ModelError(
                f"{path} is not an inference graph",
                expected=f"input {step.X}, output {step.LOGITS}",
                got=f"{', '.join(self.session.inputs)}; {', '.join(self.session.outputs)}",
            )
        kind, shape = self.session.inputs[step.X]
        metadata = self.session.metadata if isinstance(self.session, OnnxSession) else metadata_of(path.read_bytes())
        self.input_shape = with_lengths(shape[1:], metadata, ModelError)
        self._head = PredictionHead.of(metadata)
        self.input_type = InputType.of(kind)

    def predict(self, x: Inputs, batch: int = 64) -> npt.NDArray[np.float32]:
        """Logits of every sample [n, ...], `batch` per run; raises `DataError` if the samples don't fit the model.

        Samples of variable length are padded to the upper bound. A model that predicts every position gives as many
        positions as the samples have.
        """
        shape = self.input_shape
        if not fits_shape(x.shape[1:], shape):
            raise DataError("shape of the inputs", expected=shape_text("n", *shape), got=shape_text(*x.shape))
        if not len(x):
            # Only a run tells the outputs' shape, and operators such as Flatten and Reshape refuse an empty batch.
            return self.predict(np.zeros((1, *x.shape[1:]), x.dtype), batch)[:0]
        starts = range(0, len(x), batch)
        outputs = [
            self.session.run({step.X: np.ascontiguousarray(pad_to_bound(chunk, shape))}, [step.LOGITS])[step.LOGITS]
            for chunk in (self.input_type.convert(np.asarray(x[s : s + batch])) for s in starts)
        ]
        logits = np.concatenate([np.asarray(p) for p in outputs]).astype(np.float32, copy=False)
        axis = free_axis(shape)
        is_positionwise = axis is not None and logits.ndim == 3 and logits.shape[2] == upper_shape(shape)[axis]
        return logits[:, :, : x.shape[axis + 1]] if is_positionwise and axis is not None else logits

    def file_outputs(self, logits: npt.NDArray[np.float32]) -> dict[str, Array]:
        """The outputs of the user's own file for logits [n, ...], by name, such as the label of its ArgMax; empty where
        the file ends in the logits. Raises `ModelError` if they can't be computed."""
        return {} if self._head is None or not len(logits) else self._head.outputs(logits)

    def check(
        self,
        classes: int,
        x: Array | None = None,
        loss: tuple[float, Callable[[npt.NDArray[np.float32]], float]] | None = None,
        *,
        batch: int = 64,
    ) -> None:
        """Check the numbers that a model predicts before it may serve.

        Raises `ModelError` if logits have another number of classes, are not finite or contradict the loss, or the
        outputs of the user's own file can't be computed from them.

        Args:
            x: Inputs; without them fixed noise, or the first token.
            loss: The training graph's loss for these inputs, and the function that computes it from logits. None for a
                model with batch-norm statistics: training and inference differ there by design.
        """
        if x is None:
            sizes = [size if isinstance(size, int) else 1 for size in upper_shape(self.input_shape)]
            noise = keyed_generator(0, "check").standard_normal((4, *sizes))
            x = np.zeros(noise.shape, self.input_type.dtype) if self.input_type.is_whole else noise.astype(np.float32)
        logits = self.predict(x, batch)
        if logits.shape[:2] != (len(x), classes):
            raise ModelError("shape of the new model's logits", expected=(len(x), classes), got=logits.shape)
        if not np.isfinite(logits).all():
            raise ModelError("the new model's logits are not finite")
        self.file_outputs(logits)
        if loss is not None:
            training_loss, compute_loss = loss
            inference_loss = compute_loss(logits)
            # Both graphs compute in float32, but add up in different orders, so that their losses differ a little.
            if not abs(inference_loss - training_loss) <= 1e-3 * (1 + abs(training_loss)):
                raise ModelError(
                    "the new model's predictions contradict its training graph",
                    expected=f"a loss of {training_loss:.6g}",
                    got=f"{inference_loss:.6g}",
                    hint="Inference graph, weights or training graph don't belong together.",
                )
