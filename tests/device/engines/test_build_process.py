"""A child process that makes an engine, seen from outside: another program stands in for it."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core.errors import EngineError, StorageError
from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune_device.engines.build_process import BuildProcess, BuildRequest
from fedprune_device.engines.engine_cache import EngineCache
from support.waiting import attempts, until

pytestmark = pytest.mark.board

Start = Callable[..., BuildProcess]


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    """One whose work folder is there, with answers in it."""
    cache = EngineCache(tmp_path / "engines")
    cache.work.mkdir(parents=True)
    np.save(cache.work / "answers.npy", np.ones(3))
    return cache


@pytest.fixture
def start(cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a child that says something and ends, or sleeps."""

    def start_child(output: str, clock: Callable[[], float] = time.monotonic, sleep: int = 0) -> BuildProcess:
        program, ended = tmp_path / "child", tmp_path / "ended"
        program.write_text(f"#!/bin/sh\ncat <<'.'\n{output}\n.\ntouch {ended}\nexec sleep {sleep}\n")
        program.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(program))
        making = BuildProcess(cache, BuildRequest(cache.work, EnginePlan().to_json()), 60.0, clock)
        until(ended.exists)
        return making

    return start_child


def result(making: BuildProcess) -> Any:
    """What the child comes to."""
    for _ in attempts("the child's end"):
        if (outcome := making.poll()) is not None:
            return outcome
    raise AssertionError


def test_one_that_takes_too_long_is_ended(start: Start) -> None:
    now = [0.0]
    making = start("", lambda: now[0], sleep=600)
    assert making.poll() is None
    now[0] = 60.0
    with pytest.raises(EngineError, match="at most 60 s"):
        making.poll()
    with pytest.raises(EngineError, match="SIGKILL"):
        making.poll()


def test_what_a_child_says_last_is_what_it_made(start: Start) -> None:
    outcome = result(start('Building: 1 of 2\n{"seconds": 1.5, "latency_s": 0.25}'))
    assert (outcome.seconds, outcome.latency_s) == (1.5, 0.25)
    np.testing.assert_array_equal(outcome.outputs, np.ones(3))


@pytest.mark.parametrize(
    "output",
    [
        *(json.dumps({"seconds": seconds, "latency_s": 1.0}) for seconds in (np.nan, -np.inf, "soon")),
        '{"seconds": 1.0}',
        "[1.0, 1.0]",
        "",
    ],
)
def test_times_that_are_none_are_not_believed(start: Start, output: str) -> None:
    with pytest.raises(EngineError):
        result(start(output))


def test_without_answers_there_is_nothing_to_check(start: Start, cache: EngineCache) -> None:
    (cache.work / "answers.npy").unlink()
    with pytest.raises(EngineError):
        result(start('{"seconds": 1.5, "latency_s": 0.25}'))


@pytest.mark.parametrize("name", ["order.json", "out.txt", "err.txt"])
def test_files_that_cant_be_opened_are_the_disks_fault(start: Start, cache: EngineCache, name: str) -> None:
    (cache.work / name).mkdir()
    with pytest.raises(StorageError, match=f"can't write {cache.work}"):
        start("")
