"""The option `robust`: an aggregator gets the median or trimmed mean of all updates, so that no single one decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.client_update import ClientUpdate
from fedprune.aggregation.fixed_point import MAX_WEIGHT
from fedprune.aggregation.fold import Fold
from fedprune.aggregation.robust import Centre, Slab, robust_mean, slabs, update_rows
from fedprune.core import validation
from fedprune.core.errors import BundleError
from fedprune.core.median import median
from fedprune.core.settings import bounded, check_fields
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.aggregators import Aggregator
from fedprune.strategies.values import RoundClosing, Scene, Submodel, UpdateReport

Reports = Callable[[], Iterator[tuple[UpdateReport, Submodel]]]

# Bytes of all devices' values of a slab. A smaller budget reads every update more often.
_BUDGET_BYTES = 128 * 2**20
_SETTING_PATH = ("job", "options", "robust")


@dataclass(frozen=True)
class Robustness:
    """The settings of the option `robust`.

    Attributes:
        centre: `median` or `trimmed`: per coordinate over the devices that hold it, without weights, before the
            aggregator's rule, momentum and rate are applied. With the rule `fill`, devices that don't hold a coordinate
            vote for no change.
        trim: Share of devices that a trimmed mean leaves out at each end, below 0.5. The number of devices is rounded
            down; a trimmed mean withstands that many hostile devices.
    """

    centre: Centre = "median"
    trim: float = bounded(0.25, 0, 0.5, below=True)

    def __post_init__(self) -> None:
        check_fields(self, _SETTING_PATH)

    @classmethod
    def from_dict(cls, body: object) -> Robustness:
        """Read a job's table. Raises `ConfigError` for an unknown key or a wrong value."""
        return cls(**validation.check_table(cls, body, _SETTING_PATH))


@dataclass(frozen=True)
class RobustAggregator(Aggregator):
    """Gives another aggregator (`inner`) a single update in place of all: their median or trimmed mean.

    Updates are read again when a round closes, once per `budget_bytes` bytes of them: a slab is a part of a tensor, for
    which the values of all devices are in memory at once. After that the fold (the running sum of the round's updates)
    holds only this one update; curvature scores (evidence) are made from it, too.
    """

    inner: Aggregator
    settings: Robustness
    budget_bytes: int = _BUDGET_BYTES

    @property
    def weighting(self) -> str:
        return self.inner.weighting

    def fold(self, scene: Scene, *, evidence: bool) -> Fold:
        return self.inner.fold(scene, evidence=evidence)

    def add(self, fold: Fold, report: UpdateReport, lifted: Submodel) -> None:
        self.inner.add(fold, report, lifted)

    def _additions(self, fold: Fold, reports: Reports) -> Iterator[tuple[str, ClientUpdate]]:
        """The inner aggregator's contribution of every update, without adding it."""
        for report, lifted in reports():
            with fold.collect_updates() as additions:
                self.inner.add(fold, report, lifted)
            # An aggregator that adds an update in several pieces would give a device several votes.
            if len(additions) != 1:
                what = "an aggregator that adds updates once is needed for robust means"
                raise BundleError(what, got=len(additions))
            yield report.cut.turn.device, additions[0]

    def close(self, fold: Fold, scene: Scene, rate: float, reports: Reports) -> RoundClosing:
        """Put the median or trimmed mean into the fold as its only update, and let the aggregator continue."""
        if not fold.updates:
            return self.inner.close(fold, scene, rate, reports)
        # The sums of single updates were needed for their checks alone.
        fold.clear()
        names, weights, steps = [], [], []
        for report, _ in reports():
            names.append(report.cut.turn.device)
            weights.append(report.weight)
            steps.append(report.steps)
        row_of_device = {name: i for i, name in enumerate(sorted(names))}
        specs = [t for t in fold.architecture.tensors if t.name not in fold.excluded]
        tensors: Tensors = {t.name: np.empty(t.shape, np.float32) for t in specs}
        is_trained: dict[str, npt.NDArray[np.bool_]] = {t.name: np.empty(t.shape, np.bool_) for t in specs}
        full_selection = Selection.full(fold.architecture)
        for slab_batch in slabs(specs, len(names), self.budget_bytes):
            values = [np.empty((len(names), *s.shape), np.float32) for s in slab_batch]
            for device, addition in self._additions(fold, reports):
                for slab, value in zip(slab_batch, values, strict=True):
                    value[row_of_device[device]] = update_rows(slab, addition, fold.base, full_selection)
            while slab_batch:  # values are freed as soon as they were used
                slab = slab_batch.pop(0)
                rows: Any = slice(slab.start, slab.stop) if slab.spec.axes else ...
                centre, trained_rows = self._slab_centre(slab, rows, values.pop(0), fold)
                tensors[slab.spec.name][rows], is_trained[slab.spec.name][rows] = centre, trained_rows
        active = {t.name: is_trained[t.name] for t in specs if t.kind.is_trainable}
        fold.add(full_selection, tensors, min(sum(weights), MAX_WEIGHT), max(1, round(median(steps))), mask=active)
        closing = self.inner.close(fold, scene, rate, reports)
        model = dict(closing.model)
        for spec in specs:
            if not spec.kind.is_trainable:
                model[spec.name] = np.where(is_trained[spec.name], model[spec.name], fold.base[spec.name])
        return replace(closing, model=model)

    def _slab_centre(self, slab: Slab, rows: Any, values: npt.NDArray[np.float32], fold: Fold) -> tuple[Any, Any]:
        """The median or trimmed mean of a slab's rows over all devices, and which coordinates count as trained."""
        model_values = fold.base[slab.spec.name][rows]
        has_holder = None
        if slab.spec.kind.is_trainable and fold.rule != "coverage":
            # A device that doesn't hold a coordinate votes, too: for no change, or for 0.
            has_holder = np.isfinite(values).any(axis=0)
            for k in range(len(values)):
                device_values = values[k : k + 1]
                np.copyto(
                    device_values, model_values if fold.rule == "fill" else np.float32(0), where=np.isinf(device_values)
                )
        middle = robust_mean(values, self.settings.centre, self.settings.trim)
        fills_with_zero = fold.rule == "zero" and slab.spec.kind.is_trainable
        if has_holder is None:
            has_holder = np.isfinite(middle)
        return (middle, True) if fills_with_zero else (np.where(has_holder, middle, model_values), has_holder)
