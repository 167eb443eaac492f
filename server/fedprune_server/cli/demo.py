"""`fedprune-server demo`: runs a fleet of real processes on this machine, next to a fleet that trains the whole model.

Both run at once, because a single fleet leaves cores idle while its boards wait. The second fleet trains with FedAvg,
and its server has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess  # nosec B404  # lists of words, never a shell
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from fedprune.core.cli import run_command, signals_as_interrupts
from fedprune.core.command_parser import CommandParser
from fedprune.core.disk import file_lock, storage_errors
from fedprune.core.errors import ConfigError, ExitCode
from fedprune.core.imports import module_code, program_code
from fedprune.core.parent_death import set_parent_death_signal
from fedprune.core.text import quantity
from fedprune.jobs.job import Job
from fedprune.output.log_lines import log_to_stdout
from fedprune.output.tables import print_verdicts, progress
from fedprune_server.app import StartOptions, build_app
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.monitoring.round_rows import RoundNotes
from fedprune_server.observation.observer import RoundEnded, TurnEvent
from fedprune_server.observation.snapshot import JobSnapshot
from fedprune_server.process.child_process import ChildDiedError, wait_or_kill
from fedprune_server.simulation.datasets.fleet_data import FleetData
from fedprune_server.simulation.digits import DIGITS_TITLE, deal_digits, digits_model, write_device_data
from fedprune_server.simulation.experiment import REFERENCE, fedavg_job
from fedprune_server.simulation.fleet.demo_fleet import (
    DEMO_BOARDS,
    DEMO_QUICK_ROUNDS,
    DEMO_ROUNDS,
    DemoBoard,
    demo_job,
    too_few_rounds,
)
from fedprune_server.simulation.results.job_record import job_record
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.results.report import claims, closing_text, write_report
from fedprune_server.simulation.results.tables import print_results

log = logging.getLogger("fedprune.server")

# Marks a folder as a demo's, so that the next demo may clear it: `--out` could name any folder of the user's.
MARK_FILE = "demo.json"

_SITE = "demo"
_BYTES_NOTE = "payload at the broker: delivered to devices, received from them"

_REFERENCE_PROGRAM = program_code("from fedprune_server.cli.demo import run_reference\nsys.exit(run_reference())")
STOP_S = 5.0
# Longer than for a board: the process ends its own boards first, then its broker, each with up to `STOP_S`.
_REFERENCE_STOP_S = 4 * STOP_S
# Characters of a dead board's output that its error shows: a traceback's end, which names the cause.
_MAX_OUTPUT_SHOWN = 400


class DemoProcesses:
    """Some processes. Leaving the context ends them all: SIGTERM, then SIGKILL after `stop_s` seconds."""

    def __init__(self, stop_s: float = STOP_S) -> None:
        self._stop_s = stop_s
        self._processes: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}

    def start(self, name: str, command: Sequence[str], output: Path, **environment: str) -> None:
        """Start a process; `output` is the file for what it prints, `environment` are further variables."""
        with output.open("ab") as stream:
            process = subprocess.Popen(  # noqa: S603  # nosec B603  # our own modules, in this Python
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C in the terminal is for the demo, which then ends its boards
                # A demo that is killed with SIGKILL can't end its boards itself.
                preexec_fn=partial(set_parent_death_signal, signal.SIGTERM),
            )
        self._processes[name] = (process, output)

    def check(self, *, may_end: bool = False) -> None:
        """Raise `ChildDiedError`, with its last output, if a process has ended; with `may_end`, if it has failed."""
        for name, (process, output) in self._processes.items():
            code = process.poll()
            if code is not None and not (may_end and code == 0):
                output_end = output.read_text(errors="replace").strip()[-_MAX_OUTPUT_SHOWN:]
                message = f"{name} has ended with exit code {code}"
                error = ChildDiedError(message, got=output_end or "no output", hint=f"See {output}.")
                if code in {*ExitCode} - {ExitCode.OK}:
                    error.exit_code = ExitCode(code)
                raise error

    def wait(self) -> None:
        """Wait until all have ended. Raises `ChildDiedError` if one has failed."""
        for process, _ in self._processes.values():
            process.wait()
        self.check(may_end=True)

    def __enter__(self) -> DemoProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        started = [process for process, _ in self._processes.values()]
        for process in started:
            process.terminate()  # does nothing to one that has ended
        kill_at = time.monotonic() + self._stop_s
        for process in started:
            wait_or_kill(process, max(0.0, kill_at - time.monotonic()))


class DemoFolder:
    """The folder of a demo, with the places of everything that its processes read and write."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = root / "model.onnx"
        self.evaluation = self.data("server")
        self.calibration = self.data("calibration")  # the server's samples for batch-norm statistics
        self.profiles = root / "profiles"
        self.fleet_record = root / "metrics.json"
        self.reference_record = root / "reference" / "metrics.json"
        self.reference_log = root / "reference.log"  # the output of the process with FedAvg's job

    def data(self, board: str) -> Path:
        return self.root / "data" / f"{board}.npz"

    @classmethod
    def prepare(cls, root: Path, seed: int) -> DemoFolder:
        """Clear the folder of an earlier demo and write what a new one needs. Raises `ConfigError` if the folder holds
        something that is not a demo's."""
        if root.exists() and (not root.is_dir() or (any(root.iterdir()) and not (root / MARK_FILE).is_file())):
            hint = "Name another folder with --out, or empty this one."
            raise ConfigError(f"{root} holds something that is not a demo's", hint=hint)
        if root.exists():
            shutil.rmtree(root)
        folder = cls(root)
        for path in (root, root / "data", folder.profiles, folder.reference_record.parent):
            path.mkdir(parents=True)
        (root / MARK_FILE).write_text(json.dumps({"format": "fedprune.demo/1", "seed": seed}) + "\n", encoding="utf-8")
        folder.model.write_bytes(digits_model())
        hands = deal_digits([b.name for b in DEMO_BOARDS], seed=seed)
        np.savez(folder.evaluation, x=hands.x, y=hands.y)
        np.savez(folder.calibration, x=hands.calibration)
        for board in DEMO_BOARDS:
            write_device_data(folder.data(board.name), hands.devices[board.name])
            profile = board.profile()
            (folder.profiles / f"{profile.name}.json").write_text(profile.to_json(), encoding="utf-8")
        return folder


