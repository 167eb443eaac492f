"""`fedprune-device`: take part in a fleet, predict with what was learnt, measure the board."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune import __version__
from fedprune.bundle import open_bundle
from fedprune.cli import run_command, whole_number
from fedprune.disk import storage_errors
from fedprune.errors import DataError, ExitCode, ProfileError, StorageError, UsageError, remedy
from fedprune.probe_report import ProbeReport
from fedprune.profile import HardwareProfile
from fedprune_device.care import COOL_C, HOT_C, Care, condition
from fedprune_device.data import checked_inputs, checked_samples, why_unreadable
from fedprune_device.labels import targets
from fedprune_device.membership import add_join_command, add_membership, checked_urls, join_first, membership
from fedprune_device.own_labels import OwnLabels
from fedprune_device.owner import Owner
from fedprune_device.predictions import described, judged
from fedprune_device.predictor import Predictor
from fedprune_device.runtime.runtime_cli import add_runtime_commands
from fedprune_device.slots import Slots

_LOG = logging.getLogger("fedprune.device")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command("fedprune-device", build_parser, argv)


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(
        prog="fedprune-device",
        description="Train on this board's own data as part of a fleet, and predict with what was learnt.",
        epilog="Exit codes are explained in docs/exit-codes.md.",
    )
    parser.add_argument("--version", action="version", version=f"fedprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_join_command(commands)
    _add_run(commands)
    _add_predict(commands)
    probe = commands.add_parser("probe", help="measure this board, which takes about ten seconds")
    probe.add_argument("--json", action="store_true", help="as JSON, for programs")
    probe.add_argument(
        "--threads", type=whole_number, default=_threads(), metavar="N", help="threads for the benchmark"
    )
    probe.set_defaults(run=_probe)
    identify = commands.add_parser("identify", help="say which hardware profile fits this board, and why")
    identify.add_argument("--json", action="store_true", help="as JSON, for programs")
    identify.set_defaults(run=_identify)
    add_runtime_commands(commands)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="take part in a fleet, or go on after a stop, crash or power cut")
    add_membership(run)
    run.add_argument(
        "--insecure", action="store_true", help="without identity, TLS and signatures: on the server's machine alone"
    )
    run.add_argument("--data", required=True, metavar="SRC", help=".npz with x and y, or package.module:function")
    run.add_argument("--seed", type=int, default=0, help="of the split into training and test samples (default: 0)")
    run.add_argument(
        "--validation-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the training samples, set aside for what training and fleet decide by (default: 0)",
    )
    run.add_argument("--profile", metavar="NAME", help="a hardware profile's name or file (default: what fits)")
    run.add_argument("--threads", type=whole_number, default=_threads(), metavar="N", help="default: half of the cores")
    run.add_argument("--until-finished", action="store_true", help="end when the job is done")
    run.add_argument("--patient", action="store_true", help="wait for a broker that isn't there when starting")
    run.add_argument(
        "--pause-above",
        type=float,
        default=HOT_C,
        metavar="C",
        help="training waits at this heat (default: %(default)g °C)",
    )
    run.add_argument("--resume-below", type=float, default=COOL_C, metavar="C", help="default: %(default)g °C")
    run.add_argument("--no-probe", action="store_true", help="don't measure the board; the profile is believed")
    run.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="how much is said on stderr (default: info)",
    )
    run.set_defaults(run=_run)


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser("predict", help="predict with the serving model, also while the agent runs")
    source = predict.add_mutually_exclusive_group(required=True)
    source.add_argument("--state", type=Path, metavar="DIR", help="the serving model of a running or stopped agent")
    source.add_argument("--bundle", type=Path, metavar="DIR", help="a bundle of fedprune-export")
    predict.add_argument("--input", type=Path, required=True, metavar="FILE", help=".npy, or .npz with x (and y)")
    out = predict.add_mutually_exclusive_group()
    out.add_argument("--output", type=Path, metavar="FILE", help="write the logits to this .npy file")
    out.add_argument("--top", type=whole_number, default=1, metavar="K", help="print the K likeliest (default: 1)")
    predict.add_argument("--data", metavar="SRC", help="with --bundle: adjust logits to the label shares of this data")
    predict.add_argument(
        "--threads", type=whole_number, default=_threads(), metavar="N", help="default: half of the cores"
    )
    predict.set_defaults(run=_predict)


def _run(arguments: argparse.Namespace) -> int:
    from fedprune_device.agent import Agent
    from fedprune_device.data import load_data
    from fedprune_device.probe import check_runtime, probe_apart
    from fedprune_device.runtime.heart import Heart
    from fedprune_device.runtime.releases import Releases, updater_here
    from fedprune_device.runtime.trial import Trial
    from fedprune_device.store import DeviceStore

    logging.basicConfig(
        level=arguments.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    checked_urls(arguments, insecure=arguments.insecure)
    care = Care(arguments.pause_above, arguments.resume_below)
    trial = Trial.current()
    if trial is not None:
        trial.check(arguments.state / "serving")
    profile = _profile(arguments.profile)
    data = load_data(arguments.data, arguments.seed, arguments.device, arguments.validation_share)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    owner = Owner(arguments.device, arguments.site)
    with DeviceStore(arguments.state, owner=owner) as store, ExitStack() as stack:
        member = membership(arguments, insecure=arguments.insecure)
        if not join_first(member, arguments, patient=arguments.patient, stopped=stopped):
            return int(ExitCode.OK)
        if member.identity is not None:
            owner.claim(arguments.state)
        agents: list[Agent] = []  # the link asks the agent for its will, and the agent speaks through the link
        link, wire = member.open(lambda: agents[0].will())
        report = None
        if arguments.no_probe:
            check_runtime()
        else:
            report = probe_apart(arguments.threads, memory_file=arguments.state / "layer_times.json")
            # A plan counts the samples, which are here already.
            free = min(report.memory_total, report.memory_available + data.bytes)
            report = replace(report, memory_available=free)
            _LOG.info("probe: %s", json.dumps({**report.to_dict(), "latency": _latency(report)}))
        releases = Releases(
            wire,
            arguments.device,
            arguments.site,
            updater_here(member.identity),
            quiet=lambda: agents[0].quiet,
            restart=lambda: agents[0].stop(),
        )
        heart = Heart(releases, trial)
        _LOG.info("board: %s", condition())
        agent = Agent(
            arguments.device,
            arguments.site,
            store,
            heart,
            data,
            profile=profile,
            threads=arguments.threads,
            probe=report,
            care=care,
        )
        agents.append(agent)
        signal.signal(signal.SIGTERM, lambda *_: agent.stop())
        if stopped.is_set():
            return int(ExitCode.OK)
        link.start(patient=arguments.patient)
        owner.claim(arguments.state)  # not before: a start that fails must not give the directory to a mistyped name
        renewal = member.renewal(link)
        if renewal is not None:
            stack.enter_context(renewal)
        try:
            agent.run(arguments.until_finished)
        finally:
            heart.stop()
            link.close()
    return int(ExitCode.OK)


def _profile(name: str | None) -> HardwareProfile | None:
    from fedprune import profile_store
    from fedprune.identification import identify
    from fedprune_device.identity import facts

    if name:
        return profile_store.find(name)
    try:
        found = identify(facts())
    except ProfileError as error:
        _LOG.warning("no hardware profile fits this board, so that only its disk limits what it accepts: %s", error)
        return None
    _LOG.info("profile: %s", found.describe())
    return found.profile


def _predict(arguments: argparse.Namespace) -> int:
    own = OwnLabels()
    class_names: tuple[str, ...] = ()
    if arguments.bundle is not None:
        bundle = open_bundle(arguments.bundle)
        predictor = Predictor(arguments.bundle, threads=arguments.threads)
        class_names, loss = bundle.class_names, bundle.recipe.loss
        if arguments.data is not None:
            from fedprune_device.data import load_data

            if loss != "cross_entropy":
                raise UsageError(f"--data with a model of loss {loss!r}", expected="one that predicts one class")
            classes = bundle.architecture.classes
            labels = targets(load_data(arguments.data).y_train, loss, classes)
            own = OwnLabels.of(labels, replace(bundle.recipe, logit_adjustment=True), classes)
    else:
        predictor, record = _slots(arguments.state).open(arguments.threads)
        own, loss = record.own, record.loss
    x, y = _inputs(arguments.input)
    logits = own(predictor.predict(x))
    if arguments.output is not None:
        with arguments.output.open("wb") as file:
            np.save(file, logits)
    else:
        for line in described(logits, loss, arguments.top, class_names):
            print(line)
    if y is not None and len(y):
        print(judged(logits, y, loss), file=sys.stderr)
    return int(ExitCode.OK)


def _slots(state: Path) -> Slots:
    """The serving models of a state folder that is there and may be read."""
    pointer = state / "serving" / "serving.json"
    with storage_errors(f"can't read {pointer}"):
        if not state.is_dir():
            raise StorageError(
                f"there is no folder {state}", hint="Give the folder that `fedprune-device run --state` uses."
            )
        if pointer.is_file():
            pointer.open("rb").close()
    return Slots(state / "serving")


def _inputs(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    try:
        with path.open("rb") as raw:
            found = np.load(raw, allow_pickle=False)
            if isinstance(found, np.ndarray):
                x, y = found, None
            else:
                x, y = found["x"], found["y"] if "y" in found.files else None
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}", hint=remedy(error)) from error
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} can't be read as arrays{why_unreadable(error)}", expected="a .npy array, or an .npz file with x"
        ) from error
    if not x.shape or not len(x):
        raise DataError(f"{path} holds no samples", expected="inputs [n, ...]", got=x.shape)
    try:
        if y is None:
            return checked_inputs(x), None
        return checked_samples(x, y)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _identify(arguments: argparse.Namespace) -> int:
    from fedprune.identification import identify
    from fedprune_device.identity import facts

    read = facts()
    found = identify(read)
    if arguments.json:
        print(json.dumps({"board": asdict(read), **found.to_dict()}, sort_keys=True))
    else:
        print(found.describe())
    return int(ExitCode.OK)


def _probe(arguments: argparse.Namespace) -> int:
    from fedprune_device.probe import probe

    report = probe(arguments.threads)
    if arguments.json:
        print(json.dumps(report.to_dict(), sort_keys=True))
        return int(ExitCode.OK)
    for field in fields(report):
        value = getattr(report, field.name)
        if field.name.endswith("_rate") and value is not None:
            value = f"{value / 1e9:.2f} GFLOP/s"
        elif field.name.startswith("memory_"):
            value = f"{value / 1e6:.0f} MB"
        elif field.name == "seconds":
            value = f"{value:.1f}"
        elif field.name == "latency":
            value = _latency(report)
        print(f"{field.name}: {'unknown' if value in (None, '') else value}")
    return int(ExitCode.OK)


def _latency(report: ProbeReport) -> str:
    """The table of layers' times in a few words."""
    table = report.latency
    if table is None:
        return ""
    error = f"{table.error:.1%}" if table.points else "unknown"
    return f"{table.points} measurements, median error {error}, blocks of {table.block} channels"


def _threads() -> int:
    """Half of the cores: predictions and the system need some, too."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


if __name__ == "__main__":
    sys.exit(main())
