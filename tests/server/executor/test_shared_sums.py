"""A round whose updates helpers check and add up has the bits of one that the worker adds up alone."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as LateError
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedprune.aggregation.update_sums import PartialSums
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune_export.pruning.model import Model
from fedprune_server.executor import distributed, pool_tasks
from fedprune_server.executor.distributed import DistributedWorker
from fedprune_server.executor.pool_tasks import Task
from fedprune_server.executor.worker import Worker
from support.fakes.stored_round import STRATEGIES, Helpers, round_of, worker


def play_round(w: Worker | DistributedWorker, folds: list[do.FoldUpdate], close: do.Close) -> on.Event:
    w.expect(folds)
    events = [w.execute(fold) for fold in folds]
    good = [f.contribution for f, e in zip(folds, events, strict=True) if isinstance(e, on.Folded)]
    return w.execute(replace(close, contributions=tuple(good)))


@pytest.mark.parametrize("settings", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("batch", [4, 100])
def test_sums_of_helpers_have_the_workers_bits(
    model: Model, tmp_path: Path, settings: dict[str, Any], batch: int
) -> None:
    alone = worker(model, tmp_path, settings)
    folds, close = round_of(alone)
    expected = play_round(alone, folds, close)
    assert isinstance(expected, on.Closed)
    assert expected.model != close.model

    helpers = Helpers(alone)
    crew = DistributedWorker(worker(model, tmp_path, settings), helpers, block=500, batch=batch)
    assert play_round(crew, folds[::-1], close) == expected
    assert helpers.count(pool_tasks.check_update) == len(folds)
    assert helpers.count(pool_tasks.add_up_updates) >= 2


@pytest.mark.parametrize("settings", STRATEGIES.values(), ids=STRATEGIES)
def test_a_long_update_is_shortened_to_the_same_bits_by_whoever_adds_it(
    model: Model, tmp_path: Path, settings: dict[str, Any]
) -> None:
    alone = worker(model, tmp_path, settings)
    folds, close = round_of(alone, far="d4")
    expected = play_round(alone, folds, close)
    assert isinstance(expected, on.Closed)
    assert set(expected.limited) == {"d4"}
    assert expected.reduced >= 1
    unlimited = worker(model, tmp_path, {**settings, "move_limit": 0.0}).execute(close)
    assert isinstance(unlimited, on.Closed)
    assert unlimited.model != expected.model
    assert unlimited.reduced < expected.reduced
    assert worker(model, tmp_path, settings).execute(close) == expected, "a process that saw no update arrive"

    crew = DistributedWorker(worker(model, tmp_path, settings), Helpers(alone), block=500, batch=4)
    assert play_round(crew, folds[::-1], close) == expected


@pytest.mark.parametrize("task", [pool_tasks.check_update, pool_tasks.add_up_updates])
def test_what_helpers_fail_at_the_worker_does(model: Model, tmp_path: Path, task: Task) -> None:
    alone = worker(model, tmp_path, {"strategy": "plain"})
    folds, close = round_of(alone)
    expected = play_round(alone, folds, close)

    helpers = Helpers(alone)
    helpers.fails = lambda done, _: done is task and helpers.count(task) % 2 == 0
    crew = DistributedWorker(worker(model, tmp_path, {"strategy": "plain"}), helpers, block=500, batch=4)
    assert play_round(crew, folds, close) == expected


def _drop_an_update(result: Any) -> Any:
    return replace(result, updates=result.updates - 1) if isinstance(result, PartialSums) else result


def _cut_arrays(result: Any) -> Any:
    if not isinstance(result, PartialSums):
        return result
    return replace(result, arrays={k: v[:-1] if v.ndim else v for k, v in result.arrays.items()})


@pytest.mark.parametrize("alter", [_drop_an_update, _cut_arrays])
def test_sums_that_cannot_be_are_not_taken(
    model: Model, tmp_path: Path, alter: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    alone = worker(model, tmp_path, {"strategy": "plain"})
    folds, close = round_of(alone)
    expected = play_round(alone, folds, close)
    helpers = Helpers(alone)
    helpers.changed = alter
    crew = DistributedWorker(worker(model, tmp_path, {"strategy": "plain"}), helpers, block=500)
    with caplog.at_level(logging.WARNING):
        assert play_round(crew, folds, close) == expected


def test_an_update_at_fault_costs_itself(model: Model, tmp_path: Path) -> None:
    alone = worker(model, tmp_path, {"strategy": "plain"})
    folds, close = round_of(alone, spoilt="d3")
    rejected = alone.execute(folds[3])
    assert isinstance(rejected, on.UpdateRejected)
    expected = play_round(alone, folds, close)

    crew = DistributedWorker(worker(model, tmp_path, {"strategy": "plain"}), Helpers(alone), block=500, batch=4)
    crew.expect(folds)
    assert crew.execute(folds[3]) == rejected
    assert play_round(crew, folds, close) == expected
    # A round may also be told to close with it, after a restart for example.
    restarted = DistributedWorker(worker(model, tmp_path, {"strategy": "plain"}), Helpers(alone), block=500)
    assert restarted.execute(close) == worker(model, tmp_path, {"strategy": "plain"}).execute(close)


def test_only_what_counts_at_the_end_is_in_the_sums(model: Model, tmp_path: Path) -> None:
    """What was added up as it came may count less, or not at all, when the round closes."""
    alone = worker(model, tmp_path, {"strategy": "plain"})
    folds, close = round_of(alone)
    lighter = replace(close, contributions=tuple(replace(c, weight=1 + c.weight // 2) for c in close.contributions))
    for end in (lighter, replace(close, contributions=close.contributions[1:])):
        crew = DistributedWorker(worker(model, tmp_path, {"strategy": "plain"}), Helpers(alone), block=500, batch=3)
        crew.expect(folds)
        for fold in folds:
            crew.execute(fold)
        assert crew.execute(end) == worker(model, tmp_path, {"strategy": "plain"}).execute(end)


@pytest.mark.parametrize("settings", [{"strategy": "fiarse"}, {"options": {"robust": {"centre": "median"}}}])
def test_what_cannot_be_split_is_left_to_the_worker(model: Model, tmp_path: Path, settings: dict[str, Any]) -> None:
    alone = worker(model, tmp_path, settings)
    folds, close = round_of(alone)
    expected = play_round(alone, folds, close)
    helpers = Helpers(alone)
    assert (
        play_round(DistributedWorker(worker(model, tmp_path, settings), helpers, block=500), folds, close) == expected
    )
    assert not helpers.done


class Hanging(Helpers):
    """Helpers that never do some tasks; a clock advances by as much as they are waited for."""

    patience_s = 100.0

    def __init__(self, worker: Worker, never: Task) -> None:
        super().__init__(worker)
        self.now = 0.0
        self._never = never

    def submit(self, task: Task, *arguments: Any) -> Future[Any]:
        (argument,) = arguments
        return Never(self) if task is self._never else super().submit(task, argument)


class Never(Future[Any]):
    def __init__(self, helpers: Hanging) -> None:
        super().__init__()
        self._helpers = helpers

    def result(self, timeout: float | None = None) -> Any:
        assert timeout is not None
        self._helpers.now += timeout
        raise LateError


@pytest.mark.parametrize("never", [pool_tasks.add_up_updates, pool_tasks.check_update, pool_tasks.extract_submodels])
def test_helpers_that_hang_are_waited_for_once(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, never: Task
) -> None:
    alone = worker(model, tmp_path, STRATEGIES["plain"])
    folds, close = round_of(alone)
    expected = play_round(alone, folds, close)
    mine = worker(model, tmp_path, STRATEGIES["plain"])
    helpers = Hanging(mine, never)
    monkeypatch.setattr(distributed, "time", SimpleNamespace(monotonic=lambda: helpers.now))
    crew = DistributedWorker(mine, helpers, block=500, batch=4)
    orders = [do.Extract(f.contribution.basis, f.contribution.part) for f in folds]
    crew.expect(orders)
    assert [crew.execute(order) for order in orders] == [alone.execute(order) for order in orders]
    assert play_round(crew, folds, close) == expected
    assert helpers.now == 100.0
