"""The sums of the round that is under way, and which updates are in them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fedprune.aggregation.checks import check_squares
from fedprune.aggregation.fixed_point import MAX_WEIGHT
from fedprune.aggregation.fold import Fold
from fedprune.aggregation.partial_sums import PartialSums
from fedprune.coordination import commands as do
from fedprune.core.errors import BundleError, FedpruneError, StorageError, StrategyError
from fedprune.core.text import one_line
from fedprune.strategies import Strategy
from fedprune.strategies.roles import Report
from fedprune_server.executor.limits import Limits
from fedprune_server.executor.reports import Reports

log = logging.getLogger("fedprune.server")


class RoundSums:
    """Adds updates, each once.

    Args:
        strategy: The job's.
        reports: Reads updates.
        limits: Learns how far updates have moved.
    """

    def __init__(self, strategy: Strategy, reports: Reports, limits: Limits) -> None:
        self.limits = limits
        self._strategy = strategy
        self._reports = reports
        self._fold: tuple[tuple[int, str], Fold, dict[str, do.Contribution]] | None = None

    def clear(self) -> None:
        """Forget all sums: they are made anew when they are asked for."""
        self._fold = None

    def at(self, command: do.Fold | do.Close) -> tuple[Fold, dict[str, do.Contribution]]:
        """The round's sums and which contributions are in them, by device; new sums for another round or model."""
        key = (command.round, command.model)
        if self._fold is None or self._fold[0] != key:
            self._fold = (key, self.empty(command), {})
        return self._fold[1], self._fold[2]

    def empty(self, command: do.Fold | do.Close) -> Fold:
        """Sums of nothing, for the round's model."""
        scene = self._reports.scene(command.round, command.model, command.memory)
        return self._strategy.aggregator.fold(scene, evidence=self._strategy.scorer.observes)

    def fault(self, command: do.Fold | do.Close, found: do.Contribution) -> str:
        """Add an update to a round's sums; why that can't be done, or nothing."""
        if isinstance(command, do.Fold):
            self._room(found.weight)
        try:
            self._include(command, found)
        except StorageError:
            raise
        except FedpruneError as error:
            return one_line(str(error))
        return ""

    def all_of(self, command: do.Close, counted: tuple[do.Contribution, ...]) -> dict[str, str]:
        """Make sums of exactly these contributions; by device, why one can't be added."""
        _, included = self.at(command)
        wanted = {c.part.device: c for c in counted}
        if any(wanted.get(name) != found for name, found in included.items()):
            self.clear()  # the sums hold something that must not count: add up anew
        reasons = {c.part.device: self.fault(command, c) for c in counted}
        return {device: reason for device, reason in reasons.items() if reason}

    def take(
        self, command: do.Fold | do.Close, counted: Sequence[do.Contribution], parts: Sequence[PartialSums]
    ) -> None:
        """Add what others have summed.

        Args:
            command: Says the round.
            counted: Of which updates; none of them may be in the sums yet.
            parts: Their sums, which together hold all tensors.

        Raises:
            BundleError: These are not the sums of these updates.
        """
        weight = sum(c.weight for c in counted)
        self._room(weight)
        fold, included = self.at(command)
        if any(c.part.device in included for c in counted):
            raise BundleError("partial sums hold an update that is in the sums already")
        if not parts or parts[0].updates != len(counted) or parts[0].weight != weight:
            raise BundleError("partial sums", expected=f"{len(counted)} updates of weight {weight}")
        try:
            fold.take(parts)
        except FedpruneError:
            raise  # it has looked before it added anything
        except BaseException:
            self.clear()  # a part may be in the sums: all is added up anew
            raise
        included |= {c.part.device: c for c in counted}

    def check(self, report: Report, fold: Fold) -> None:
        """Check an update.

        Raises:
            FedpruneError: It is at fault.
        """
        fold.check(report.trained.selection, report.trained.tensors)
        check_squares(report.trained.selection, report.squares, self._reports.reported(report))

    def _room(self, weight: int) -> None:
        """See that the sums have room.

        What an update counts for is settled when its round closes; until then it is a guess, and guesses may add up to
        more than sums hold. Those sums would be made anew in any case.
        """
        if self._fold is not None and self._fold[1].weight + weight > MAX_WEIGHT:
            self.clear()

    def _include(self, command: do.Fold | do.Close, found: do.Contribution) -> None:
        fold, included = self.at(command)
        device, round_ = found.part.device, command.round
        if device in included:
            return
        try:
            report = self._reports.report(found)
            self.check(report, fold)
            if isinstance(command, do.Fold):
                self.limits.learn(found, report)
            self._strategy.aggregator.add(fold, report, self._reports.lifted(report))
        except StrategyError:
            log.warning("update of %s in round %d: the strategy failed on it", device, round_, exc_info=True)
            self.clear()  # as below: who knows what it had added
            raise
        except (FedpruneError, MemoryError):
            raise
        except Exception as error:
            # A stranger's bytes: what our checks have overlooked must cost this update, not the server.
            log.warning("update of %s in round %d: our own code failed on it", device, round_, exc_info=True)
            self.clear()  # whatever got into the sums must not stay there; the others are added up anew
            raise BundleError(f"update can't be read ({type(error).__name__}: {error})") from error
        included[device] = found