def run_demo(out: Path, *, seed: int = 0, rounds: int | None = None, quick: bool = False) -> int:
    """Run both jobs, write the report, print the summary; returns the exit code, as `verdict` says."""
    began = time.monotonic()
    rounds = rounds if rounds is not None else DEMO_QUICK_ROUNDS if quick else DEMO_ROUNDS
    job = demo_job(seed, rounds)  # raises on a wrong number before the folder of an earlier demo is cleared
    with (
        _demo_lock(out),
        log_to_stdout(verbose=False),
        signals_as_interrupts(),
        DemoProcesses(_REFERENCE_STOP_S) as reference_job,
    ):
        folder = DemoFolder.prepare(out, seed)
        size = f"{quantity(len(DEMO_BOARDS), 'device')}, {quantity(rounds, 'round')}"
        print(f"{size}, two jobs at once: models as wide as each link allows, and FedAvg.")
        print(f"Devices' output is in {out}/*/devices/*.log, FedAvg's server's in {folder.reference_log}\n")
        data = FleetData.of_devices(deal_digits([b.name for b in DEMO_BOARDS], seed=seed).devices, DIGITS_TITLE)
        reference_command = [sys.executable, "-c", _REFERENCE_PROGRAM, str(out), str(seed), str(rounds)]
        reference_job.start(f"the job of {REFERENCE}", reference_command, folder.reference_log)
        fleet = run_job("fedprune", job, folder, on_turn=partial(reference_job.check, may_end=True))
        with progress(f"waiting for the devices that run {REFERENCE}"):
            reference_job.wait()
        reference = Record.load(folder.reference_record)
        return _finish(folder, replace(fleet, partition=data), replace(reference, partition=data), began)


def run_reference() -> int:
    """Run FedAvg's job, as the program of a process whose arguments are the demo's folder, the seed and the rounds."""

    def run(arguments: argparse.Namespace) -> None:
        folder = DemoFolder(arguments.root)
        with log_to_stdout(verbose=False), signals_as_interrupts():
            job = fedavg_job(demo_job(arguments.seed, arguments.rounds))
            run_job(REFERENCE, job, folder).save(folder.reference_record)

    def build_parser() -> CommandParser:
        parser = CommandParser()
        for name, kind in (("root", Path), ("seed", int), ("rounds", int)):
            parser.add_argument(name, type=kind)
        parser.set_defaults(run=run)
        return parser

    return run_command(f"the job of {REFERENCE}", build_parser)


