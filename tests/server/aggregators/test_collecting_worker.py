"""A round whose updates aggregators check and add up has the bits of one that a single server adds up."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.state import Progress, Task
from fedprune_export.importing import import_onnx
from fedprune_export.pruning.model import Model
from fedprune_server.aggregators import regional_job
from fedprune_server.aggregators.channel import ParentLostError, UnansweredError
from fedprune_server.aggregators.collecting_worker import CollectingWorker
from fedprune_server.aggregators.messages import command_body, event_body, read_event, read_steered
from fedprune_server.aggregators.regional_job import LOST, FetchingWorker, blobs_of
from fedprune_server.executor.distributed import DistributedWorker
from fedprune_server.executor.worker import Worker
from fedprune_server.simulation.digits import digits_model
from support.fakes.stored_round import STRATEGIES, Helpers, round_of, worker

pytestmark = pytest.mark.soak

WHOLE = {
    "masks": {"strategy": "fiarse"},
    "masks that differ": {"strategy": "pr-fl"},
    "medians": {"options": {"robust": {"centre": "median"}}},
    "compared one by one": {"strategy": "fedobp"},
}
"""Strategies whose updates a parent reads whole, at the end of a round or before."""

PLACES = ("", "north", "north/valley", "coast")


class Place:
    """A server of a tier in memory: the root, or an aggregator with those below it."""

    def __init__(
        self, model: Model, folder: Path, settings: dict[str, Any], name: str = "", *, helped: bool = False
    ) -> None:
        self.worker: Worker = worker(model, folder / (name or "root"), settings)
        self.name = name
        self.state = State("")  # the copy that its parent keeps
        self.above: Place | None = None
        self.below: dict[str, Place] = {}
        self.asked: list[do.Measure] = []
        self.dropped: list[int] = []
        self.fetched: list[str] = []
        self.lose: Callable[[], bool] = lambda: False
        self.away = False
        crew = DistributedWorker(self.worker, Helpers(self.worker), block=500) if helped else self.worker
        collecting = CollectingWorker(self.worker, crew, self)
        self.crew = collecting if not name else FetchingWorker(self.worker, collecting, self._fetch_above, self.state)

    def put_below(self, place: Place) -> None:
        self.below[place.name.rpartition("/")[2]] = place
        place.above = self

    def gone(self, path: str) -> bool:
        return self.below[path.partition("/")[0]].away

    def drop(self, number: int) -> None:
        self.dropped.append(number)

    def ask(self, region: str, command: do.Measure) -> Future[Any]:
        place, answer = self.below[region], Future[Any]()
        place.asked.append(command)
        if not place.away:
            (read,) = read_steered(sent_down(command, region)).commands
            assert isinstance(read, do.Measure)
            event = place.crew.execute(read)
            answer.set_result(read_event(json.loads(json.dumps(event_body(event), default=vars))))
        return answer

    def fetch(self, path: str, digest: str) -> bytes | None:
        first, _, rest = path.partition("/")
        place = self.below[first]
        self.fetched.append(digest)
        if place.away:
            return None  # it was waited for
        if place.lose():
            place.worker.store.delete(digest)
        if place.worker.store.has(digest):
            return place.worker.store.read(digest)
        return place.fetch(rest, digest) if rest else None

    def _fetch_above(self, digest: str) -> bytes | None:
        above = self.above
        while above is not None:
            if above.worker.store.has(digest):
                return above.worker.store.read(digest)
            above = above.above
        return None


def sent_down(command: do.Command, region: str) -> dict[str, Any]:
    body = json.loads(json.dumps([command_body(command, region)], default=vars))
    return {"job": "t", "head": {}, "devices": {}, "tasks": {}, "commands": body, "whole": False}


class Tier:
    """A round of which each update lies at one place."""

    def __init__(
        self, model: Model, folder: Path, settings: dict[str, Any], *, helped: bool = False, **faults: str
    ) -> None:
        self.alone = worker(model, folder / "alone", settings)
        self.folds, self.close = round_of(self.alone, **faults)
        self.places = {name: Place(model, folder, settings, name, helped=helped and not name) for name in PLACES}
        self.places[""].put_below(self.places["north"])
        self.places["north"].put_below(self.places["north/valley"])
        self.places[""].put_below(self.places["coast"])
        found = self.close.contributions
        of = {c.part.device: PLACES[i % len(PLACES)] for i, c in enumerate(found)}
        for c in found:  # what a server has of an update: the offer that it made, and what came back
            copy(self.alone.store, self.places[of[c.part.device]].worker.store, blobs_of(c))
        copy(self.alone.store, self.places[""].worker.store, {self.close.model, found[0].basis.ranking})
        self.folds = [replace(f, contribution=self._placed(f.contribution, of)) for f in self.folds]
        self.close = replace(self.close, contributions=tuple(self._placed(c, of) for c in found))
        self.events = [self._fold(fold) for fold in self.folds]

    def _placed(self, found: do.Contribution, of: Mapping[str, str]) -> do.Contribution:
        return replace(found, region=of[found.part.device])

    def _fold(self, fold: do.Fold) -> on.Event:
        place = self.places[fold.contribution.region]
        if not place.name:
            return place.crew.execute(fold)
        (read,) = read_steered(sent_down(fold, place.name)).commands
        assert isinstance(read, do.Fold)
        part, state = read.contribution.part, place.state
        state.round = read.round
        state.tasks[part.device] = Task(part.attempt, part.widths, progress=Progress.STORED)
        return place.crew.execute(read)

    def end(self, contributions: Sequence[do.Contribution] | None = None) -> on.Event:
        close = self.close if contributions is None else replace(self.close, contributions=tuple(contributions))
        return self.places[""].crew.execute(close)

    def expected(self, contributions: Sequence[do.Contribution] | None = None) -> on.Event:
        close = self.close if contributions is None else replace(self.close, contributions=tuple(contributions))
        here = tuple(replace(c, region="") for c in close.contributions)
        return self.alone.execute(replace(close, contributions=here))


def copy(source: BlobStore, target: BlobStore, digests: set[str]) -> None:
    for digest in digests:
        target.put(source.read(digest))


@pytest.fixture(scope="module")
def model() -> Model:
    return import_onnx(digits_model(), "digits")


@pytest.mark.parametrize("settings", [*STRATEGIES.values(), *WHOLE.values()], ids=[*STRATEGIES, *WHOLE])
def test_the_sums_of_a_tier_have_the_bits_of_one_server(model: Model, tmp_path: Path, settings: dict[str, Any]) -> None:
    tier = Tier(model, tmp_path, settings)
    assert {type(event) for event in tier.events} == {on.Folded}
    found = tier.end()
    assert found == tier.expected()
    assert isinstance(found, on.Closed)
    assert found.model != tier.close.model


@pytest.mark.parametrize("settings", [STRATEGIES["plain"], STRATEGIES["transport"], WHOLE["masks"]])
def test_helpers_of_the_parent_add_up_its_own_updates(model: Model, tmp_path: Path, settings: dict[str, Any]) -> None:
    tier = Tier(model, tmp_path, settings, helped=True)
    assert tier.end() == tier.expected()


@pytest.mark.parametrize("settings", STRATEGIES.values(), ids=STRATEGIES)
def test_no_update_travels_where_sums_do(model: Model, tmp_path: Path, settings: dict[str, Any]) -> None:
    tier = Tier(model, tmp_path, settings)
    tier.end()
    assert not set(tier.places[""].fetched) & {c.weights for c in tier.close.contributions if c.region}


def test_a_server_that_has_just_started_asks_for_the_same_sums(model: Model, tmp_path: Path) -> None:
    tier = Tier(model, tmp_path, {"strategy": "fedprune"}, far="d1")
    found = tier.end()
    for place in tier.places.values():  # nothing of the round is in any memory
        place.worker._round = None
    assert tier.end() == found == tier.expected()
    assert isinstance(found, on.Closed)
    assert set(found.limited) == {"d1"}


def test_only_what_counts_at_the_end_is_in_the_sums(model: Model, tmp_path: Path) -> None:
    tier = Tier(model, tmp_path, {"strategy": "plain"})
    lighter = [replace(c, weight=1 + c.weight // 2) for c in tier.close.contributions[1:]]
    assert tier.end(lighter) == tier.expected(lighter)


def test_an_update_at_fault_costs_itself(model: Model, tmp_path: Path) -> None:
    tier = Tier(model, tmp_path, {"strategy": "plain"}, spoilt="d2")
    event = tier.events[2]
    assert isinstance(event, on.UpdateRejected)
    found, expected = tier.end(), tier.expected()  # a round may be told to close with it all the same
    assert isinstance(found, on.Closed)
    assert isinstance(expected, on.Closed)
    assert (found.model, set(found.rejected)) == (expected.model, {"d2"})


@pytest.mark.parametrize("times", [1, 2, 3])
def test_sums_that_a_restart_has_swept_are_made_anew(model: Model, tmp_path: Path, times: int) -> None:
    tier, left = Tier(model, tmp_path, {"strategy": "plain"}), [True] * times
    tier.places["coast"].lose = lambda: bool(left) and left.pop()
    found, expected = tier.end(), tier.expected()
    assert isinstance(found, on.Closed)
    if times < 3:
        assert found == expected
    else:
        lost = {c.part.device for c in tier.close.contributions if c.region == "coast"}
        assert found.rejected == dict.fromkeys(sorted(lost), "its aggregator coast has lost its sums")
        rest = tier.expected([c for c in tier.close.contributions if c.region != "coast"])
        assert isinstance(rest, on.Closed)
        assert found.model == rest.model


@pytest.mark.parametrize(
    "settings", [STRATEGIES["plain"], STRATEGIES["transport"], *WHOLE.values()], ids=["plain", "transport", *WHOLE]
)
def test_after_its_patience_a_round_closes_without_the_aggregator_that_is_away(
    model: Model, tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tier = Tier(model, tmp_path, settings)
    tier.places["coast"].away = True
    with caplog.at_level(logging.WARNING):
        found = tier.end()
    lost = {c.part.device for c in tier.close.contributions if c.region == "coast"}
    assert lost
    closed_without(tier, found, dict.fromkeys(lost, "its aggregator coast was away for too long"))
    assert "its aggregator coast was away for too long" in caplog.text


def test_an_aggregator_that_was_away_for_too_long_is_asked_no_more(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = Tier(model, tmp_path, {"strategy": "plain"})
    tier.places["coast"].away = True
    with caplog.at_level(logging.ERROR):
        tier.end()
    assert tier.places[""].dropped
    lost = [c for c in tier.close.contributions if c.region == "coast"]
    assert f"{len(lost)} updates of round 1 don't count" in caplog.text


def test_an_aggregator_rejects_an_update_that_no_server_has(model: Model, tmp_path: Path) -> None:
    tier = Tier(model, tmp_path, {"strategy": "plain"})
    fold = next(f for f in tier.folds if f.contribution.region == "coast")
    part = fold.contribution.part
    tier.places["coast"].worker.store.delete(fold.contribution.weights)
    assert tier._fold(fold) == on.UpdateRejected(part.device, fold.round, part.attempt, LOST)


class Asked:
    """An aggregator's way to its parent, which answers the first requests in its own way."""

    def __init__(self, place: Place, answers: Sequence[type[ParentLostError] | None]) -> None:
        self.requests = 0
        self._answers, self._fetch = answers, place._fetch_above
        place.crew = FetchingWorker(place.worker, place.worker, self, place.state)

    def __call__(self, digest: str) -> bytes | None:
        self.requests += 1
        if self.requests > len(self._answers):
            return self._fetch(digest)
        if (error := self._answers[self.requests - 1]) is not None:
            raise error("the parent")
        return None


