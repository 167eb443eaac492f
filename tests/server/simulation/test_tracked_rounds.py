"""Experiment trackers get the rows of a run, each once, whatever happens to them or to the run."""

import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fedprune.coordination import State, SynchronousCoordinator
from fedprune.coordination.commands import Finish
from fedprune.core import tensorfile
from fedprune.core.errors import ExitCode
from fedprune_export.importing import import_onnx
from fedprune_server import simulate
from fedprune_server.app import StartOptions, build_app
from fedprune_server.cli.simulate import main
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.config.track_targets import TrackTarget
from fedprune_server.monitoring import tracking
from fedprune_server.monitoring.job_tracker import JobTracker
from fedprune_server.observation.observer import RoundEnded
from fedprune_server.simulation.digits import digits_model
from fedprune_server.simulation.fleet.simulated_fleet import read_fleet_plan
from fedprune_server.simulation.results import run_folder
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.results.rows import round_rows
from fedprune_server.simulation.results.tracked_rounds import track_rounds
from fedprune_server.simulation.simulation import Simulation
from fedprune_server.trackers.tools.tensorboard import TensorBoardTracker
from fedprune_server.trackers.tracker import TrackedRun, Tracker
from support.fakes.fleet import Watcher
from support.fakes.shown_jobs import show
from support.fakes.stored_job import TO_THE_SECOND_ROUND
from support.fakes.tiny_job import ARCHITECTURE, JOB

FLEET: dict[str, Any] = {
    "job": {"rounds": 3, "recipe": {"lr": 0.05}},
    "model": {"path": "model.onnx"},
    "data": {"source": "digits", "most": 400, "server": 0.2},
    "devices": [{"name": "pi", "count": 2, "profile": "raspberry-pi-4b"}],
}


@dataclass
class ShownRun:
    """What a tracker shows of a run."""

    title: str
    parameters: Mapping[str, Any]
    rounds: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    ends: list[bool] = field(default_factory=list)


@dataclass
class FakeTool:
    """A tool whose runs are kept in memory; its trackers fail from `fails_at` on."""

    runs: dict[str, ShownRun] = field(default_factory=dict)
    fails_at: int = 1_000

    @property
    def only(self) -> ShownRun:
        [run] = self.runs.values()
        return run

    def module(self, name: str) -> ModuleType:
        tool, module = self, ModuleType(name)

        class FakeTracker(Tracker):
            __module__ = name

            def __init__(self, destination: str) -> None:
                self._destination = destination

            def open(self, run: TrackedRun, name: str, rounds: int) -> int:
                self._run = tool.runs.setdefault(name, ShownRun(run.title, run.parameters))
                return rounds

            def write(self, number: int, values: Mapping[str, float], at: float) -> None:
                if number >= tool.fails_at:
                    raise ConnectionError("no route to the tracker")
                self._run.rounds.append((number, dict(values)))

            def keep(self, folder: Path) -> None:
                self._run.files |= {path.relative_to(folder).as_posix() for path in folder.rglob("*")}

            def close(self, *, finished: bool) -> None:
                self._run.ends.append(finished)

        module.FakeTracker = FakeTracker  # type: ignore[attr-defined]
        return module


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> FakeTool:
    """`mlflow`, which is a fake."""
    tool, name = FakeTool(), "fedprune_server.trackers.tools.mlflow"
    monkeypatch.setitem(sys.modules, name, tool.module(name))
    return tool


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Tables whose files are in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(digits_model())
    return FLEET


def rows_in(folder: str) -> list[dict[str, Any]]:
    return round_rows(Record.load(Path(folder) / "metrics.json"))


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, (int, float))}


