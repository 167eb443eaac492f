"""What `fedprune-simulate` is to simulate: a `fleet.toml` with its [[devices]], or the demo's fleet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedprune import profile_store
from fedprune.errors import ConfigError, FedpruneError
from fedprune.job import Job
from fedprune.toml_file import read_toml
from fedprune_device.data import load_data
from fedprune_export.imported import Model
from fedprune_export.importing import import_onnx, read_source
from fedprune_server.config import parse_config
from fedprune_server.reference import fedavg
from fedprune_server.state_folder import load_calibration, load_evaluation
from fedprune_server.virtual_device import VirtualDevice
from fedprune_server.weather import DropOuts
from fedprune_server.worker import Evaluation

_DEVICE_KEYS = ("name", "profile", "data")
_DROPOUT_KEYS = ("probability", "away_s")


@dataclass(frozen=True)
class Plan:
    """What is to be simulated.

    Attributes:
        title: The job's title.
        job: The job.
        reference: The job that it is compared with, or None.
        model: The model.
        devices: The fleet.
        evaluation: The server's own samples, or None.
        calibration: Samples on which it measures batch-norm statistics, or None.
        dropouts: How devices vanish.
    """

    title: str
    job: Job
    reference: Job | None
    model: Model
    devices: tuple[VirtualDevice, ...]
    evaluation: Evaluation | None
    calibration: npt.NDArray[np.float32] | None
    dropouts: DropOuts


def read_plan(path: Path, *, reference: bool = False, seed: int | None = None, rounds: int | None = None) -> Plan:
    """Read a `fleet.toml` with a [[devices]] table. What only a server needs, [server], is not looked at.

    Args:
        path: The file.
        reference: Whether the job is compared with FedAvg.
        seed: Instead of the job's.
        rounds: Instead of the job's.

    Raises:
        ConfigError: It can't be read, or a key is missing, unknown or wrong; the message names it.
        FedpruneError: Model, data or a profile can't be read; the message names the table and the key.
    """
    body = read_toml(path, ConfigError)
    config = parse_config({k: v for k, v in body.items() if k != "server"}, str(path), path.parent)
    if config.model is None:
        raise ConfigError(f"{path}: [model] path is missing", expected="an ONNX file")
    dropouts = _dropouts(body.get("dropouts", {}), path)
    job = _overridden(config.job, seed, rounds)
    devices = _devices(body.get("devices"), job, path)
    job = replace(job, devices=_present(body.get("job", {}), job, len(devices)))
    with _named(f"{path}: [model] path"):
        model = import_onnx(read_source(config.model, input_shape=config.input_shape), Path(config.model).stem)
    evaluation, calibration = None, None
    if config.evaluation is not None:
        with _named(f"{path}: [evaluation] data"):
            evaluation = load_evaluation(config.evaluation, model, job.recipe.loss)
    if config.calibration is not None:
        with _named(f"{path}: [calibration] data"):
            calibration = load_calibration(config.calibration, model)
    return Plan(job.name, job, fedavg(job) if reference else None, model, devices, evaluation, calibration, dropouts)


def demo_plan(*, seed: int | None = None, rounds: int | None = None) -> Plan:
    """The fleet of `fedprune-server demo`, and FedAvg on the same devices.

    Args:
        seed: Instead of 0.
        rounds: Instead of the demo's.
    """
    from fedprune_server.demo_fleet import BOARDS, fleet_job, reference_job
    from fedprune_server.digits import deal, digits_model

    data = deal([b.name for b in BOARDS], seed=seed or 0)
    return Plan(
        "fedprune",
        _overridden(fleet_job(seed or 0), seed, rounds),
        _overridden(reference_job(seed or 0), seed, rounds),
        import_onnx(digits_model(), "digits-net"),
        tuple(VirtualDevice(b.name, b.profile(), data.devices[b.name]) for b in BOARDS),
        (data.x, data.y),
        data.calibration,
        DropOuts(),
    )


def _overridden(job: Job, seed: int | None, rounds: int | None) -> Job:
    return replace(job, seed=job.seed if seed is None else seed, rounds=job.rounds if rounds is None else rounds)


def _present(body: Mapping[str, object], job: Job, devices: int) -> int:
    """How many devices a round waits for: what the configuration says, if there are as many; all if it says nothing."""
    if "devices" not in body:
        return devices
    if job.devices > devices:
        print(f"note: [job] devices is {job.devices}, but there are {devices}: rounds start with {devices}.")
    return min(job.devices, devices)


def _devices(rows: object, job: Job, path: Path) -> tuple[VirtualDevice, ...]:
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise ConfigError(f"{path}: [[devices]]", expected="one table with name, profile and data per device")
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        where = f"{path}: [[devices]] {number}"
        if not isinstance(row, Mapping):
            raise ConfigError(where, expected="a table with name, profile and data", got=repr(row))
        _only(row, _DEVICE_KEYS, where)
        for key in _DEVICE_KEYS:
            if key not in row:
                raise ConfigError(f"{where}: {key} is missing", expected="name, profile and data")
            if not isinstance(row[key], str) or not row[key]:
                raise ConfigError(f"{where}: {key}", expected="a text", got=repr(row[key]))
        if row["name"] in seen:
            raise ConfigError(
                f"{where}: name", expected="another one for each device", got=f"{row['name']!r} as {seen[row['name']]}"
            )
        seen[row["name"]] = number
    return tuple(_device(row, f"{path}: [[devices]] {number}", job, path) for number, row in enumerate(rows, 1))


def _device(row: Mapping[str, str], where: str, job: Job, path: Path) -> VirtualDevice:
    name, profile, source = (row[key] for key in _DEVICE_KEYS)
    if source.endswith(".npz"):
        source = str(path.parent / source)
    if "/" in profile or profile.endswith((".toml", ".json")):
        profile = str(path.parent / profile)
    with _named(f"{where}: profile"):
        board = profile_store.chosen(profile)
    with _named(f"{where}: data"):
        return VirtualDevice(name, board, load_data(source, job.seed, name))


def _dropouts(body: object, path: Path) -> DropOuts:
    where = f"{path}: [dropouts]"
    if not isinstance(body, Mapping):
        raise ConfigError(where, expected="a table [dropouts]", got=repr(body))
    _only(body, _DROPOUT_KEYS, where)
    for key, value in body.items():
        number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
        if key == "probability" and not 0 <= number < 1:
            raise ConfigError(f"{where} {key}", expected="a number from 0 to below 1", got=repr(value))
        if key == "away_s" and not 0 < number < math.inf:
            raise ConfigError(f"{where} {key}", expected="a number of seconds above 0", got=repr(value))
    return DropOuts(**{k: float(v) for k, v in body.items()})


def _only(body: Mapping[str, object], known: Sequence[str], where: str) -> None:
    for key in body:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}", expected=f"one of {', '.join(known)}")


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Say in an error where in the file the thing stands that it is about."""
    try:
        yield
    except FedpruneError as error:
        raise type(error)(f"{where}: {error.what}", expected=error.expected, got=error.got, hint=error.hint) from error
