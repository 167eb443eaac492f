"""An aggregator that trusts no single update, around any other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.client_update import ClientUpdate, norm
from fedprune.aggregation.fixed_point import MAX_WEIGHT
from fedprune.aggregation.fold import Change, Fold
from fedprune.aggregation.robust import Centre, Direction, Slab, centre, clipped, rows_of, slabs, standing_out
from fedprune.core import validation
from fedprune.core.errors import BundleError, ConfigError, shown
from fedprune.core.settings import bounded, check_fields, one_of
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.aggregators import Aggregator
from fedprune.strategies.values import Closing, Report, Scene, Submodel

Reports = Callable[[], Iterator[tuple[Report, Submodel]]]

CHECKS = ("", "norm", "cosine", "both")

_BUDGET = 128 * 2**20
_SETTING = ("job", "options", "robust")


@dataclass(frozen=True)
class Robustness:
    """How updates are kept in bounds; by default not at all.

    Attributes:
        clip: Moves are shortened to this norm; 0 leaves them. `median`: to the median of all updates' norms (per
            root of the elements that they hold, so that narrow submodels aren't the measure of wide ones).
        centre: `mean`: the aggregator's own. `median` or `trimmed`: per coordinate over the devices that hold it,
            without weights, before the aggregator's rule, momentum and rate are applied. With the rule `fill`, devices
            that don't hold a coordinate vote for no change.
        trim: Share of devices that a trimmed mean leaves out at each end, below 0.5, rounded down: that many hostile
            ones are withstood.
        check: Updates that stand out are rejected, by their `norm` (per root of elements; too long), by their `cosine`
            with the sum of all others' directions (too low), or by `both`.
        tolerance: From how many deviations on an update stands out.
    """

    clip: float | str = 0.0
    centre: str = one_of("mean", ("mean", *get_args(Centre)))
    trim: float = bounded(0.25, 0, 0.5, below=True)
    check: str = one_of("", CHECKS)
    tolerance: float = bounded(3.5, 0.1, 1e6)

    def __post_init__(self) -> None:
        if self.clip != "median" and not validation.is_number(self.clip, 0, 1e9):
            raise ConfigError((*_SETTING, "clip"), expected="a norm from 0 up, or 'median'", got=shown(self.clip))
        check_fields(self, _SETTING)

    @property
    def together(self) -> bool:
        """Whether all updates must be there before one can count."""
        return bool(self.check) or self.clip == "median" or self.centre != "mean"

    @classmethod
    def from_dict(cls, body: object) -> Robustness:
        """Read what a job says. Raises `ConfigError` for an unknown key or a wrong value."""
        return cls(**validation.known(cls, body, _SETTING))


@dataclass(frozen=True)
class Robust(Aggregator):
    """Another aggregator, fed with updates that are clipped, checked, or put into one by their median.

    Where all updates must be there first, they are read again when a round closes: at most three times and, for
    medians, once per `budget` bytes of them. The fold is then filled again with what counts, also for evidence.

    Attributes:
        inner: The aggregator.
        settings: What is done.
        budget: Bytes of updates that a median looks at together.
    """

    inner: Aggregator
    settings: Robustness
    budget: int = _BUDGET

    @property
    def weighting(self) -> str:
        return self.inner.weighting

    def fold(self, scene: Scene, *, evidence: bool) -> Fold:
        fold = self.inner.fold(scene, evidence=evidence)
        fold.change = self._clipped(fold)
        return fold

    def add(self, fold: Fold, report: Report, lifted: Submodel) -> None:
        self.inner.add(fold, report, lifted)

    def close(self, fold: Fold, scene: Scene, rate: float, reports: Reports) -> Closing:
        if not self.settings.together or not fold.updates:
            return self.inner.close(fold, scene, rate, reports)
        rejected, limit = self._judge(fold, reports)
        change = _limited(fold, limit, self._clipped(fold))

        def counted() -> Iterator[tuple[Report, Submodel]]:
            return (pair for pair in reports() if pair[0].cut.turn.device not in rejected)

        fold.clear()
        if self.settings.centre == "mean":
            fold.change = change
            for report, lifted in counted():
                self.inner.add(fold, report, lifted)
            closing = self.inner.close(fold, scene, rate, counted)
        else:
            closing = self._close_centre(fold, scene, rate, counted, change)
        fold.change = self._clipped(fold)
        return replace(closing, rejected={**closing.rejected, **rejected})

    def _clipped(self, fold: Fold) -> Change | None:
        limit = self.settings.clip
        if not isinstance(limit, (int, float)) or not limit:
            return None
        return lambda addition: clipped(addition, fold.base, limit, fold.excluded)

    def _additions(self, fold: Fold, reports: Reports) -> Iterator[tuple[str, ClientUpdate]]:
        """The inner aggregator's contribution of every update, without adding it."""
        for report, lifted in reports():
            with fold.collecting() as additions:
                self.inner.add(fold, report, lifted)
            if len(additions) != 1:
                what = "an aggregator that adds updates once is needed for robust means"
                raise BundleError(what, got=len(additions))
            yield report.cut.turn.device, additions[0]

    def _judge(self, fold: Fold, reports: Reports) -> tuple[dict[str, str], float]:
        """Who is rejected, and the longest move per root of elements."""
        settings = self.settings
        rejected: dict[str, str] = {}
        direction = Direction(fold.architecture, fold.base, fold.excluded)
        lengths: dict[str, float] = {}
        wants_cosine = settings.check in ("cosine", "both")
        if not settings.check and settings.clip != "median":
            return {}, math.inf
        for device, addition in self._additions(fold, reports):
            size = max(1, addition.size(fold.excluded))
            lengths[device] = norm(addition.moves(fold.base, fold.excluded)) / math.sqrt(size)
            if wants_cosine:
                direction.add(addition)
        if settings.check in ("norm", "both"):
            rejected |= standing_out(lengths, settings.tolerance, low=False, what="length of the update")
        if wants_cosine:
            cosines = {d: direction.cosine(a) for d, a in self._additions(fold, reports)}
            found = standing_out(cosines, settings.tolerance, low=True, what="cosine with the others")
            rejected = found | rejected
        kept = [v for d, v in lengths.items() if d not in rejected]
        return rejected, float(np.median(kept)) if settings.clip == "median" else math.inf

    def _close_centre(self, fold: Fold, scene: Scene, rate: float, reports: Reports, change: Change) -> Closing:
        """Put the median or trimmed mean into the fold as its only update, and let the aggregator continue."""
        names, weights, steps = [], [], []
        for report, _ in reports():
            names.append(report.cut.turn.device)
            weights.append(report.weight)
            steps.append(report.steps)
        place = {name: i for i, name in enumerate(sorted(names))}
        specs = [t for t in fold.architecture.tensors if t.name not in fold.excluded]
        tensors: Tensors = {t.name: np.empty(t.shape, np.float32) for t in specs}
        held: dict[str, npt.NDArray[np.bool_]] = {t.name: np.empty(t.shape, np.bool_) for t in specs}
        whole = Selection.full(fold.architecture)
        for batch in slabs(specs, len(names), self.budget):
            values = [np.empty((len(names), *s.shape), np.float32) for s in batch]
            for device, addition in self._additions(fold, reports):
                passed = change(addition)
                for slab, value in zip(batch, values, strict=True):
                    value[place[device]] = rows_of(slab, passed, fold.base, whole)
            while batch:  # what was looked at makes room
                self._settle(batch.pop(0), values.pop(0), fold, tensors, held)
        fold.change = None
        active = {t.name: held[t.name] for t in specs if t.kind.trainable}
        fold.add(
            whole,
            tensors,
            min(sum(weights), MAX_WEIGHT),
            max(1, round(float(np.median(steps)))),
            mask=active,
        )
        closing = self.inner.close(fold, scene, rate, reports)
        model = dict(closing.model)
        for spec in specs:
            if not spec.kind.trainable:
                model[spec.name] = np.where(held[spec.name], model[spec.name], fold.base[spec.name])
        return replace(closing, model=model)

    def _settle(
        self,
        slab: Slab,
        values: npt.NDArray[np.float32],
        fold: Fold,
        tensors: Tensors,
        held: dict[str, npt.NDArray[np.bool_]],
    ) -> None:
        name = slab.spec.name
        at: Any = slice(slab.start, slab.stop) if slab.spec.axes else ...
        before = fold.base[name][at]
        anyone = None
        if slab.spec.kind.trainable and fold.rule != "coverage":
            # Who doesn't hold a coordinate votes, too: for no change, or for 0.
            anyone = np.isfinite(values).any(axis=0)
            for k in range(len(values)):
                one = values[k : k + 1]
                np.copyto(one, before if fold.rule == "fill" else np.float32(0), where=np.isinf(one))
        kind: Centre = "median" if self.settings.centre == "median" else "trimmed"
        middle = centre(values, kind, self.settings.trim)
        zero = fold.rule == "zero" and slab.spec.kind.trainable
        if anyone is None:
            anyone = np.isfinite(middle)
        held[name][at] = True if zero else anyone
        tensors[name][at] = middle if zero else np.where(anyone, middle, before)


def robust(aggregator: Aggregator, settings: object) -> Aggregator:
    """An aggregator as a job's option `robust` wants it; itself where the job has none.

    Raises `ConfigError` for an unknown key or a wrong value.

    Args:
        settings: The option's table, or None.
    """
    return aggregator if settings is None else Robust(aggregator, Robustness.from_dict(settings))


def _limited(fold: Fold, longest: float, clipped_to: Change | None) -> Change:
    """Clipping to a length per root of elements; an absolute one takes precedence."""

    def passing(addition: ClientUpdate) -> ClientUpdate:
        if clipped_to is not None:
            return clipped_to(addition)
        if math.isinf(longest):
            return addition
        size = max(1, addition.size(fold.excluded))
        return clipped(addition, fold.base, longest * math.sqrt(size), fold.excluded)

    return passing