def test_a_tracker_has_the_rows_of_the_table_and_the_files(fleet: dict[str, Any], tool: FakeTool) -> None:
    run = simulate({**fleet, "simulation": {"track": "mlflow"}}, folder="out", title="mine")

    shown_run = tool.only
    rows = run.rows()
    assert [number for number, _ in shown_run.rounds] == [1, 2, 3]
    assert [values for _, values in shown_run.rounds] == [numbers(row) for row in rows]
    assert {"accuracy", "local_accuracy", "total_bytes_up", "time_s", "updates"} <= rows[0].keys()
    assert shown_run.title == "mine"
    assert shown_run.parameters["job.recipe.lr"] == 0.05
    assert (shown_run.parameters["data"], shown_run.parameters["fleet"]) == ("digits", 2)
    assert {"report.html", "model/model.onnx", "model/weights.safetensors"} <= shown_run.files
    assert shown_run.ends == [True]


def test_a_run_that_goes_on_writes_each_round_once(fleet: dict[str, Any], tool: FakeTool) -> None:
    def start(rounds: int) -> None:
        simulate(fleet, folder="out", rounds=rounds, track="mlflow")

    start(1)
    start(3)
    start(3)

    shown_run = tool.only
    assert [number for number, _ in shown_run.rounds] == [1, 2, 3]
    assert [values for _, values in shown_run.rounds] == list(map(numbers, rows_in("out")))
    assert shown_run.ends == [True] * 3


def test_a_tracker_that_fails_ends_no_run_and_catches_up(
    fleet: dict[str, Any], tool: FakeTool, caplog: pytest.LogCaptureFixture
) -> None:
    tool.fails_at = 2
    run = simulate(fleet, folder="out", track="mlflow")

    assert len(run.record.rounds) == 3
    assert [number for number, _ in tool.only.rounds] == [1]
    assert len([r for r in caplog.records if "no route" in r.getMessage()]) == 1

    tool.fails_at = 1_000
    simulate(fleet, folder="out", track="mlflow")
    assert [number for number, _ in tool.only.rounds] == [1, 2, 3]
    assert "report.html" in tool.only.files


def test_an_interrupted_run_writes_each_round_once(fleet: dict[str, Any], tool: FakeTool) -> None:
    plan = read_fleet_plan(Path("settings"), tables=fleet)

    def interrupt(simulation: Simulation) -> None:
        track(simulation)
        if len(simulation.state.history) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), track_rounds([TrackTarget("mlflow")], plan, Path("out")) as track:
        run_folder.simulate_in_folder(plan, Path("out"), interrupt)
    assert [number for number, _ in tool.only.rounds] == [1, 2]

    simulate(fleet, folder="out", track="mlflow")
    assert [number for number, _ in tool.only.rounds] == [1, 2, 3]
    assert tool.only.ends == [False, True]


def test_a_missing_library_is_named_with_its_extra(
    fleet: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "fedprune_server.trackers.tools.mlflow", raising=False)
    monkeypatch.setitem(sys.modules, "mlflow", None)

    assert main(["--demo", "--rounds", "1", "--out", "out", "--track", "mlflow"]) == ExitCode.MISSING_EXTRA

    assert "[mlflow]" in capsys.readouterr().err
    assert not (Path("out") / "run").exists()


def test_a_server_writes_rounds_with_its_bytes_and_continues(tmp_path: Path, tool: FakeTool) -> None:
    state = State(model="m" * 64)
    coordinator = SynchronousCoordinator(JOB, ARCHITECTURE, state)
    for i, event in enumerate(TO_THE_SECOND_ROUND):
        coordinator.handle(event, 1000.0 + i)
    model = import_onnx(digits_model(), "digits")
    store: Any = SimpleNamespace(read=lambda digest: tensorfile.encode(model.tensors))
    first, second = state.history[0], {**state.history[0], "round": 2, "at": state.history[0]["at"] + 50.0}

    def serve(history: list[dict[str, Any]], summary: dict[str, Any], *, finished: bool) -> None:
        tracker = JobTracker([TrackTarget("mlflow")], JOB, model, tmp_path, store, history)
        assert not tool.runs or history
        show(tracker, RoundEnded(summary, 700, 300), *([Finish("m" * 64)] if finished else []), at=summary["at"])
        tracker.close()

    serve([], first, finished=False)
    serve([first], second, finished=True)

    shown_run = tool.only
    assert [number for number, _ in shown_run.rounds] == [1, 2]
    assert [values["time_s"] for _, values in shown_run.rounds] == [0.0, 50.0]
    assert shown_run.rounds[0][1] == {
        "round": 1.0,
        "time_s": 0.0,
        "total_bytes_down": 700.0,
        "total_bytes_up": 300.0,
        "asked": 3.0,
        "updates": 3.0,
        "accuracy": 0.5,
        "mean_loss": pytest.approx(0.1),
    }
    assert shown_run.files == {"model", "model/model.onnx", "model/weights.safetensors"}
    assert shown_run.ends == [False, True]


