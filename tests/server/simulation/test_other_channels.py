"""What an extractor chose is put back where it came from, whichever channels those were."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State, SynchronousCoordinator
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune_export.importing import import_onnx
from fedprune_server.executor.worker import Worker
from fedprune_server.simulation.digits import digits_model

NAMES = ("a", "b")


def play(worker: Worker, coordinator: SynchronousCoordinator) -> None:
    """All rounds of a job whose boards hand back what they were sent."""
    queue: deque[on.Event] = deque(on.DeviceBorn(n, 1, {}, 10) for n in NAMES)
    while queue:
        for command in coordinator.handle(queue.popleft(), 0.0):
            match command:
                case do.Score() | do.Extract() | do.Fold() | do.Close() | do.Evaluate():
                    queue.append(worker.execute(command))
                case do.SendOffer():
                    assert coordinator.state.references() >= {command.offer["ranking"]}
                    sent = command.offer["weights"]["sha256"]
                    trained = worker.store.put(tensorfile.encode(tensorfile.decode(worker.store.read(sent))))
                    part = (command.device, command.round, command.attempt)
                    queue.append(on.UpdateAnnounced(*part, sent, trained.to_dict(), 10, 1, {}))
                case do.PullUpdate():
                    part = (command.device, command.round, command.attempt)
                    queue.append(on.UpdateStored(*part, command.weights["sha256"]))
                case _:
                    pass


@pytest.mark.parametrize("strategy", ["others", "emergent"])
def test_boards_that_train_nothing_leave_the_model_as_it_is(tmp_path: Path, strategy: str) -> None:
    model = import_onnx(digits_model(), "digits")
    name = f"support.fakes.picking_strategies:{strategy}"
    job = Job.from_dict({"strategy": name, "devices": 2, "rounds": 3, "density": 0.4})
    worker = Worker(job, model, BlobStore(tmp_path, durable=False))
    start = worker.initial()
    coordinator = SynchronousCoordinator(job, model.architecture, State(model=start))
    play(worker, coordinator)

    state = coordinator.state
    assert [r["devices"][n]["progress"] for r in state.history for n in NAMES] == ["folded"] * 6
    before, after = (tensorfile.decode(worker.store.read(d)) for d in (start, state.model))
    for name in before:
        np.testing.assert_allclose(after[name], before[name], atol=1e-4, err_msg=name)
    for name, device in state.devices.items():
        offer = state.tasks[name].offer
        assert device.past is not None
        assert offer is not None
        assert (device.past["widths"], device.past["ranking"]) == (offer["widths"], offer["ranking"])
        assert offer["ranking"] != state.ranking
        assert State.from_json(state.to_json()).references() >= {offer["ranking"]}