def order_of(tier: Tier, region: str) -> do.Extract:
    """Has an aggregator without the round's model make a device's submodel."""
    place = tier.places[region]
    place.worker._shared.clear()
    found = next(c for c in tier.close.contributions if c.region == region)
    place.state.tasks[found.part.device] = Task(1, found.part.widths, progress=Progress.EXTRACTING)
    place.worker.store.delete(tier.close.model)
    return do.Extract(found.basis, found.part)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regional_job, "_AGAIN_S", 0.0)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("answers", [[None], [None, None], [UnansweredError] * 20, [UnansweredError, None]])
def test_an_aggregator_asks_again_for_a_blob_that_its_parent_should_have(
    model: Model, tmp_path: Path, answers: list[type[ParentLostError] | None]
) -> None:
    tier = Tier(model, tmp_path, {"strategy": "plain"})
    order, asked = order_of(tier, "coast"), Asked(tier.places["coast"], answers)
    assert isinstance(tier.places["coast"].crew.execute(order), on.Extracted)
    assert asked.requests == len(answers) + 1


@pytest.mark.usefixtures("hasty")
def test_a_part_fails_whose_blobs_its_aggregator_cannot_get(model: Model, tmp_path: Path) -> None:
    tier = Tier(model, tmp_path, {"strategy": "plain"})
    order, asked = order_of(tier, "coast"), Asked(tier.places["coast"], [None] * 100)
    place, part = tier.places["coast"], order.part
    reason = f"blob {tier.close.model} is on no server of the tier"
    refused = on.OfferRefused(part.device, 1, 1, reason)
    assert place.crew.execute(order) == refused
    assert asked.requests == 3
    assert place.crew.execute(order) == refused
    assert asked.requests == 4  # a region's parts together are not held up for longer
    fold = next(f for f in tier.folds if f.contribution.part == part)
    assert tier._fold(fold) == on.UpdateRejected(part.device, 1, 1, reason)
    measure = do.Measure(1, 5, tier.close.model, {}, (replace(fold.contribution, region=""),))
    assert place.crew.execute(measure) == on.Measured(1, 5, failed={part.device: reason})


