"""The worker of a server with aggregators: it closes rounds with their sums."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any, Protocol

from fedprune.aggregation import sums_file
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.limits import RoundUpdate
from fedprune.core.errors import BundleError, StorageError
from fedprune_server.aggregators.messages import away_too_long, first
from fedprune_server.aggregators.regional_job import LOST, UpdateLostError, blobs_of
from fedprune_server.executor.background import CommandExecutor, Work
from fedprune_server.executor.worker import Worker

log = logging.getLogger("fedprune.server")

_ATTEMPTS = 3

_LOOK_S = 1.0


class Regions(Protocol):
    """The aggregators of a job."""

    def ask(self, region: str, command: do.Measure) -> Future[Any]:
        """Send a command to an aggregator; its answer comes whenever that one is connected."""
        ...

    def fetch(self, path: str, sha256: str) -> bytes | None:
        """A blob of the aggregator of a region, which is waited for."""
        ...

    def gone(self, path: str) -> bool:
        """Whether an aggregator is away, and was waited for long enough."""
        ...

    def drop(self, number: int) -> None:
        """An answer is awaited no longer."""
        ...


class CollectingWorker:
    """Carries out commands as its worker does, and closes a round with the sums of aggregators.

    A round is closed once each aggregator has answered, so that no update that was counted is lost: one that is away is
    waited for, as long as `aggregator_patience_s` says. Where a strategy reads whole updates, they are fetched as they
    are read.

    Args:
        inner: The worker, perhaps with helpers.
    """

    def __init__(self, worker: Worker, inner: CommandExecutor, tier: Regions) -> None:
        self._worker, self._inner = worker, inner
        self._ask, self._fetch, self._gone, self._drop = tier.ask, tier.fetch, tier.gone, tier.drop
        self._number = secrets.randbits(48)  # an answer to an earlier process must not be taken for one to this
        worker.updates.bring = self._bring

    def expect(self, commands: Sequence[do.Command]) -> None:
        self._inner.expect(commands)

    def execute(self, command: Work) -> on.Event:
        match command:
            case do.Close():
                return self._close(command)
            case do.AddUp() if any(c.region for c in command.contributions):
                return self._add_up(command)
            case do.Measure() if any(c.region for c in command.contributions):
                return self._measure(command)
        return self._inner.execute(command)

    def _close(self, command: do.Close) -> on.Event:
        failed: dict[str, str] = {}
        while any(c.region for c in command.contributions):
            found = self._collect(command)
            if not found:
                break
            failed |= found
            command = replace(
                command, contributions=tuple(c for c in command.contributions if c.part.device not in failed)
            )
        event = self._inner.execute(command)
        if failed and isinstance(event, on.Closed):
            event = replace(event, rejected=dict(sorted((event.rejected | failed).items())))
        return event

    def _add_up(self, command: do.AddUp) -> on.Event:
        """Add up for a server further up, with the sums of this server's own aggregators."""
        limited = {c.part.device: self._worker.updates.update(c) for c in command.contributions}
        regional = [c for c in command.contributions if c.region]
        if failed := self._merge(command, regional, limited):
            return on.AddedUp(command.round, command.number, failed=failed)
        return self._inner.execute(command)

    def _measure(self, command: do.Measure) -> on.Event:
        here = tuple(c for c in command.contributions if not c.region)
        event = self._inner.execute(replace(command, contributions=here))
        if not isinstance(event, on.Measured):
            return event
        found = self._measured(command, [c for c in command.contributions if c.region])
        return replace(event, lengths=event.lengths | found.lengths, failed=event.failed | found.failed)

    def _collect(self, command: do.Close) -> dict[str, str]:
        """Bring sums of aggregators into the worker's round; returns by device why an update can't be added."""
        regional = [c for c in command.contributions if c.region]
        if not self._worker.strategy.aggregator.by_tensor or any(c.mask is not None for c in regional):
            return {}  # whole updates or single elements: they are fetched where they are read
        measured = self._measured(command, regional)
        if measured.failed:
            return measured.failed
        updates = self._worker.updates
        for found in regional:
            self._worker.limits.learn(updates.update(found), measured.lengths.get(found.part.device, {}))
        round_ = self._worker.round_of(command)
        limited = {u.device: u for u in round_.limited([updates.update(c) for c in command.contributions]).updates}
        counted = [c for c in regional if c.part.device in limited]
        counted = [replace(c, shares=limited[c.part.device].shares) for c in counted]
        return self._merge(command, counted, limited)

    def _merge(
        self, command: do.Close | do.AddUp, counted: Sequence[do.Contribution], limited: Mapping[str, RoundUpdate]
    ) -> dict[str, str]:
        sums: list[tuple[list[do.Contribution], bytes]] = []
        left, failed = list(counted), dict[str, str]()
        for _ in range(_ATTEMPTS):
            again: list[do.Contribution] = []
            for some, answer in self._answers(do.AddUp, command, left):
                failed |= answer.failed
                named = answer.sums if isinstance(answer, on.AddedUp) else ""
                raw = self._fetch(first(some[0].region), named) if named else None
                if raw is not None:
                    sums.append((some, raw))
                elif named:
                    again += some  # it has restarted meanwhile and deleted them
            left = again
        if failed or left:
            return failed | {c.part.device: f"its aggregator {c.region} has lost its sums" for c in left}
        round_ = self._worker.round_of(command)
        devices = {c.part.device for c in counted}
        if any(device in devices or limited.get(device) != update for device, update in round_.included.items()):
            round_.reset()
        try:
            for some, raw in sums:
                part = sums_file.decode(raw, self._worker.architecture)
                round_.merge([limited[c.part.device] for c in some], [part])
        except BundleError as error:
            raise StorageError(f"an aggregator's sums can't be used: {error}") from error
        return {}

    def _measured(self, command: do.Close | do.Measure, regional: Sequence[do.Contribution]) -> on.Measured:
        if not self._worker.limits.compare:
            return on.Measured(command.round, 0)
        lengths: dict[str, dict[str, float]] = {}
        failed: dict[str, str] = {}
        for _, answer in self._answers(do.Measure, command, regional):
            lengths |= answer.lengths if isinstance(answer, on.Measured) else {}
            failed |= answer.failed
        return on.Measured(command.round, 0, lengths, failed)

    def _answers(
        self, kind: type[do.Measure], command: do.Close | do.Measure, regional: Sequence[do.Contribution]
    ) -> list[tuple[list[do.Contribution], on.Measured | on.AddedUp]]:
        """Ask the aggregators at once; each answer with the updates that it is about."""
        by_region: dict[str, list[do.Contribution]] = {}
        for found in regional:
            by_region.setdefault(first(found.region), []).append(found)
        asked = []
        for region, some in sorted(by_region.items()):
            self._number += 1
            order = kind(command.round, self._number, command.model, dict(command.memory), tuple(some))
            asked.append((some, self._number, self._ask(region, order)))
        answers: list[tuple[list[do.Contribution], on.Measured | on.AddedUp]] = []
        for some, number, future in asked:
            region = first(some[0].region)
            answer = None
            while answer is None:
                done, _ = wait([future], _LOOK_S)
                if done:
                    answer = future.result()
                elif self._gone(region):
                    self._drop(number)
                    why = away_too_long(region)
                    log.error("%d updates of round %d don't count: %s", len(some), command.round, why)
                    answer = on.Measured(command.round, 0, failed={c.part.device: why for c in some})
            answers.append((some, answer))
        return answers

    def _bring(self, found: do.Contribution) -> None:
        """Fetch a whole update that is about to be read. Raises `UpdateLostError` if its aggregator doesn't have it any
        more, or was away for too long."""
        for digest in sorted(blobs_of(found)):
            if self._worker.store.has(digest):
                continue
            raw = self._fetch(found.region, digest)
            if raw is None:
                raise UpdateLostError(away_too_long(found.region) if self._gone(found.region) else LOST)
            self._worker.store.put(raw)