def _demo_lock(out: Path) -> AbstractContextManager[None]:
    """Hold the lock next to a demo's folder, which the next demo clears."""
    out = out.resolve()
    with storage_errors(f"can't make {out.parent}"):
        out.parent.mkdir(parents=True, exist_ok=True)
    return file_lock(
        out.with_name(f".{out.name}.lock"), f"another demo runs in {out}", "Wait for it, or name another folder: --out."
    )


def _finish(folder: DemoFolder, fleet: Record, reference: Record, began: float) -> int:
    fleet.save(folder.fleet_record)
    reference.save(folder.reference_record)
    unjudged = too_few_rounds(len(fleet.rounds))
    with progress("writing the report"):
        report = write_report(folder.root, fleet, reference, judged=not unjudged)
    print()
    print_results([fleet, reference])
    print_verdicts(f"\n{closing_text(fleet, reference, judged=not unjudged)}")
    if unjudged:
        print(f"\n{unjudged}")
    print(f"\n{time.monotonic() - began:.0f} s in all. Report: {report}")
    return int(verdict(fleet, reference))


def verdict(fleet: Record, reference: Record) -> ExitCode:
    """The demo's exit code: `CLAIM` if a claim failed. Too few rounds show only that it runs, and are not judged."""
    passes = too_few_rounds(len(fleet.rounds)) or all(c.passes for c in claims(fleet, reference))
    return ExitCode.OK if passes else ExitCode.CLAIM


def run_job(title: str, job: Job, folder: DemoFolder, on_turn: Callable[[], None] = lambda: None) -> Record:
    """Run a job to its end: broker, server and one process per board, with their files in a folder of the job's name.

    The server's loop calls `on_turn` again and again; an error in it ends the job. Raises `FedpruneError` if a process
    died or the job can't go on.
    """
    job_folder = folder.root / job.name
    config = ServerConfig(
        job=job,
        model=str(folder.model),
        evaluation=str(folder.evaluation),
        calibration=str(folder.calibration),
        site=_SITE,
        state=job_folder / "server",
        port=0,
        profiles=folder.profiles,
    )
    stopping, options = threading.Event(), StartOptions(insecure=True, until_finished=True)
    boards = DemoProcesses()
    watch = _BoardWatch(boards, on_turn, stopping)
    with build_app(config, options, stopping, observers=[watch]) as app, boards:
        runner = app.server.main_runner
        for board in DEMO_BOARDS:
            _start_board(boards, board, folder, job_folder, app.connection.url)
        began = time.time()
        app.run()
        if watch.failure is not None:
            raise watch.failure
        ranking = runner.state.ranking
        return job_record(
            title,
            job,
            runner.architecture,
            runner.state,
            notes=watch.notes,
            ranking=runner.store.read(ranking) if ranking and runner.store.has(ranking) else None,
            measured=_BYTES_NOTE,
            started_at=began,
        )


class _BoardWatch:
    """Watches the boards' processes, and notes the payload bytes by the end of every round."""

    def __init__(self, boards: DemoProcesses, on_turn: Callable[[], None], stopping: threading.Event) -> None:
        self._boards, self._on_turn, self._stopping = boards, on_turn, stopping
        self.notes: dict[int, RoundNotes] = {}
        self.failure: Exception | None = None  # it ended the job

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        for event in events:
            match event.payload:
                case RoundEnded(summary, down, up):
                    self.notes[int(summary["round"])] = RoundNotes(down, up)
        try:
            self._boards.check()
            self._on_turn()
        except Exception as error:  # noqa: BLE001 - it is raised again as the server has ended
            self.failure = self.failure or error
            self._stopping.set()


def _start_board(boards: DemoProcesses, board: DemoBoard, folder: DemoFolder, job_folder: Path, url: str) -> None:
    name, devices = board.name, job_folder / "devices"
    devices.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", module_code("fedprune_device.cli.main"), "run", "--insecure", "--broker", url]
    command += ["--site", _SITE, "--device", name, "--data", str(folder.data(name)), "--state", str(devices / name)]
    # Plans shall come from the profiles, as on real boards: a probe would measure this machine. One thread for each
    # board, because six of them and a server share its cores.
    command += ["--profile", str(folder.profiles / f"{board.profile().name}.json"), "--no-probe", "--threads", "1"]
    boards.start(f"device {name}", command, devices / f"{name}.log", OMP_NUM_THREADS="1")
