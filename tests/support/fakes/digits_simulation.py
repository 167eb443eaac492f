"""Simulations of a few boards that train the digits' network, and what ends them as a kill does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.model.selection import Tensors
from fedprune.planning.profile_store import find_profile
from fedprune_device.data.dataset import LocalData
from fedprune_export.importing import import_onnx
from fedprune_export.pruning.model import Model
from fedprune_server.simulation.digits import Digits, deal_digits, digits_model, write_device_data
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import Outcome, VirtualDevice
from fedprune_server.simulation.results.run_folder import ScratchStore
from fedprune_server.simulation.saved_run import SAVE_PACE, SavePace
from fedprune_server.simulation.simulation import Simulation

KINDS = ("raspberry-pi-zero-2w", "raspberry-pi-4b", "jetson-orin-nano")
"""Boards of different speed, each called like its kind."""

_OF_EXPERIMENT = {f.name for f in fields(Experiment)} - {"job", "devices"}


@cache
def digits_net() -> Model:
    return import_onnx(digits_model(), "digits-net")


@cache
def digits(names: Sequence[str] = KINDS) -> Digits:
    return deal_digits(names, seed=1)


YARD = ("barn", "dock")


def yard_config(settings: str) -> str:
    """A fleet's file of these boards; `settings` are further lines of its job."""
    return f"""
[job]
name = "yard"
rounds = 2
density = 0.25
{settings}

[model]
path = "model.onnx"

[evaluation]
data = "server.npz"

[[devices]]
name = "barn"
profile = "raspberry-pi-zero-2w"
data = "barn.npz"

[[devices]]
name = "dock"
profile = "jetson-orin-nano"
data = "dock.npz"
"""


def write_yard(folder: Path) -> None:
    """Write the files that `yard_config` names."""
    data = deal_digits(YARD, seed=5)
    (folder / "model.onnx").write_bytes(digits_model())
    np.savez(folder / "server.npz", x=data.x, y=data.y)
    for name in YARD:
        write_device_data(folder / f"{name}.npz", data.devices[name])


def boards(names: Sequence[str] = KINDS, kind: str = "") -> list[VirtualDevice]:
    """Boards of one kind, or each of the kind that it is called like."""
    return [VirtualDevice(name, find_profile(kind or name), data) for name, data in digits(names).devices.items()]


def noting(board: VirtualDevice, note: Callable[[str, Mapping[str, Any]], object]) -> VirtualDevice:
    """The board, which notes its name and the offer whenever it has trained."""

    def note_offer(outcome: Outcome, offer: Mapping[str, Any], store: BlobStore) -> Outcome:
        note(board.name, offer)
        return outcome

    return replace(board, tamper=note_offer)


def boards_that_validate() -> list[VirtualDevice]:
    """Boards whose last 40 training samples are for validation."""
    return [replace(board, data=_with_validation(digits().devices[board.name])) for board in boards()]


def _with_validation(d: LocalData) -> LocalData:
    return LocalData(d.x_train[:-40], d.y_train[:-40], d.x_test, d.y_test, d.x_train[-40:], d.y_train[-40:])


def digits_experiment(fleet: Sequence[VirtualDevice] | None = None, **settings: Any) -> Experiment:
    """An experiment of these boards; settings are those of the job and of the experiment, by name."""
    fleet, data = boards() if fleet is None else fleet, digits()
    experiment_fields: dict[str, Any] = {"title": "x", "model": digits_net(), "evaluation": (data.x, data.y)}
    job: dict[str, Any] = {"seed": 3, "rounds": 2, "devices": len(fleet)}
    for name, value in settings.items():
        (experiment_fields if name in _OF_EXPERIMENT else job)[name] = value
    return Experiment(job=Job(**job), devices=fleet, **experiment_fields)


def digits_simulation(
    folder: Path,
    *,
    keeps_state: bool = True,
    store: type[BlobStore] = ScratchStore,
    pace: SavePace = SAVE_PACE,
    **settings: Any,
) -> Simulation:
    """A simulation with its blobs, and if `kept` its state, in a folder."""
    place = folder if keeps_state else None
    return Simulation(digits_experiment(**settings), store(folder / "blobs"), folder=place, pace=pace)


def final_weights(simulation: Simulation) -> Tensors:
    return tensorfile.decode(simulation.store.read(simulation.state.model))


class KillError(Exception):
    """Ends a simulation as a kill does: between two events, without a word."""


def killed_after(calls: int) -> Callable[[object], None]:
    """Progress of a run that is killed at its n-th call: after a training or a round."""
    left = [calls]

    def progress(_: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise KillError

    return progress


def run_killed(simulation: Simulation, calls: int) -> None:
    with pytest.raises(KillError):
        simulation.run(killed_after(calls))


def assert_resumes(
    build: Callable[..., Simulation], *kills: int, same_blobs: bool = True, **settings: Any
) -> Simulation:
    """A run that is killed again and again ends as one that is not; the blobs that it leaves are the same, too.

    Args:
        build: Makes a simulation in a folder of this name.
        kills: Calls of its progress after which each start is killed.
        same_blobs: Whether it names the same graphs in all rounds, of which a new start knows its own rounds' alone.
    """
    uninterrupted = build("whole", **settings)
    uninterrupted.run()
    for calls in kills:
        run_killed(build("killed", **settings), calls)
    resumed = build("killed", **settings)
    assert resumed.run() == uninterrupted.state.history
    assert resumed.record() == uninterrupted.record()
    left, expected = set(resumed.store.names()), set(uninterrupted.store.names())
    assert left == expected if same_blobs else left <= expected
    return uninterrupted