@pytest.mark.usefixtures("hasty")
def test_an_order_that_is_outdated_meanwhile_is_left_undone(model: Model, tmp_path: Path) -> None:
    tier = Tier(model, tmp_path, {"strategy": "plain"})
    order, place = order_of(tier, "coast"), tier.places["coast"]
    asked = Asked(place, [UnansweredError])
    asked._fetch = lambda digest: place.state.tasks.clear()
    assert place.crew.execute(order) == on.Ticked()
    assert asked.requests == 2


def test_a_connection_that_ended_repeats_what_it_left_undone(model: Model, tmp_path: Path) -> None:
    tier = Tier(model, tmp_path, {"strategy": "plain"})
    order, asked = order_of(tier, "coast"), Asked(tier.places["coast"], [ParentLostError])
    assert tier.places["coast"].crew.execute(order) == on.Ticked()
    assert asked.requests == 1


@pytest.mark.parametrize("settings", [STRATEGIES["plain"], STRATEGIES["transport"], *WHOLE.values()])
@pytest.mark.parametrize("region", ["coast", "north/valley"])
def test_a_round_closes_without_an_update_that_no_server_has(
    model: Model, tmp_path: Path, settings: dict[str, Any], region: str
) -> None:
    tier = Tier(model, tmp_path, settings)
    gone = next(c for c in tier.close.contributions if c.region == region)
    for place in tier.places.values():  # restarted: the update is in no sums
        place.worker._round = None
        place.worker.limits.keep([])
        place.worker.store.delete(gone.weights)
    closed_without(tier, tier.end(), {gone.part.device: LOST})


