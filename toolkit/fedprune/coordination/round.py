"""Sums the updates of one round, and closes it with the next global model.

`add_update` reads and checks an update once, as it arrives, and adds it to the *fold* (the running sum of a round's
updates). `close` limits all updates, since how much of each counts depends on the others, makes the sums those of
exactly the updates that count, and has the strategy make the next model of them. The server's worker (which the
simulator shares) and the Flower strategy run their rounds with this class; they differ in where updates come from and
where models go.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from fedprune.aggregation.fixed_point import MAX_WEIGHT
from fedprune.aggregation.fold import Fold
from fedprune.aggregation.update_sums import PartialSums
from fedprune.coordination.update_limits import LimitedUpdates, RoundUpdate, UpdateLimits
from fedprune.core.errors import BundleError, FedpruneError, StorageError, StrategyError
from fedprune.core.text import one_line
from fedprune.jobs.failure_kind import Failure, FailureKind, kind_of_update_error
from fedprune.model.selection import Tensors
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import NewMemory, Scene, Submodel, UpdateReport

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class RoundOutcome:
    """The end of a round.

    Attributes:
        model: The next global model; None where it stays as it is.
        memories: What the job remembers from now on; an empty collection is forgotten.
        updates: The updates that the sums were made of, with the shares of them that count.
        rejected: By device, why its update doesn't count, and the kind of failure.
        limited: By device, why much less of its update counts than it sent.
        reduced: Number of updates of which less counts than was sent, by however little.
    """

    model: Tensors | None = None
    memories: NewMemory = field(default_factory=dict)
    updates: tuple[RoundUpdate, ...] = ()
    rejected: Mapping[str, Failure] = field(default_factory=dict)
    limited: Mapping[str, str] = field(default_factory=dict)
    reduced: int = 0


@dataclass
class _CurrentUpdate:
    """The update that a strategy is reading: its device, empty for none, and whether it could be read."""

    device: str = ""
    is_read: bool = False


class _AtFaultError(Exception):
    """An update fails while the round closes. `is_read`: it could be read, so that the strategy failed on it."""

    def __init__(self, device: str, failure: Failure, *, is_read: bool) -> None:
        super().__init__(device, failure.reason)
        self.device = device
        self.failure = failure
        self.is_read = is_read


class Round:
    """Adds up the updates of one round, and closes it with the next global model.

    Attributes:
        included: The updates in the sums, by device.
    """

    def __init__(self, strategy: Strategy, scene: Scene, limits: UpdateLimits) -> None:
        self.scene = scene
        self.included: dict[str, RoundUpdate] = {}
        self._strategy = strategy
        self._limits = limits
        self._fold: Fold | None = None

    @property
    def fold(self) -> Fold:
        if self._fold is None:
            self._fold = self._strategy.aggregator.fold(self.scene, evidence=self._strategy.observes_movement)
        return self._fold

    def reset(self) -> None:
        self._fold, self.included = None, {}

    def add_update(self, update: RoundUpdate) -> Failure | None:
        """Read, check and add an update; returns why it can't count, or None if it was added or was in the sums
        already. Raises `StorageError` if it can't be read from the disk."""
        self._reset_if_full(update.weight)
        return self._check_and_add(update)

    def check(self, update: RoundUpdate) -> UpdateReport:
        """Read an update, and check it without adding it. Raises `FedpruneError` if it can't count."""
        report = update.report()
        if not update.is_checked:
            self.fold.check(report.trained.selection, report.trained.tensors)
        return report

    def merge(self, updates: Sequence[RoundUpdate], sums: Sequence[PartialSums]) -> None:
        """Add the sums that other processes have made of checked updates, none of which is in the sums yet. Raises
        `BundleError` if these are not the sums of these updates, of all tensors."""
        # All or nothing: sums of which a part was added could never be told from whole ones.
        weight = sum(u.weight for u in updates)
        self._reset_if_full(weight)
        if any(u.device in self.included for u in updates):
            raise BundleError("partial sums hold an update that is in the sums already")
        if not sums or sums[0].updates != len(updates) or sums[0].weight != weight:
            raise BundleError("partial sums", expected=f"{len(updates)} updates of weight {weight}")
        try:
            self.fold.add_partial_sums(sums)
        except FedpruneError:
            raise  # raised before anything is added
        except BaseException:
            self.reset()
            raise
        self.included |= {u.device: u for u in updates}

    def limit_updates(self, updates: Sequence[RoundUpdate]) -> LimitedUpdates:
        """Updates under the job's limits, as `close` applies them."""
        return self._limits.limit_updates(self.scene, updates)

    def close(
        self, updates: Sequence[RoundUpdate], rate: float = 1.0, participants: tuple[str, ...] = ()
    ) -> RoundOutcome:
        """Close the round with exactly these updates, sorted by device; those that aren't in the sums yet are added.

        `rate` is the share of the way to the sums' mean that the model moves, `participants` all devices of the round.
        An update that passed when it arrived may fail now: its limits depend on all updates, and a scorer reads it for
        the first time. It is left out with its reason, so that no update can keep a round from closing. The result
        depends only on the updates, whatever was added before and in whatever order. Raises `StrategyError` if no
        update is left because the strategy fails on several of them.
        """
        at_fault: dict[str, Failure] = {}
        by_strategy = 0
        while True:
            # Leaving one update out changes the medians, and with them what counts of the others: all limits are
            # applied again.
            limited = self.limit_updates([u for u in updates if u.device not in at_fault])
            failures = _outlier_failures(limited.rejected) or self._include_exactly(limited.updates)
            # Strategies that don't sum updates as they were trained have no mean to which these are near or far.
            if not failures and self._strategy.has_plain_reconstruction and self._strategy.aggregator.is_per_tensor:
                limited = self._limits.limit_distances(self.scene, limited, lambda: self.fold.close()[0])
                failures = self._include_exactly(limited.updates)
            if not failures:
                try:
                    result = self._apply_strategy(limited, replace(self.scene, participants=participants), rate)
                    break
                except _AtFaultError as error:
                    failures = {error.device: error.failure}
                    by_strategy += error.is_read
            at_fault |= failures
            # One update may be to blame for a strategy's error, but not all of them: the strategy is wrong, and the
            # job must stop.
            if by_strategy > 1 and len(at_fault) == len(updates):
                reason = next(reversed(at_fault.values())).reason
                raise StrategyError(f"the strategy fails on every update of round {self.scene.round}: {reason}")
        self.reset()
        rejected = dict(sorted((at_fault | dict(result.rejected)).items()))
        reasons = {device: reason for device, reason in limited.reasons.items() if device not in rejected}
        return replace(result, rejected=rejected, limited=reasons, reduced=len(limited.reduced - rejected.keys()))

    def close_sums(self, sums: Sequence[PartialSums], participants: tuple[str, ...]) -> RoundOutcome:
        """Close the round with the sums of masked updates, of which no single one is known. Raises `ProtocolError` or
        `BundleError` if they don't fit."""
        self.reset()
        scene = replace(self.scene, participants=participants)
        for addend in sums:
            self.fold.add_partial_sums([addend])
        closing = self._strategy.close(self.fold, scene, 1.0, lambda: iter(()))
        observations = self._strategy.learn(scene, self.fold, lambda: iter(()))
        self.reset()
        return RoundOutcome(closing.model, {**closing.memories, **observations})

    def lift_update(self, report: UpdateReport) -> Submodel:
        """A trained submodel in the channels of the global model, as the strategy maps them and the sums take it."""
        return self._strategy.reconstruct(report)

    def _reset_if_full(self, weight: int) -> None:
        """Start again where the sums can't hold more weight: weights are provisional until a round closes."""
        if self._fold is not None and self._fold.weight + weight > MAX_WEIGHT:
            self.reset()

    def _include_exactly(self, updates: Sequence[RoundUpdate]) -> dict[str, Failure]:
        """Make the sums those of exactly these updates; returns by device why one can't be added."""
        updates_by_device = {u.device: u for u in updates}
        if any(updates_by_device.get(device) != update for device, update in self.included.items()):
            self.reset()
        outcomes = {u.device: self._check_and_add(u) for u in updates}
        return {device: failure for device, failure in outcomes.items() if failure}

    def _check_and_add(self, update: RoundUpdate) -> Failure | None:
        if update.device in self.included:
            return None
        try:
            report = self.check(update)
            self._limits.note_lengths(update, report)
            self._strategy.aggregator.add(self.fold, report, self.lift_update(report))
        except Exception as error:  # noqa: BLE001 - what our checks overlooked must cost this update only
            return self._failure_of(update.device, error)
        self.included[update.device] = update
        return None

    def _apply_strategy(self, limited: LimitedUpdates, scene: Scene, rate: float) -> RoundOutcome:
        if not limited.updates:
            return RoundOutcome()
        strategy, rejected = self._strategy, dict[str, Failure]()

        def reports(current: _CurrentUpdate) -> Iterator[UpdateReport]:
            for update in limited.updates:
                if update.device not in rejected:
                    current.device, current.is_read = update.device, False
                    report = update.report()
                    current.is_read = True
                    yield report
            current.device = ""

        with self._blame_current_device() as folded:
            closing = strategy.close(
                self.fold, scene, rate, lambda: ((r, self.lift_update(r)) for r in reports(folded))
            )
        rejected |= _outlier_failures(closing.rejected)
        # After the rejections, so that a scorer learns only from what counts.
        with self._blame_current_device() as observed:
            observations = strategy.learn(scene, self.fold, lambda: reports(observed))
        # Rounds of exploration collect evidence; whether they also move the model, the strategy decides.
        if scene.round <= strategy.exploration_rounds and not strategy.exploration_updates_model:
            return RoundOutcome(None, {**limited.memories, **observations}, limited.updates, rejected)
        memories = {**limited.memories, **closing.memories, **observations}
        return RoundOutcome(closing.model, memories, limited.updates, rejected)

    @contextmanager
    def _blame_current_device(self) -> Iterator[_CurrentUpdate]:
        """Attribute an error to the device whose update the strategy has at that moment."""
        current = _CurrentUpdate()
        try:
            yield current
        except Exception as error:
            if not current.device:
                raise
            failure = self._failure_of(current.device, error)
            self.reset()
            raise _AtFaultError(current.device, failure, is_read=current.is_read) from error

    def _failure_of(self, device: str, error: Exception) -> Failure:
        """Why an update can't count; errors of this machine are raised again.

        After an unexpected error the sums start again: part of the update may be in them.
        """
        if isinstance(error, (StorageError, MemoryError)):
            raise error
        if isinstance(error, FedpruneError) and not isinstance(error, StrategyError):
            return Failure(kind_of_update_error(error), one_line(str(error)))
        _LOG.warning("update of %s in round %d: an unexpected error", device, self.scene.round, exc_info=error)
        self.reset()
        if isinstance(error, StrategyError):
            return Failure(FailureKind.OTHER, one_line(str(error)))
        reason = one_line(f"update can't be read ({type(error).__name__}: {error})")
        return Failure(FailureKind.MALFORMED, reason)


def _outlier_failures(rejected: Mapping[str, str]) -> dict[str, Failure]:
    return {device: Failure(FailureKind.OUTLIER, reason) for device, reason in rejected.items()}
