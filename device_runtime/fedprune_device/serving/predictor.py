"""The model that a device serves predictions with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, ModelError, shape_text
from fedprune.core.rng import keyed_generator
from fedprune.core.text import quantity
from fedprune.model import step_contract as step
from fedprune.model.lengths import fits_shape, free_axis, pad_to_bound, upper_shape, with_lengths
from fedprune.model.recipe import JUDGED_LABELS, MULTI_LABELS, labels_of
from fedprune.runtime.onnx_subgraph import metadata_of
from fedprune.runtime.precision_files import FLOAT32, served_files
from fedprune.runtime.session import OnnxSession, RunsGraph
from fedprune_device.data.labels import Targets, right_labels
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
        self._dtype = np.dtype(np.int64 if kind == "tensor(int64)" else np.float32)

    @property
    def takes_tokens(self) -> bool:
        return self._dtype.kind == "i"

    def predict(self, x: Inputs, batch: int = 64) -> npt.NDArray[np.float32]:
        """Logits of every sample [n, ...], `batch` per run; raises `DataError` if the samples don't fit the model.

        Samples of variable length are padded to the upper bound. A model that predicts every position gives as many
        positions as the samples have.
        """
        shape = self.input_shape
        if not fits_shape(x.shape[1:], shape):
            raise DataError("shape of the inputs", expected=shape_text("n", *shape), got=shape_text(*x.shape))
        if self._dtype.kind == "i" and x.dtype.kind not in "iu":
            raise DataError("type of the inputs", expected="whole numbers (token ids)", got=x.dtype)
        if not len(x):
            # Only a run tells the outputs' shape, and operators such as Flatten and Reshape refuse an empty batch.
            return self.predict(np.zeros((1, *x.shape[1:]), x.dtype), batch)[:0]
        starts = range(0, len(x), batch)
        outputs = [
            self.session.run({step.X: np.ascontiguousarray(pad_to_bound(chunk, shape))}, [step.LOGITS])[step.LOGITS]
            for chunk in (np.asarray(x[s : s + batch], self._dtype) for s in starts)
        ]
        logits = np.concatenate([np.asarray(p) for p in outputs]).astype(np.float32, copy=False)
        axis = free_axis(shape)
        is_positionwise = axis is not None and logits.ndim == 3 and logits.shape[2] == upper_shape(shape)[axis]
        return logits[:, :, : x.shape[axis + 1]] if is_positionwise and axis is not None else logits

    def check(
        self,
        classes: int,
        x: Array | None = None,
        loss: tuple[float, Callable[[npt.NDArray[np.float32]], float]] | None = None,
        *,
        batch: int = 64,
    ) -> None:
        """The numeric check before a model may serve, on inputs `x`, or on fixed noise (the first token) without them.

        `loss` is the training graph's for these samples, and what computes it of outputs. A model with batch-norm
        statistics has none: training and inference differ there by design. Raises `ModelError` if logits have another
        number of classes, are not finite, or contradict that loss.
        """
        if x is None:
            free = [d if isinstance(d, int) else 1 for d in upper_shape(self.input_shape)]
            noise = keyed_generator(0, "check").standard_normal((4, *free))
            x = np.zeros(noise.shape, np.int64) if self._dtype.kind == "i" else noise.astype(np.float32)
        logits = self.predict(x, batch)
        if logits.shape[:2] != (len(x), classes):
            raise ModelError("shape of the new model's logits", expected=(len(x), classes), got=logits.shape)
        if not np.isfinite(logits).all():
            raise ModelError("the new model's logits are not finite")
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


def prediction_lines(outputs: npt.NDArray[np.float32], loss: str, top: int, names: Sequence[str] = ()) -> Iterator[str]:
    """One line per sample of outputs [n, K]: the `top` likeliest classes or labels, or all predicted numbers.

    Of outputs for each position [n, K, ...] it is the share of positions of the `top` most frequent classes or labels,
    or the range of the numbers.
    """
    if outputs.ndim > 2:
        yield from _position_lines(outputs, loss, top, names)
        return
    digits = ".4f" if labels_of(loss) in JUDGED_LABELS else ".6g"
    for i, row in enumerate(ranked_outputs(outputs, loss, top)):
        labels = [f"{names[c] if c < len(names) else c} " if outputs.shape[1] > 1 else "" for c in row]
        yield f"{i}: " + ", ".join(f"{name}{v:{digits}}" for name, v in zip(labels, row.values(), strict=True))


def ranked_outputs(outputs: npt.NDArray[np.float32], loss: str, top: int) -> Iterator[dict[int, float]]:
    """Per sample of outputs [n, K] the `top` likeliest classes or labels with their shares, or all predicted numbers by
    their positions."""
    for row in likelihoods(loss, outputs.astype(np.float64)):
        best = np.argsort(-row, kind="stable")[:top] if labels_of(loss) in JUDGED_LABELS else range(len(row))
        yield {int(c): float(row[c]) for c in best}


def _position_lines(outputs: npt.NDArray[np.float32], loss: str, top: int, names: Sequence[str]) -> Iterator[str]:
    shape = f"{' x '.join(map(str, outputs.shape[2:]))} positions"
    for i, row in enumerate(outputs.reshape(*outputs.shape[:2], -1)):
        if labels_of(loss) not in JUDGED_LABELS:
            yield f"{i}: {len(row)} x {shape}, {row.min():.6g} to {row.max():.6g}"
            continue
        chosen = row.argmax(0) == np.arange(len(row))[:, None] if loss == "cross_entropy" else row > 0
        shares = chosen.mean(1)
        best = np.argsort(-shares, kind="stable")[:top]
        shares_text = (f"{names[c] if c < len(names) else c} {shares[c]:.1%}" for c in best if shares[c])
        yield f"{i}: {shape}, {', '.join(shares_text) or 'nothing'}"


def targets_of(outputs: npt.NDArray[np.float32], loss: str, ignored: int | None = None) -> Targets:
    """The labels that outputs [n, K, ...] are compared with."""
    return Targets(loss, outputs.shape[1], outputs.shape[2 if loss == "cross_entropy" else 1 :], ignored)


def quality_text(outputs: npt.NDArray[np.float32], y: npt.NDArray[Any], loss: str) -> str:
    """A text that says how well outputs [n, K, ...] predict labels; positions whose label is no class don't count."""
    if loss == "cross_entropy" and outputs.ndim > 2 and y.shape == (len(outputs), *outputs.shape[2:]):
        is_counted = (y >= 0) & (y < outputs.shape[1])
        share = np.mean((outputs.argmax(1) == y)[is_counted]) if is_counted.any() else 0.0
        return f"accuracy {share:.4f} on {quantity(int(is_counted.sum()), 'position')} of {quantity(len(y), 'sample')}"
    labels = np.asarray(targets_of(outputs, loss)(y))
    is_right = right_labels(loss, outputs, labels)
    if is_right is None:
        error = np.sqrt(np.mean((outputs.astype(np.float64) - labels) ** 2))
        return f"root of the mean squared error {error:.6g} on {quantity(len(y), 'sample')}"
    return f"accuracy {np.mean(is_right):.4f} on {quantity(len(y), 'sample')}"


def likelihoods(loss: str, z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Softmax over classes with cross-entropy, sigmoid per label with bce, else the numbers, [n, K]."""
    if loss == "cross_entropy":
        shares = np.exp(z - z.max(axis=1, keepdims=True))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))
    if labels_of(loss) == MULTI_LABELS:
        return np.asarray(np.exp(-np.logaddexp(0, -z)))
    return z
