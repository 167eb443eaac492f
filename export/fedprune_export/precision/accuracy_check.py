"""Trials of a lower precision: its files, made as a board makes them, and how far its outputs are from float32's."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core import tensorfile
from fedprune.core.errors import ModelError
from fedprune.core.text import first_few
from fedprune.model.step_contract import LOGITS, X
from fedprune.runtime.agreement import MAX_COMPARED_SAMPLES, Agreement, compare_outputs
from fedprune.runtime.bundle import INFERENCE, WEIGHTS
from fedprune.runtime.precision import CALIBRATION_SAMPLES, RANGES, lowered_weights
from fedprune.runtime.precision_files import INT8, graph_file, weights_file
from fedprune.runtime.session import Array, OnnxSession
from fedprune_export.checks.labelled_data import LabelledData
from fedprune_export.importing.metadata import activation_ranges
from fedprune_export.ir.sample_inputs import sample_feeds
from fedprune_export.model_options import LOSS_OF_LABELS
from fedprune_export.precision.lowering import Lowered, lower
from fedprune_export.pruning.model import Model

# Samples per run: the outputs of all samples at once may not fit in memory.
_TRIAL_BATCH = 64
# Random samples, where none are given.
_RANDOM_SAMPLES = 64


@dataclass(frozen=True)
class PrecisionTrial:
    """A precision, its files, and how far its outputs are from float32's.

    Attributes:
        has_samples: Whether the outputs were compared on given samples; otherwise on random samples.
        warning: That ranges were measured on samples which show little, or on none; empty if they weren't.
    """

    lowered: Lowered
    files: Mapping[str, bytes]
    agreement: Agreement
    has_samples: bool
    warning: str = ""

    def describe(self) -> str:
        size = len(self.files[weights_file(self.lowered.precision)])
        stays = self.lowered.float32_nodes
        description = f"{size:,} bytes of weights; {self.agreement.describe()}"
        if not self.has_samples:
            description += " (random ones: --data gives real ones)"
        return description + (f"; in float32 stay {first_few(stays)}" if stays else "")

    def to_dict(self) -> dict[str, Any]:
        return {
            "precision": self.lowered.precision,
            "bytes": {n: len(raw) for n, raw in self.files.items()},
            "stays_float32": list(self.lowered.float32_nodes),
            "agreement": self.agreement.to_dict(),
            "random_samples": not self.has_samples,
            "warning": self.warning,
        }


class PrecisionTrials:
    """Tries one submodel at lower precisions.

    Args:
        files: The bundle's files: its inference graph and its weights are read.
        data: Samples to measure ranges on and to compare on.
    """

    def __init__(
        self, model: Model, widths: tuple[int, ...], files: Mapping[str, bytes], data: LabelledData | None
    ) -> None:
        self._model, self._widths, self._files, self._data = model, widths, files, data
        self._tensors = tensorfile.decode(files[WEIGHTS])
        self._ranges = activation_ranges(model.graph.metadata)
        self._x: Array = self._random_samples() if data is None else data.x
        self._reference: Array | None = None  # outputs in float32

    def run(self, precision: str) -> PrecisionTrial:
        """Lower the submodel as far as its outputs allow.

        With int8, if the outputs would be too far off, the first and the last layer stay in float32. If that is not
        enough, so do those layers that are furthest off by themselves. Raises `ModelError` if there is no such
        precision, int8 has neither samples to measure ranges on nor those of a quantised file, or nothing that it can
        be used for, or the outputs stay too far from float32's.
        """
        trial = self._run_with(precision)
        if precision == INT8 and trial.has_samples:
            trial = self._relax(trial)
        if trial.agreement.refusal and trial.has_samples:
            raise ModelError(
                f"{precision} is too far from float32: {trial.agreement.refusal}",
                hint=f"Leave {precision} out of --precision.",
            )
        return trial

    def _relax(self, trial: PrecisionTrial) -> PrecisionTrial:
        """Try again with layers in float32, until the outputs are close enough; returns the last trial."""
        layers = trial.lowered.layers
        end_layers = {layers[0], layers[-1]}
        inner_layers = set(layers) - end_layers
        # First and last layer are the usual culprits: they see the raw input and make the logits.
        if trial.agreement.refusal and inner_layers:
            trial = self._run_with(INT8, end_layers)
        if trial.agreement.refusal and len(inner_layers) > 1:
            # Each layer is judged with all others in float32, so that errors of two layers can't cancel out.
            error_alone = {n: self._run_with(INT8, set(layers) - {n}).agreement.error for n in inner_layers}
            worst = sorted(error_alone, key=error_alone.__getitem__, reverse=True)
            trial = self._run_with(INT8, end_layers.union(worst[: -(-len(worst) // 3)]))
        return trial

    def _run_with(self, precision: str, keep: Collection[str] = ()) -> PrecisionTrial:
        lowered = lower(self._model, self._widths, precision, keep=keep)
        files = lowered.files
        x = None if self._data is None else self._x
        with tempfile.TemporaryDirectory(prefix="fedprune-") as name:
            folder = Path(name)
            for file, raw in {**files, INFERENCE: self._files[INFERENCE], WEIGHTS: self._files[WEIGHTS]}.items():
                (folder / file).write_bytes(raw)
            if precision == INT8 and x is None:
                # Without samples, the ranges of the weights file that is there are kept.
                (folder / weights_file(precision)).write_bytes(tensorfile.encode({RANGES: self._file_ranges(lowered)}))
            files[weights_file(precision)] = lowered_weights(folder, precision, self._tensors, x)
            (folder / weights_file(precision)).write_bytes(files[weights_file(precision)])
            if self._reference is None:
                self._reference = self._outputs(folder / INFERENCE)
            outputs = self._outputs(folder / graph_file(precision))
        labels = "classes" if self._data is None else self._data.label_kind
        y = None if self._data is None else self._data.y[: len(outputs)]
        # How outputs are compared depends only on the kind of a loss's labels: one loss stands for each kind.
        comparison = compare_outputs(LOSS_OF_LABELS[labels], self._reference, outputs, y)
        warning = _ranges_warning(x) if precision == INT8 else ""
        return PrecisionTrial(lowered, files, comparison, has_samples=self._data is not None, warning=warning)

    def _random_samples(self) -> Array:
        """Random numbers: over the range of the input, if a quantised file says it."""
        x = sample_feeds(self._model.graph, _RANDOM_SAMPLES)[X]
        if X not in self._ranges or x.dtype != np.float32:
            return x
        return np.random.default_rng(0).uniform(*self._ranges[X], x.shape).astype(np.float32)

    def _file_ranges(self, lowered: Lowered) -> Array:
        """The ranges that the quantised file had which the model was read from, float32 [activations, 2].

        Raises `ModelError` if it wasn't, or it had none for some activation.
        """
        missing = [name for name in lowered.activations if name not in self._ranges]
        if missing:
            raise ModelError(
                "int8 must see what activations are like"
                + (f", and the quantised file says it of all but {first_few(missing)}" if self._ranges else ""),
                expected="samples like those that the board will see",
                hint="Give some with --data.",
            )
        return np.array([self._ranges[name] for name in lowered.activations], np.float32)

    def _outputs(self, graph: Path) -> Array:
        session = OnnxSession(graph, exact=True)
        x = self._x[:MAX_COMPARED_SAMPLES]
        return np.concatenate(
            [session.run({X: x[s : s + _TRIAL_BATCH]}, [LOGITS])[LOGITS] for s in range(0, len(x), _TRIAL_BATCH)]
        )


def _ranges_warning(x: Array | None) -> str:
    """A warning of the samples `x` on which ranges were measured, or that there were none; empty if they differ."""
    if x is None:
        return (
            "int8: ranges of activations are those of the quantised file that the model was read from; with --data "
            "they are measured, and outputs are compared on real samples"
        )
    count = min(len(x), CALIBRATION_SAMPLES)
    if (x[:count] != x[:1]).any():
        return ""
    subject = "a single sample" if count == 1 else f"{count} equal samples"
    return (
        f"int8: ranges of activations were measured on {subject}; give some hundred like those that the board will see"
    )
