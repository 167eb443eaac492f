"""Writes predictions as text: the likeliest classes of each sample, and how many predictions are right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.text import quantity
from fedprune.model.features import JUDGED_LABELS, MULTI_LABELS, labels_of
from fedprune_device.data.dataset import Channels
from fedprune_device.data.labels import Targets, right_labels


def prediction_lines(outputs: npt.NDArray[np.float32], loss: str, top: int, names: Sequence[str] = ()) -> Iterator[str]:
    """One line per sample of outputs [n, K]: the `top` likeliest classes or labels, or all predicted numbers.

    If there are outputs for each position [n, K, ...], a line has the shares of the `top` most frequent classes or
    labels among the positions, or the range of the numbers.
    """
    if outputs.ndim > 2:
        yield from _position_lines(outputs, loss, top, names)
        return
    digits = ".4f" if labels_of(loss) in JUDGED_LABELS else ".6g"
    for i, row in enumerate(ranked_outputs(outputs, loss, top)):
        labels = [f"{names[c] if c < len(names) else c} " if outputs.shape[1] > 1 else "" for c in row]
        yield f"{i}: " + ", ".join(f"{name}{v:{digits}}" for name, v in zip(labels, row.values(), strict=True))


def forecast_names(outputs: npt.NDArray[np.float32], loss: str, channels: Channels | None) -> tuple[str, ...]:
    """The names of predicted numbers [n, K] by the columns that they are: one row of them, or K rows of one column.
    Empty for other outputs."""
    columns = channels.outputs if channels is not None and labels_of(loss) == "values" else ()
    if len(columns) == 1:
        return tuple(f"{columns[0]} +{step}" for step in range(1, outputs.shape[1] + 1))
    return columns if len(columns) == outputs.shape[1] else ()


def ranked_outputs(outputs: npt.NDArray[np.float32], loss: str, top: int) -> Iterator[dict[int, float]]:
    """Per sample of outputs [n, K] the `top` likeliest classes or labels with their shares, or all predicted numbers by
    their positions."""
    for row in likelihoods(loss, outputs.astype(np.float64)):
        best = np.argsort(-row, kind="stable")[:top] if labels_of(loss) in JUDGED_LABELS else range(len(row))
        yield {int(c): float(row[c]) for c in best}


def file_output_rows(file_outputs: Mapping[str, npt.NDArray[Any]], count: int) -> list[dict[str, Any]]:
    """Per sample the outputs of the user's own file, by name, a map as its `MapSummary`. Outputs that don't have an
    entry for each sample are left out."""
    rows = {n: v for n, v in file_outputs.items() if v.ndim and len(v) == count}
    return [{n: v[i].tolist() if v.ndim < 3 else map_summary(v[i]) for n, v in rows.items()} for i in range(count)]


@dataclass(frozen=True)
class MapSummary:
    """An output for each position of a sample: too many numbers for a line.

    Attributes:
        shape: Its sizes.
        counts: How often each whole number or text occurs in it; None for other numbers.
        bounds: The lowest and highest of other numbers; None for whole numbers and texts.
    """

    shape: tuple[int, ...]
    counts: Mapping[str, int] | None = None
    bounds: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def map_summary(values: npt.NDArray[Any]) -> MapSummary:
    """The summary of one sample's map of any shape."""
    if values.dtype.kind == "f":
        return MapSummary(values.shape, bounds=(float(values.min()), float(values.max())) if values.size else None)
    numbers, counts = np.unique(values, return_counts=True)
    return MapSummary(values.shape, dict(zip(map(str, numbers.tolist()), counts.tolist(), strict=True)))


def position_rows(outputs: npt.NDArray[np.float32], loss: str, top: int) -> Iterator[dict[int, int] | None]:
    """Per sample of outputs [n, K, ...] the `top` most frequent classes or labels with the number of their positions;
    None for outputs that are numbers."""
    for row in outputs.reshape(*outputs.shape[:2], -1):
        if labels_of(loss) not in JUDGED_LABELS:
            yield None
            continue
        chosen = row.argmax(0) == np.arange(len(row))[:, None] if loss == "cross_entropy" else row > 0
        counts = chosen.sum(1)
        best = np.argsort(-counts, kind="stable")[:top]
        yield {int(c): int(counts[c]) for c in best if counts[c]}


def _position_lines(outputs: npt.NDArray[np.float32], loss: str, top: int, names: Sequence[str]) -> Iterator[str]:
    shape, positions = f"{' x '.join(map(str, outputs.shape[2:]))} positions", prod(outputs.shape[2:])
    for i, counts in enumerate(position_rows(outputs, loss, top)):
        if counts is None:
            row = outputs[i]
            yield f"{i}: {len(row)} x {shape}, {row.min():.6g} to {row.max():.6g}"
            continue
        shares = (f"{names[c] if c < len(names) else c} {count / positions:.1%}" for c, count in counts.items())
        yield f"{i}: {shape}, {', '.join(shares) or 'nothing'}"


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
    """Softmax over classes with cross-entropy, sigmoid per label with bce, otherwise the numbers, [n, K]."""
    if loss == "cross_entropy":
        shares = np.exp(z - z.max(axis=1, keepdims=True))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))
    return np.asarray(np.exp(-np.logaddexp(0, -z))) if labels_of(loss) == MULTI_LABELS else z
