"""The model that a device serves predictions with."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, ModelError, shape_text
from fedprune.core.rng import keyed
from fedprune.core.text import quantity
from fedprune.model import step_contract as step
from fedprune.runtime.session import Runs, Session
from fedprune_device.data.labels import Terms, data_loss, hits, targets
from fedprune_device.data.stored_array import Inputs

Array = npt.NDArray[Any]

GRAPH = "inference.onnx"
WEIGHTS = "weights.safetensors"  # the graph's weights are external data in this file next to it


class Predictor:
    """A loaded inference graph with its weights: a folder, or `inference.onnx` in it next to `weights.safetensors`.

    `session` replaces that of onnxruntime; `cuda` lets that compute on an NVIDIA GPU. Raises `ModelError` if a file is
    missing, or onnxruntime refuses the graph with these weights.
    """

    def __init__(self, model: Path, *, threads: int = 1, session: Runs | None = None, cuda: bool = False) -> None:
        path = model / GRAPH if model.is_dir() else model
        if not path.is_file():
            raise ModelError(f"there is no model at {path}")
        self.session: Runs = session or Session(path, threads=threads, cuda=cuda)
        if step.X not in self.session.inputs or step.LOGITS not in self.session.outputs:
            raise ModelError(
                f"{path} is not an inference graph",
                expected=f"input {step.X}, output {step.LOGITS}",
                got=f"{', '.join(self.session.inputs)}; {', '.join(self.session.outputs)}",
            )
        kind, shape = self.session.inputs[step.X]
        self.input_shape = shape[1:]
        self._dtype = np.dtype(np.int64 if kind == "tensor(int64)" else np.float32)

    @property
    def takes_tokens(self) -> bool:
        return self._dtype.kind == "i"

    def predict(self, x: Inputs, batch: int = 64) -> npt.NDArray[np.float32]:
        """Logits of every sample [n, ...], `batch` per run; raises `DataError` if the samples don't fit the model."""
        shape = self.input_shape
        if x.ndim != len(shape) + 1 or any(
            isinstance(d, int) and d != g for d, g in zip(shape, x.shape[1:], strict=True)
        ):
            raise DataError("shape of the inputs", expected=shape_text("n", *shape), got=shape_text(*x.shape))
        if self._dtype.kind == "i" and x.dtype.kind not in "iu":
            raise DataError("type of the inputs", expected="whole numbers (token ids)", got=x.dtype)
        # An empty input still runs once: that is how the number of classes is known.
        starts = range(0, max(len(x), 1), batch)
        parts = [
            self.session.run({step.X: np.ascontiguousarray(x[s : s + batch], self._dtype)}, [step.LOGITS])[step.LOGITS]
            for s in starts
        ]
        return np.concatenate([np.asarray(p) for p in parts]).astype(np.float32, copy=False)

    def check(
        self,
        classes: int,
        x: Array | None = None,
        y: Array | None = None,
        *,
        loss: float | None = None,
        terms: Terms | None = None,
        kind: str = "cross_entropy",
        batch: int = 64,
    ) -> None:
        """The numeric check before a model may serve, on inputs `x`, or on fixed noise (the first token) without them.

        `loss` is the training graph's for these samples, with labels `y` and `terms` as the graph takes them. A model
        with batch-norm statistics has none: training and inference differ there by design. Raises `ModelError` if
        logits have another shape, are not finite, or contradict that loss.
        """
        if x is None:
            free = [d if isinstance(d, int) else 1 for d in self.input_shape]
            noise = keyed(0, "check").standard_normal((4, *free))
            x = np.zeros(noise.shape, np.int64) if self._dtype.kind == "i" else noise.astype(np.float32)
        logits = self.predict(x, batch)
        if logits.shape != (len(x), classes):
            raise ModelError("shape of the new model's logits", expected=(len(x), classes), got=logits.shape)
        if not np.isfinite(logits).all():
            raise ModelError("the new model's logits are not finite")
        if loss is not None and y is not None:
            mine = data_loss(kind, logits, y, terms)
            if not abs(mine - loss) <= 1e-3 * (1 + abs(loss)):
                raise ModelError(
                    "the new model's predictions contradict its training graph",
                    expected=f"a loss of {loss:.6g}",
                    got=f"{mine:.6g}",
                    hint="Inference graph, weights or training graph don't belong together.",
                )


def described(outputs: npt.NDArray[np.float32], loss: str, top: int, names: Sequence[str] = ()) -> Iterator[str]:
    """One line per sample of outputs [n, K]: the `top` likeliest classes or labels, or all predicted numbers."""
    for i, row in enumerate(likely(loss, outputs.astype(np.float64))):
        best = np.argsort(-row, kind="stable")[:top] if loss in ("cross_entropy", "bce") else range(len(row))
        shown = [f"{names[c] if c < len(names) else c} " if len(row) > 1 else "" for c in best]
        digits = ".4f" if loss in ("cross_entropy", "bce") else ".6g"
        yield f"{i}: " + ", ".join(f"{name}{row[c]:{digits}}" for name, c in zip(shown, best, strict=True))


def judged(outputs: npt.NDArray[np.float32], y: npt.NDArray[Any], loss: str) -> str:
    wanted = targets(y, loss, outputs.shape[1])
    right = hits(loss, outputs, wanted)
    if right is None:
        return f"loss {data_loss(loss, outputs, wanted):.6g} on {quantity(len(y), 'sample')}"
    return f"accuracy {np.mean(right):.4f} on {quantity(len(y), 'sample')}"


def likely(loss: str, z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Softmax over classes with cross-entropy, sigmoid per label with bce, else the numbers, [n, K]."""
    if loss == "cross_entropy":
        shares = np.exp(z - z.max(axis=1, keepdims=True))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))
    if loss == "bce":
        return np.asarray(np.exp(-np.logaddexp(0, -z)))
    return z
