"""Runs that are killed and started again, and their folders: one run's, one process's at a time."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import PlanError, StorageError
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.planning.profile_store import find_profile
from fedprune_server.simulation.digits import asset_bytes
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.device_table import with_link
from fedprune_server.simulation.fleet.virtual_device import StoredData
from fedprune_server.simulation.measure import ModelMeasure
from fedprune_server.simulation.network_model import Availability, DropOuts, Weather
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.results.run_folder import ScratchStore, is_run, simulate_in_folder
from fedprune_server.simulation.saved_run import SavePace
from fedprune_server.simulation.simulation import Simulation
from support.fakes.digits_simulation import (
    KINDS,
    KillError,
    assert_resumes,
    boards,
    digits,
    digits_experiment,
    digits_simulation,
    killed_after,
)
from support.paths import TESTS

NAMES = ("a", "b")
DATA = digits(NAMES)
FIRST_ROUND = 3
"""Calls of the progress of two devices at the end of the first round."""

SMALL: dict[str, Any] = {"density": 0.25, "recipe": Recipe(max_steps=1), "scorer": "ordered"}
JOB = Job(rounds=3, devices=2, **SMALL)
Build = Callable[..., Simulation]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return lambda folder="run", **settings: digits_simulation(tmp_path / folder, **{**SMALL, **settings})


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    fleet, samples = boards(NAMES, "raspberry-pi-5"), (DATA.x, DATA.y)
    return digits_experiment(fleet, title="yard", rounds=3, seed=0, evaluation=samples, **SMALL)


# Kills.


OFTEN = SavePace(interval_s=0.0, min_wait_ratio=0.0)
"""States are saved after every training."""


@pytest.mark.parametrize("calls", [pytest.param(2, marks=pytest.mark.soak), 5])
def test_a_killed_run_goes_on_to_the_same_model(build: Build, calls: int) -> None:
    assert_resumes(build, calls, rounds=3, recipe=Recipe(max_steps=3), scorer="magnitude")


@pytest.mark.parametrize("calls", [4, 8, *(pytest.param(n, marks=pytest.mark.soak) for n in (1, 5))])
def test_what_boards_keep_is_as_old_as_the_state_that_a_killed_run_goes_back_to(build: Build, calls: int) -> None:
    """Averages and personal tensors of trainings that a kill has undone must not be the start of the same trainings."""
    keeping = Recipe(max_steps=1, average=0.5, calibrate=True, personal=("fc.*", "*bias"))
    unkilled = assert_resumes(build, calls, recipe=keeping, rounds=3)
    assert any("accuracy_average" in d["metrics"] for d in unkilled.state.history[-1]["devices"].values())
    assert all(row.local == row.device_metrics["accuracy_average"] for row in unkilled.record().rounds)  # what serves


SCHEDULES: dict[str, dict[str, Any]] = {
    "one at a time": {"arrivals": 1, "mixing": "damped", "rate": 0.5, "staleness": {"decay": "polynomial", "a": 0.5}},
    "buffered": {"arrivals": 3},
    "windows, all kept": {"window_s": 0.2, "least": 2, "keep": True, "staleness": {"decay": "hinge", "a": 0.6, "b": 2}},
    "none too stale": {"arrivals": 2, "max_staleness": 1},
}


@pytest.mark.parametrize(
    "schedule",
    [pytest.param(s, id=n, marks=() if n.startswith("windows") else pytest.mark.soak) for n, s in SCHEDULES.items()],
)
def test_a_killed_asynchronous_run_goes_on_to_the_same_model(build: Build, schedule: dict[str, Any]) -> None:
    unkilled = assert_resumes(
        build,
        2,
        7,
        pace=OFTEN,
        fleet=boards((*KINDS, "raspberry-pi-5", "jetson-nano")),
        rounds=9,
        devices=2,
        deadline_s=20.0,
        scorer="magnitude",
        strategy="support.fakes.tiny_job:scheduled",
        options={"schedule": {"kind": "asynchronous", **schedule}},
        recipe=Recipe(max_steps=2),
        weather=Weather(0.5, 0.5, 1.0, 1.0, server_up_mb_s=1.0),
        dropouts=DropOuts(0.2, 2.0),
        availability=Availability(5.0, 0.6, 0.9),
    )
    assert [row["round"] for row in unkilled.state.history] == list(range(1, 10))


def test_a_killed_run_goes_on_where_few_work_at_a_time(build: Build) -> None:
    link = {"down_mb_s": 10.0, "up_mb_s": 10.0, "latency_s": 0.0}
    fleet = [replace(b, profile=with_link(b.profile, link)) for b in boards((*KINDS, "raspberry-pi-5"))]
    turns = {"in_flight": 2, "participation": 0.75}
    weather = {"dropouts": DropOuts(0.3, 5.0), "weather": Weather(links_sigma=0.5)}
    assert_resumes(build, 5, pace=OFTEN, fleet=fleet, rounds=4, deadline_s=60.0, **turns, **weather)


@pytest.mark.soak
def test_a_run_killed_at_any_write_or_deletion_of_a_blob_goes_on_to_the_same_model(build: Build) -> None:
    steps_left, step_count = -1, 0

    class Killing(ScratchStore):
        """Ends a run just before it touches its folder for the n-th time."""

        def put(self, data: bytes | memoryview) -> BlobRef:
            self._step()
            return super().put(data)

        def delete(self, sha256: str) -> None:
            self._step()
            super().delete(sha256)

        def _step(self) -> None:
            nonlocal steps_left, step_count
            steps_left, step_count = steps_left - 1, step_count + 1
            if steps_left == -1:
                raise KillError

    # Saved at the end of every round and never within one, however slow the disk is: the number of steps is the same.
    settings: dict[str, Any] = {"rounds": 3, "store": Killing, "pace": SavePace(math.inf, expensive_s=math.inf)}
    unkilled = build("whole", **settings)
    unkilled.run()
    names, last_step = set(unkilled.store.names()), step_count
    for number in range(0, last_step, 3):
        steps_left = number
        with pytest.raises(KillError):
            build(f"killed-{number}", **settings).run()
        steps_left = -1
        resumed = build(f"killed-{number}", **settings)
        resumed.run()
        assert resumed.state.history == unkilled.state.history
        assert {resumed.state.model} <= set(resumed.store.names()) <= names
    assert last_step > 10


SCRIPT = """
import os, signal, sys
sys.path[:0] = {tests!r}
from test_resumed_runs import run_harsh
left = int(sys.argv[2])
def progress(simulation):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
run_harsh(sys.argv[1], progress)
"""


def run_harsh(folder: str | Path, progress: Callable[[Simulation], None] | None = None, *, workers: int = 1) -> Record:
    """A run with everything in it that a kill could spoil."""
    experiment = digits_experiment(
        fleet=[replace(b, data=StoredData.of(lambda b=b: b.data)) for b in boards()],
        rounds=4,
        devices=2,
        participation=0.7,
        deadline_s=30.0,
        **SMALL,
        dropouts=DropOuts(0.3, 20.0),
        weather=Weather(0.3, 0.3, draws=5, server_up_mb_s=1.0),
        availability=Availability(100.0, 0.6, 0.9),
        measure=ModelMeasure(digits().x, digits().y, densities=(0.25,)),
        checkpoints=2,
        workers=workers,
    )
    return simulate_in_folder(experiment, Path(folder), progress)[0]


def test_a_run_on_several_processes_ends_as_one_on_one(tmp_path: Path) -> None:
    """They train, evaluate and add up in another order."""
    assert run_harsh(tmp_path / "two", workers=2) == run_harsh(tmp_path / "one")


def test_a_run_that_is_killed_outright_ends_as_one_that_is_not(tmp_path: Path) -> None:
    unkilled = run_harsh(tmp_path / "whole")
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=[str(TESTS), str(TESTS / "server/simulation")]))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for trainings in (2, 3):  # the second start is killed, too
        command = [sys.executable, str(script), str(tmp_path / "killed"), str(trainings)]
        done = subprocess.run(command, timeout=120, check=False, env={**os.environ, "TMPDIR": str(temporary)})
        assert done.returncode == -signal.SIGKILL
    assert not any(temporary.iterdir())  # what nobody would ever delete
    assert run_harsh(tmp_path / "killed") == unkilled
    entries = [sorted(path.name for path in (tmp_path / run / "run").iterdir()) for run in ("killed", "whole")]
    assert entries[0] == entries[1]
    for name in ("metrics.json", "run/config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    folders = [tmp_path / run / "run" / "checkpoints" for run in ("killed", "whole")]
    files = [sorted((str(f.relative_to(p)), f.read_bytes()) for f in p.rglob("*.*") if f.is_file()) for p in folders]
    assert files[0] == files[1]
    assert len(files[0]) == 4


def test_a_finished_round_is_written_once(build: Build, tmp_path: Path) -> None:
    """What a save writes does not grow with the rounds behind it."""
    sizes = {}
    for rounds in (2, 8):
        build(str(rounds), rounds=rounds).run()
        sizes[rounds] = [(tmp_path / str(rounds) / n).stat().st_size for n in ("simulation.json", "rounds.jsonl")]
    assert sizes[8][0] < sizes[2][0] * 1.05
    assert sizes[8][1] > 3 * sizes[2][1]
    lines = (tmp_path / "8" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)[0]["round"] for line in lines] == list(range(1, 9))


# Folders.


def test_a_folder_is_one_process_s_at_a_time(experiment: Experiment, tmp_path: Path) -> None:
    """Whoever comes second is told so and has changed nothing; whoever waited takes up what was done meanwhile."""
    alone, _ = simulate_in_folder(experiment, tmp_path / "alone")
    second = Simulation(experiment, BlobStore(tmp_path / "run" / "run" / "blobs"), folder=tmp_path / "run" / "run")
    attempts = []

    def meanwhile(_: Simulation) -> None:
        if not attempts:
            attempts.append(True)
            with pytest.raises(StorageError, match=str(tmp_path)):
                simulate_in_folder(experiment, tmp_path / "run")
            with pytest.raises(StorageError, match=str(tmp_path)):
                second.run()

    first, _ = simulate_in_folder(experiment, tmp_path / "run", meanwhile)
    assert attempts
    assert first.rounds == alone.rounds
    second.run(lambda _: pytest.fail("something was trained again"))
    assert second.record().rounds == alone.rounds


def test_a_finished_run_s_folder_goes_on_to_more_rounds(experiment: Experiment, tmp_path: Path) -> None:
    simulate_in_folder(experiment, tmp_path / "whole")
    for rounds in (1, JOB.rounds):
        simulate_in_folder(replace(experiment, job=replace(JOB, rounds=rounds)), tmp_path / "extended")
    for name in ("run/config.json", "metrics.json"):
        assert (tmp_path / "extended" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(StorageError, match=r"round 3: got job\.rounds = 2"):
        simulate_in_folder(replace(experiment, job=replace(JOB, rounds=2)), tmp_path / "extended")


@pytest.mark.parametrize("name", ["simulation.json", "rounds.jsonl", "config.json"])
def test_the_advice_for_a_damaged_state_leads_to_a_run(experiment: Experiment, tmp_path: Path, name: str) -> None:
    undamaged, _ = simulate_in_folder(experiment, tmp_path)
    (tmp_path / "run" / name).write_bytes(b"{")
    with pytest.raises(StorageError, match=f"delete {tmp_path / 'run'}"):
        simulate_in_folder(experiment, tmp_path)
    shutil.rmtree(tmp_path / "run")
    assert is_run(tmp_path)  # so that the command line takes it
    assert simulate_in_folder(experiment, tmp_path)[0].rounds == undamaged.rounds


def test_a_run_does_not_go_on_with_other_code(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "gentle.py"
    text = asset_bytes("my_strategy.py").decode()
    source.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    own_strategy = replace(
        experiment, job=Job(rounds=3, devices=2, density=0.25, strategy="gentle:energy", recipe=JOB.recipe)
    )
    with pytest.raises(KillError):
        simulate_in_folder(own_strategy, tmp_path / "run", killed_after(FIRST_ROUND))
    source.write_text(text.replace("lr_decay: float = 0.98", "lr_decay: float = 0.5"))
    with pytest.raises(StorageError, match="strategy_code"):
        simulate_in_folder(replace(own_strategy), tmp_path / "run")
    source.write_text(text)
    config = tmp_path / "run" / "run" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fedprune": "99"}))
    with pytest.raises(StorageError, match=r"fedprune .*99"):
        simulate_in_folder(replace(own_strategy), tmp_path / "run")
    state = tmp_path / "run" / "run" / "simulation.json"
    body = json.loads(state.read_text()) | {"format": "fedprune.simulation/9"}
    body["queue"].append([1.0, 999, "DeviceBorn", {"more_follow": False}])  # as that format named it
    state.write_text(json.dumps(body))
    with pytest.raises(StorageError, match=r"of another version: expected fedprune"):
        simulate_in_folder(replace(own_strategy), tmp_path / "run")


def slow_fleet(experiment: Experiment, windows: bool) -> Experiment:
    """Every second device misses its deadline again and again, while a window is open for long."""
    devices = boards(("a", "b", "c", "d"), "raspberry-pi-zero-2w")
    if windows:
        devices[::2] = [replace(d, profile=find_profile("raspberry-pi-5")) for d in devices[::2]]
    recipe, options = Recipe(max_steps=4), {"window_s": 20.0}
    job = Job(
        rounds=2, devices=2, strategy="fedfix", options=options, recipe=recipe, deadline_s=0.3, ignores_plans=True
    )
    return replace(experiment, job=job, devices=devices)


def test_slow_devices_do_not_end_an_asynchronous_simulation(experiment: Experiment) -> None:
    record, _ = simulate_in_folder(slow_fleet(experiment, windows=True))
    assert [set(r.local) for r in record.rounds] == [{"a", "c"}] * 2


def test_an_asynchronous_simulation_that_nobody_can_finish_ends(experiment: Experiment) -> None:
    with pytest.raises(PlanError, match="round 1"):
        simulate_in_folder(slow_fleet(experiment, windows=False))