def closed_without(tier: Tier, found: on.Event, rejected: Mapping[str, str]) -> None:
    """Check that a round's end rejects these devices, and has the bits of one without their updates."""
    assert isinstance(found, on.Closed)
    assert found.rejected == dict(sorted(rejected.items()))
    rest = tier.expected([c for c in tier.close.contributions if c.part.device not in rejected])
    assert isinstance(rest, on.Closed)
    assert (found.model, found.memory) == (rest.model, rest.memory)


@pytest.mark.parametrize("strategy", ["fedasync", "fedbuff", "fedfix"])
def test_updates_of_an_earlier_model_have_the_bits_of_one_server(model: Model, tmp_path: Path, strategy: str) -> None:
    tier = Tier(model, tmp_path, {"strategy": strategy})
    found = tier.close.contributions
    tier.close = replace(tier.close, contributions=found[:4], rate=0.75)
    first = tier.end()
    assert first == tier.expected()
    assert isinstance(first, on.Closed)
    stale = tuple(replace(c, weight=1 + c.weight // 3) for c in found[4:])  # they began before that round ended
    tier.close = replace(tier.close, round=2, model=first.model, memory=first.memory, contributions=stale, rate=0.5)
    second = tier.end()
    assert second == tier.expected()
    assert isinstance(second, on.Closed)
    assert second.model != first.model
    assert not second.rejected
