"""The model that a device serves predictions with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune import step
from fedprune.chance import keyed
from fedprune.errors import DataError, ModelError
from fedprune.session import Session

Array = npt.NDArray[Any]

GRAPH = "inference.onnx"
WEIGHTS = "weights.safetensors"
"""The graph's weights are external data in this file beside it."""


class Predictor:
    """A loaded inference graph with its weights.

    Args:
        model: The folder, or `inference.onnx` in it with `weights.safetensors` beside it.
        threads: Threads inside an operator.

    Raises:
        ModelError: A file is missing, or onnxruntime doesn't accept the graph with these weights.
    """

    def __init__(self, model: Path, *, threads: int = 1) -> None:
        path = model / GRAPH if model.is_dir() else model
        if not path.is_file():
            raise ModelError(f"there is no model at {path}")
        self._session = Session(path, threads=threads)
        if step.X not in self._session.inputs or step.LOGITS not in self._session.outputs:
            raise ModelError(
                f"{path} is not an inference graph",
                expected=f"input {step.X}, output {step.LOGITS}",
                got=f"{', '.join(self._session.inputs)}; {', '.join(self._session.outputs)}",
            )
        self.input_shape = self._session.inputs[step.X][1][1:]

    def predict(self, x: npt.NDArray[np.float32], batch: int = 64) -> npt.NDArray[np.float32]:
        """Logits of every sample.

        Args:
            x: Inputs, float32 [n, ...].
            batch: Samples per run.

        Raises:
            DataError: The inputs' shape isn't the model's.
            ModelError: An operator fails.
        """
        shape = self.input_shape
        if x.ndim != len(shape) + 1 or any(
            isinstance(d, int) and d != g for d, g in zip(shape, x.shape[1:], strict=True)
        ):
            raise DataError("shape of the inputs", expected=("n", *shape), got=x.shape)
        # An empty input still runs once: that is how the number of classes is known.
        starts = range(0, max(len(x), 1), batch)
        parts = [
            self._session.run({step.X: np.ascontiguousarray(x[s : s + batch], np.float32)}, [step.LOGITS])[step.LOGITS]
            for s in starts
        ]
        return np.concatenate(parts).astype(np.float32, copy=False)

    def accuracy(
        self,
        x: npt.NDArray[np.float32],
        y: npt.NDArray[np.int64],
        offset: npt.NDArray[np.float32] | None = None,
    ) -> float:
        """Share of correctly classified samples.

        Args:
            x: Inputs.
            y: Labels.
            offset: A vector [classes] that is added to the logits.

        Raises:
            DataError: There are no samples, or their shape isn't the model's.
        """
        if not len(y):
            raise DataError("accuracy of no samples")
        logits = self.predict(x)
        if offset is not None:
            logits = logits + offset
        return float(np.mean(np.argmax(logits, axis=1) == y))

    def check(
        self,
        classes: int,
        x: npt.NDArray[np.float32] | None = None,
        y: npt.NDArray[np.int64] | None = None,
        *,
        loss: float | None = None,
        terms: dict[str, Array] | None = None,
    ) -> None:
        """The numeric check before a model may serve.

        Args:
            classes: Entries that its logits must have.
            x: A few inputs; fixed noise without them.
            y: Their labels.
            loss: What the training graph says the loss of these samples is at the same weights. A model with
                batch-norm statistics has none: training and inference differ there by design.
            terms: Vectors of the loss, as `trainer.loss_terms` gives them.

        Raises:
            ModelError: Logits have another shape, are not finite, or contradict the training graph's loss.
        """
        if x is None:
            free = [d if isinstance(d, int) else 1 for d in self.input_shape]
            x = keyed(0, "check").standard_normal((4, *free)).astype(np.float32)
        logits = self.predict(x)
        if logits.shape != (len(x), classes):
            raise ModelError("shape of the new model's logits", expected=(len(x), classes), got=logits.shape)
        if not np.isfinite(logits).all():
            raise ModelError("the new model's logits are not finite")
        if loss is not None and y is not None:
            mine = cross_entropy(logits, y, terms or {})
            if not abs(mine - loss) <= 1e-3 * (1 + abs(loss)):
                raise ModelError(
                    "the new model's predictions contradict its training graph",
                    expected=f"a loss of {loss:.6g}",
                    got=f"{mine:.6g}",
                    hint="Inference graph, weights or training graph don't belong together.",
                )


def cross_entropy(logits: npt.NDArray[np.float32], y: npt.NDArray[np.int64], terms: dict[str, Array]) -> float:
    """The data loss of a training graph, computed from logits.

    Args:
        logits: [n, classes].
        y: Labels [n].
        terms: Offset, mask and weights of classes, by input name of the training graph.
    """
    z = logits.astype(np.float64)
    if step.LOGIT_OFFSET in terms:
        z = z + terms[step.LOGIT_OFFSET]
    if step.CLASS_MASK in terms:
        z = np.where(terms[step.CLASS_MASK] > 0, z, 0.0)
    z = z - z.max(axis=1, keepdims=True)
    losses = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(y)), y]
    weights = np.asarray(terms[step.CLASS_WEIGHT], np.float64)[y] if step.CLASS_WEIGHT in terms else None
    return float(np.average(losses, weights=weights))
