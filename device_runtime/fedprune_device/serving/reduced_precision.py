"""Lowers the precision of the serving model: on the board, from every round's weights, and compared with float32.

The server sends graphs; weights and the ranges of activations are the board's own. A model that disagrees with float32,
or that can't be made on this board, doesn't serve; float32 serves instead, and the log says why.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from fedprune.core import atomic_file, tensorfile
from fedprune.core.disk import storage_errors
from fedprune.core.errors import FedpruneError, ModelError
from fedprune.core.median import median
from fedprune.model.recipe import Recipe
from fedprune.runtime.agreement import MAX_COMPARED_SAMPLES, Agreement, compare_outputs
from fedprune.runtime.precision import CALIBRATION_SAMPLES, lowered_weights, unpack_graphs
from fedprune.runtime.precision_files import (
    FASTEST,
    FLEET_PRECISIONS,
    FLOAT32,
    files_of,
    graph_file,
    served_files,
    weights_file,
)
from fedprune.wire.messages import Offer
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import Targets
from fedprune_device.serving.predictor import WEIGHTS, Predictor

_LOG = logging.getLogger("fedprune.device")

_TIMED_PREDICTIONS = 9  # timed predictions per precision; the first ones allocate memory and don't count
_MAX_TIME_SHARE = 0.9  # share of float32's time that a lowered model may take to be called faster: less may be chance


class ReducedPrecision:
    """Lowers staged models to a precision, one of `SERVE_CHOICES`."""

    def __init__(self, serve: str = FLOAT32, threads: int = 1) -> None:
        self._serve, self._threads = serve, threads

    def needed_graphs(self, offer: Offer) -> Offer:
        """The offer without graphs that this board has no use for: they are not pulled."""
        names = () if self._serve == FLOAT32 else FLEET_PRECISIONS if self._serve == FASTEST else (self._serve,)
        return replace(offer, lowered={p: ref for p, ref in (offer.lowered or {}).items() if p in names} or None)

    def lower_staged(
        self, folder: Path, packed_graphs: Mapping[str, bytes], data: LocalData, recipe: Recipe, targets: Targets
    ) -> str:
        """Lower a staged float32 model by the graphs `packed_graphs`; returns the precision that is to serve.

        The files of that precision are next to float32's; those of the others are deleted.
        """
        if not packed_graphs:
            return FLOAT32
        float32_model = Predictor(folder, threads=self._threads)
        check = PrecisionCheck(float32_model, data, recipe, targets)
        models = {p: self._try_precision(folder, p, packed, data, check) for p, packed in packed_graphs.items()}
        candidates = {FLOAT32: float32_model} | {p: model for p, model in models.items() if model is not None}
        chosen = self._choose_precision(candidates, data)
        for precision in candidates.keys() - {FLOAT32, chosen}:
            clear_precision(folder, precision)
        return chosen

    def _try_precision(
        self, folder: Path, precision: str, packed: bytes, data: LocalData, check: PrecisionCheck
    ) -> Predictor | None:
        """Write a precision's files into the folder; returns their model, or None if it may not serve."""
        try:
            for name, raw in unpack_graphs(packed, precision).items():
                atomic_file.write_atomically(folder / name, raw, private=True)
            weights = tensorfile.load_tensors(folder / WEIGHTS)
            model, comparison = lower_model(folder, precision, weights, data, check, self._threads)
        except FedpruneError as error:  # a failure here must not lose a finished round
            _LOG.warning("the model doesn't serve with %s: %s", precision, error)
            clear_precision(folder, precision)
            return None
        _LOG.info("the model may serve with %s: %s", precision, comparison.describe())
        clear_precision(folder, precision, including_served=False)
        return model

    def _choose_precision(self, candidates: Mapping[str, Predictor], data: LocalData) -> str:
        """The precision that serves: the requested one, or that which predicts one sample fastest."""
        if self._serve != FASTEST:
            return self._serve if self._serve in candidates else FLOAT32
        times: dict[str, list[float]] = {p: [] for p in candidates}
        for _ in range(_TIMED_PREDICTIONS):  # interleaved, so that other load on the board affects all alike
            for precision, model in candidates.items():
                began = time.perf_counter()
                model.predict(data.x_train[:1])
                times[precision].append(time.perf_counter() - began)
        medians = {p: median(t[1:]) for p, t in times.items()}
        _LOG.info("a prediction takes %s", ", ".join(f"{1000 * s:.3g} ms with {p}" for p, s in medians.items()))
        best = min(medians, key=medians.__getitem__)
        return best if medians[best] < _MAX_TIME_SHARE * medians[FLOAT32] else FLOAT32


class PrecisionCheck:
    """Compares models with float32's predictions of validation samples or, without any, of training samples."""

    def __init__(self, float32_model: Predictor, data: LocalData, recipe: Recipe, targets: Targets) -> None:
        has_validation = len(data.y_val) > 0
        self._x = (data.x_val if has_validation else data.x_train)[:MAX_COMPARED_SAMPLES]
        self._y = np.asarray(targets((data.y_val if has_validation else data.y_train)[:MAX_COMPARED_SAMPLES]))
        self._loss, self._at_once = recipe.loss, recipe.micro_batch
        self._reference = float32_model.predict(self._x, self._at_once)

    def compare(self, model: Predictor) -> Agreement:
        """The agreement of a model's predictions with float32's."""
        return compare_outputs(self._loss, self._reference, model.predict(self._x, self._at_once), self._y)


def lower_model(
    folder: Path, precision: str, tensors: Mapping[str, Any], data: LocalData, check: PrecisionCheck, threads: int = 1
) -> tuple[Predictor, Agreement]:
    """Write float32's `tensors` at a precision next to its graphs; returns their model, and how it compares.

    Raises `ModelError` if its predictions differ too much from float32's.
    """
    raw = lowered_weights(folder, precision, tensors, data.x_train[:CALIBRATION_SAMPLES])
    atomic_file.write_atomically(folder / weights_file(precision), raw, private=True)
    model = Predictor(folder / graph_file(precision), threads=threads)
    comparison = check.compare(model)
    if comparison.refusal:
        raise ModelError(comparison.refusal)
    return model, comparison


def clear_precision(folder: Path, precision: str, *, including_served: bool = True) -> None:
    with storage_errors(f"can't write {folder}"):
        for name in files_of(precision):
            if (including_served or name not in served_files(precision)) and (folder / name).exists():
                (folder / name).unlink()