def test_a_server_opens_its_trackers(tmp_path: Path, tool: FakeTool) -> None:
    (tmp_path / "model.onnx").write_bytes(digits_model())
    config = ServerConfig(job=JOB, model=str(tmp_path / "model.onnx"), state=tmp_path / "state", port=0, track="mlflow")
    stopping = threading.Event()
    stopper = Watcher(lambda _, what: stopping.set())
    with build_app(config, StartOptions(insecure=True), stopping, observers=[stopper]) as app:
        assert not tool.runs
        app.run()

    assert tool.only.title == JOB.name
    assert tool.only.ends == [False]
    assert (tmp_path / "state" / tracking.NOTE_FILE).is_file()


OTHERS_WARNINGS = pytest.mark.filterwarnings("ignore::Warning")
"""What a library warns of within itself is its own business."""


@OTHERS_WARNINGS
def test_event_files_are_what_tensorboard_reads(fleet: dict[str, Any]) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    simulate(fleet, folder="out", rounds=2, track="tensorboard:events")
    simulate(fleet, folder="out", track="tensorboard:events")

    [events_folder] = Path("events").iterdir()
    events = reader.EventAccumulator(str(events_folder), size_guidance={reader.SCALARS: 0}).Reload()
    rows = rows_in("out")
    assert set(events.Tags()["scalars"]) == numbers(rows[-1]).keys()
    for name in events.Tags()["scalars"]:
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (row["round"], pytest.approx(row[name])) for row in rows if row[name] is not None
        ]
    [text] = events.Tensors("configuration")
    assert b"| job.recipe.lr | 0.05 |" in text.tensor_proto.string_val[0]


@OTHERS_WARNINGS
def test_a_round_that_was_cut_off_is_shown_once(tmp_path: Path) -> None:
    """A kill can come after the writing and before the note."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = TrackedRun("mine", tmp_path)
    for noted, rounds in ((0, (1, 2)), (1, (2, 3))):
        tracker = TensorBoardTracker("")  # which nobody closes
        tracker.open(run, "0" * 32, noted)
        for number in rounds:
            tracker.write(number, {"loss": 1.0 / number}, 1000.0 + number)

    [events_folder] = (tmp_path / "tensorboard").iterdir()
    assert [e.step for e in reader.EventAccumulator(str(events_folder)).Reload().Scalars("loss")] == [1, 2, 3]


@OTHERS_WARNINGS
def test_mlflow_has_parameters_metrics_and_files(fleet: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)

    simulate(fleet, folder="out", rounds=2, track="mlflow")
    simulate(fleet, folder="out", track="mlflow")

    client = MlflowClient(f"sqlite:///{Path('out/mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name("fedprune")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("plain", "FINISHED")
    assert run.data.params["job.recipe.lr"] == "0.05"
    rows = rows_in("out")
    assert run.data.metrics.keys() == numbers(rows[-1]).keys()
    for name in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, name)
        assert [(m.step, m.value) for m in history] == [
            (row["round"], pytest.approx(row[name])) for row in rows if row[name] is not None
        ]
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"model", "report.html"}


@OTHERS_WARNINGS
def test_wandb_without_a_key_writes_a_run_to_upload_later(
    fleet: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of whoever runs the tests

    simulate(fleet, folder="out", track="wandb")
    wandb.teardown()  # the process that writes the log ends, as at the end of a command

    [log] = Path("out/wandb").glob("offline-run-*/run-*.wandb")
    raw = log.read_bytes()  # protobuf, whose texts are readable
    assert b"job.recipe.lr" in raw
    assert raw.count(b"local_accuracy") >= 3
