"""A server's state folder as a job of one board leaves it, at any of its events; nothing is trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.blobs.blob_ref import BlobRef
from fedprune.coordination import State, make_coordinator
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.planning import profile_store
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.engine.state_folder import StateFolder
from fedprune_server.simulation.digits import digits_model
from support.fakes.opened_job import open_job

BOARD = profile_store.find_profile("raspberry-pi-5").to_dict()
JOB = Job(rounds=3, devices=1, scorer="magnitude", recipe=Recipe(max_steps=2))


def play_job(
    state: Path, *, events: int = 10**6, keep: int = 3, database: str | None = None, blobs: str = "folder"
) -> State:
    """Play a job, or continue with one: the board adds the round's number to the weights that it got.

    The state folder is made, with its model beside it, if missing, and holds the database if there is no other. It
    stops after so many events; `keep` and `blobs` are the server's settings.
    """
    model = state.parent / "model.onnx"
    if not model.exists():
        model.write_bytes(digits_model())
    exists = (state / "model.onnx").exists() or (state / "server.db").exists()
    config = ServerConfig(model=None if exists else str(model), job=JOB, keep=keep, blobs=blobs)
    with StateFolder(state, database) as folder:
        opened = open_job(folder, config)
        coordinator = make_coordinator(opened.job, opened.model.architecture, opened.state)
        session = opened.state.devices["a"].session + 1 if "a" in opened.state.devices else 1
        queue: list[on.Event] = [on.Resumed()] if exists else []
        queue.append(on.DeviceBorn("a", session, BOARD, 50))
        count = 0
        while queue and count < events:
            event, count = queue.pop(0), count + 1
            commands = coordinator.handle(event, float(count))
            folder.storage.save(coordinator.state, [event], float(count))
            for command in commands:
                if isinstance(command, do.SendOffer):
                    weights = BlobRef.of(board_update(folder, command.offer, command.round)).to_dict()
                    known_by = (command.offer["weights"]["sha256"], weights, 50, 2)
                    queue.append(on.UpdateAnnounced("a", command.round, command.attempt, *known_by))
                elif isinstance(command, do.PullUpdate):
                    folder.store.put(board_update(folder, coordinator.state.tasks["a"].offer or {}, command.round))
                    queue.append(on.UpdateStored("a", command.round, command.attempt, command.weights["sha256"]))
                elif isinstance(command, (do.Score, do.Extract, do.FoldUpdate, do.Close, do.Evaluate)):
                    queue.append(opened.worker.execute(command))
        return coordinator.state


def board_update(folder: StateFolder, offer: Mapping[str, Any], number: int) -> bytes:
    """What the board makes of an offer."""
    tensors = tensorfile.decode(folder.store.read(offer["weights"]["sha256"]))
    return tensorfile.encode({k: v + np.float32(number) for k, v in tensors.items()})
