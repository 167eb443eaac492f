"""`fedprune-simulate`: run a fleet on a virtual clock and write its report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedprune import profile_store
from fedprune.blobs import BlobStore
from fedprune.cli import run_command
from fedprune.errors import ConfigError, ExitCode, MissingExtraError
from fedprune.job import Job
from fedprune.toml_file import read_toml
from fedprune_device.data import load_data
from fedprune_export.imported import Model
from fedprune_export.load import import_onnx, read_source
from fedprune_server.config import parse_config
from fedprune_server.record import Record
from fedprune_server.reference import TITLE, fedavg
from fedprune_server.simulation import DropOuts, Simulation
from fedprune_server.state_folder import load_calibration, load_evaluation
from fedprune_server.virtual_device import VirtualDevice
from fedprune_server.worker import Evaluation

_OWN_TABLES = ("devices", "dropouts")


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command("fedprune-simulate", build_parser, argv)


def read_plan(path: Path, options: argparse.Namespace) -> Plan:
    """Read a `fleet.toml` with a [[devices]] table.

    Raises:
        ConfigError: It can't be read, or a key is missing, unknown or wrong; the message names it.
        FedpruneError: Model, data or a profile can't be read.
    """
    body = read_toml(path, ConfigError)
    config = parse_config({k: v for k, v in body.items() if k not in _OWN_TABLES}, str(path), path.parent)
    if config.model is None:
        raise ConfigError(f"{path}: [model] path is missing", expected="an ONNX file")
    rows = body.get("devices")
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{path}: [[devices]]", expected="one table with name, profile and data per device")
    job = _overridden(config.job, options)
    devices = tuple(_device(row, i, job, path) for i, row in enumerate(rows, 1))
    job = replace(job, devices=_present(body.get("job", {}), job, len(devices)))
    model = import_onnx(read_source(config.model), Path(config.model).stem)
    evaluation = None if config.evaluation is None else load_evaluation(config.evaluation, model.architecture)
    calibration = None
    if config.calibration is not None:
        calibration = load_calibration(config.calibration, model.architecture)
    dropouts = _dropouts(body.get("dropouts", {}), path)
    reference = fedavg(job) if options.reference else None
    return Plan(job.name, job, reference, model, devices, evaluation, calibration, dropouts)


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(
        prog="fedprune-simulate", description="Simulate a fleet on a virtual clock and write its report."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, help="a fleet.toml with a [[devices]] table")
    source.add_argument("--demo", action="store_true", help="the fleet of `fedprune-server demo`, beside FedAvg")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; one that was killed goes on")
    parser.add_argument("--reference", action="store_true", help="run FedAvg at full width on the same devices, too")
    parser.add_argument("--seed", type=int, help="instead of the job's")
    parser.add_argument("--rounds", type=int, help="instead of the job's")
    parser.set_defaults(run=_run)
    return parser


def _run(options: argparse.Namespace) -> int:
    _simulate(_demo(options) if options.demo else read_plan(options.config, options), options.out)
    return int(ExitCode.OK)


def _simulate(plan: Plan, out: Path) -> None:
    try:
        from fedprune_server.report import summary_text, write_report
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{error.name} is not installed", hint="pip install 'fedprune[server]'") from error
    run, reference = _one(plan.title, plan.job, plan, out / "run"), None
    run.save(out / "metrics.json")
    if plan.reference is not None:
        reference = _one(TITLE, plan.reference, plan, out / "reference")
        reference.save(out / "metrics-reference.json")
    report = write_report(out, run, reference)
    print(summary_text(run, reference))
    print(f"\nReport: {report.html}")


def _one(title: str, job: Job, plan: Plan, folder: Path) -> Record:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    folder.mkdir(parents=True, exist_ok=True)
    simulation = Simulation(
        job,
        plan.model,
        plan.devices,
        plan.evaluation,
        BlobStore(folder / "blobs"),
        folder=folder,
        dropouts=plan.dropouts,
        calibration=plan.calibration,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        rounds = bar.add_task(title, total=job.rounds, completed=len(simulation.state.history), note="")

        def show(simulation: Simulation) -> None:
            state = simulation.state
            done = sum(t.progress.over for t in state.tasks.values()) / max(1, len(state.tasks))
            metrics = state.history[-1]["metrics"] if state.history else {}
            note = f"accuracy {metrics['accuracy']:.1%}" if "accuracy" in metrics else ""
            shown = min(job.rounds, len(state.history) + (done if state.round > len(state.history) else 0))
            bar.update(rounds, completed=round(shown, 2), note=note)

        simulation.run(show)
    return simulation.record(title)


def _demo(options: argparse.Namespace) -> Plan:
    from fedprune_server.demo_fleet import BOARDS, fleet_job, reference_job
    from fedprune_server.digits import deal, digits_model

    seed = options.seed or 0
    data = deal([b.name for b in BOARDS], seed=seed)
    return Plan(
        "fedprune",
        _overridden(fleet_job(seed), options),
        _overridden(reference_job(seed), options),
        import_onnx(digits_model(), "digits-net"),
        tuple(VirtualDevice(b.name, b.profile(), data.devices[b.name]) for b in BOARDS),
        (data.x, data.y),
        data.calibration,
        DropOuts(),
    )


def _overridden(job: Job, options: argparse.Namespace) -> Job:
    chosen = {k: getattr(options, k) for k in ("seed", "rounds") if getattr(options, k) is not None}
    return replace(job, **chosen)


def _present(body: Mapping[str, object], job: Job, devices: int) -> int:
    """How many devices a round waits for: what the configuration says, if there are as many; all if it says nothing."""
    if "devices" not in body:
        return devices
    if job.devices > devices:
        print(f"note: [job] devices is {job.devices}, but there are {devices}: rounds start with {devices}.")
    return min(job.devices, devices)


def _device(row: object, number: int, job: Job, path: Path) -> VirtualDevice:
    where = f"{path}: [[devices]] {number}"
    if not isinstance(row, Mapping) or set(row) != {"name", "profile", "data"}:
        raise ConfigError(
            where, expected="name, profile and data", got=sorted(row) if isinstance(row, Mapping) else row
        )
    for key, value in row.items():
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{where}: {key}", expected="a text", got=repr(value))
    name, profile, source = row["name"], row["profile"], row["data"]
    if source.endswith(".npz"):
        source = str(path.parent / source)
    if "/" in profile or profile.endswith((".toml", ".json")):
        profile = path.parent / profile
    return VirtualDevice(name, profile_store.find(profile), load_data(source, job.seed, name))


def _dropouts(body: object, path: Path) -> DropOuts:
    if not isinstance(body, Mapping) or not set(body) <= {"probability", "away_s"}:
        raise ConfigError(f"{path}: [dropouts]", expected="probability and away_s", got=body)
    for key, value in body.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{path}: [dropouts] {key}", expected="a number", got=repr(value))
    return DropOuts(**{k: float(v) for k, v in body.items()})


if __name__ == "__main__":
    sys.exit(main())
