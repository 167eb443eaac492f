"""A server's state folder: what a job may begin with."""

import numpy as np
import pytest

from fedprune.coordination import Phase, SynchronousCoordinator
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError, DataError
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.planning import profile_store
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.engine.state_folder import StateFolder
from fedprune_server.simulation.digits import digits_model, load_digits
from support.fakes.opened_job import open_job


@pytest.fixture
def config(tmp_path):
    """A configuration whose calibration file holds what it is given."""
    (tmp_path / "model.onnx").write_bytes(digits_model())

    def write(**arrays):
        np.savez(tmp_path / "calibration.npz", **arrays)
        return ServerConfig(model=str(tmp_path / "model.onnx"), calibration=str(tmp_path / "calibration.npz"))

    return write


def test_calibration_samples_need_no_labels(config, tmp_path):
    with StateFolder(tmp_path / "state") as folder:
        assert open_job(folder, config(x=load_digits()[0][:20])).state.model


def test_calibration_samples_of_another_shape_are_named(config, tmp_path):
    with StateFolder(tmp_path / "state") as folder, pytest.raises(DataError, match=r"calibration\.npz: shape"):
        open_job(folder, config(x=load_digits()[0][:20, :, :4]))


PI = profile_store.find_profile("raspberry-pi-5").to_dict()


def play(opened, folder, commands, until=()):
    """Carry out commands, as a server and a device that sends back what it got would, until one of some kind.

    That may also be a function that knows it when it sees it.
    """
    stops = until if callable(until) and not isinstance(until, type) else lambda c: isinstance(c, until)
    coordinator = SynchronousCoordinator(opened.job, opened.model.architecture, opened.state)
    todo = list(coordinator.resume(0.0) if commands is None else commands(coordinator))
    while todo:
        command, event = todo.pop(0), None
        if stops(command):
            break
        if isinstance(command, do.SendOffer):
            weights = command.offer["weights"]
            event = on.UpdateAnnounced("a", command.round, command.attempt, weights["sha256"], weights, 50, 2)
        elif isinstance(command, do.PullUpdate):
            event = on.UpdateStored("a", command.round, command.attempt, command.weights["sha256"])
        elif isinstance(command, (do.Score, do.Extract, do.FoldUpdate, do.Close, do.Evaluate)):
            event = opened.worker.execute(command)
            assert not isinstance(event, on.UpdateRejected), event
        if event is not None:
            todo += coordinator.handle(event, 0.0)
    folder.storage.save(coordinator.state, (), 0.0)
    return coordinator.state


@pytest.mark.parametrize("killed", [do.Extract, do.FoldUpdate, do.Close, do.Evaluate])
def test_a_round_outlasts_a_compiler_that_describes_the_model_differently(tmp_path, killed):
    (tmp_path / "model.onnx").write_bytes(digits_model())
    job = Job(rounds=2, devices=1, scorer="magnitude", recipe=Recipe(max_steps=2))
    config = ServerConfig(model=str(tmp_path / "model.onnx"), job=job)
    with StateFolder(tmp_path / "state") as folder:
        opened = open_job(folder, config)
        state = play(opened, folder, lambda c: c.handle(on.DeviceBorn("a", 1, PI, 50), 0.0), until=killed)
        assert state.architecture == opened.model.architecture.digest
        state.architecture = tensorfile.sha256_hex(b"an older one")
        folder.storage.save(state, (), 0.0)

    with StateFolder(tmp_path / "state") as folder:
        opened = open_job(folder, config)
        assert opened.state.ranking is None
        assert folder.storage.load() == opened.state
        if killed is not do.Evaluate:
            assert opened.state.phase is Phase.SCORING
            assert [t.attempt for t in opened.state.tasks.values()] == [2]
        play(opened, folder, None)
        state = play(opened, folder, lambda c: c.handle(on.DeviceBorn("a", 2, PI, 50), 0.0))
        assert state.phase is Phase.FINISHED
        assert [sorted(r["devices"]) for r in state.history] == [["a"], ["a"]]


def test_a_round_whose_devices_no_longer_fit_waits_for_others(tmp_path):
    (tmp_path / "model.onnx").write_bytes(digits_model())
    config = ServerConfig(model=str(tmp_path / "model.onnx"), job=Job(rounds=2, devices=1))
    with StateFolder(tmp_path / "state") as folder:
        play(open_job(folder, config), folder, lambda c: c.handle(on.DeviceBorn("a", 1, PI, 50), 0.0), until=do.Score)
    config = ServerConfig(model=None, job=Job(rounds=2, devices=1, byte_budget=10))
    with StateFolder(tmp_path / "state") as folder:
        state = play(open_job(folder, config), folder, None)
        assert (state.phase, state.round, state.tasks) == (Phase.WAITING, 0, {})


def test_a_model_of_somebody_s_own_is_not_written_over(tmp_path):
    (tmp_path / "model.onnx").write_bytes(digits_model())
    models = tmp_path / "models"
    models.mkdir()
    (models / "model.onnx").write_bytes(b"mine")
    with StateFolder(models) as folder, pytest.raises(ConfigError, match="holds no job"):
        open_job(folder, ServerConfig(model=str(tmp_path / "model.onnx"), job=Job()))
    assert (models / "model.onnx").read_bytes() == b"mine"
