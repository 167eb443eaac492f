"""`fedprune-device`: take part in a fleet, predict with what was learnt, measure the board."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from typing import Any

from fedprune import __version__
from fedprune.blobs.blob_ref import LEAF
from fedprune.core.cli import run_command, whole_number
from fedprune.core.errors import ExitCode, ProfileError, ProtocolError, RuntimeUnavailableError
from fedprune.hardware.probe_report import ProbeReport
from fedprune.hardware.profile import HardwareProfile
from fedprune.runtime.blocks import turn_off, turned_off
from fedprune.wire.chunk import MAX_PACKET, MAX_PAYLOAD, PACKET_OVERHEAD
from fedprune.wire.topics import check_job
from fedprune_device.api.options import LOCAL, add_local_options
from fedprune_device.cli.collect import add_collect_command
from fedprune_device.cli.predict import add_predict_command, threads
from fedprune_device.cli.runtime import add_runtime_commands
from fedprune_device.cli.train import add_train_command
from fedprune_device.data.dataset import LocalData
from fedprune_device.engines.accelerator_options import accelerator_of, add_accelerator_options
from fedprune_device.engines.engine_command import add_engine_command
from fedprune_device.enrolment.membership import add_join_command, add_membership, checked_urls, join_first, membership
from fedprune_device.hardware.thermal_guard import COOL_C, HOT_C, ThermalGuard, condition
from fedprune_device.network.status import BoardStatus
from fedprune_device.privacy.policy import add_policy_option, read_policy
from fedprune_device.serving.reduced_precision import SERVE
from fedprune_device.storage.directory_owner import DirectoryOwner

_LOG = logging.getLogger("fedprune.device")

_MOST_HOURS = 8760.0


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
    add_train_command(commands)
    add_predict_command(commands)
    add_collect_command(commands)
    probe = commands.add_parser("probe", help="measure this board, which takes about fifteen seconds")
    probe.add_argument("--json", action="store_true", help="as JSON, for programs")
    probe.add_argument("--threads", type=whole_number, default=threads(), metavar="N", help="threads for the benchmark")
    probe.set_defaults(run=_probe)
    identify = commands.add_parser("identify", help="say which hardware profile fits this board, and why")
    identify.add_argument("--json", action="store_true", help="as JSON, for programs")
    identify.set_defaults(run=_identify)
    add_engine_command(commands)
    add_runtime_commands(commands)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="take part in a fleet, or go on after a stop, crash or power cut")
    add_membership(run)
    run.add_argument(
        "--insecure", action="store_true", help="without identity, TLS and signatures: on the server's machine alone"
    )
    run.add_argument("--seed", type=int, default=0, help="of the split into training and test samples (default: 0)")
    run.add_argument(
        "--validation-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the training samples, set aside for what training and fleet decide by (default: 0)",
    )
    run.add_argument("--profile", metavar="NAME", help="a hardware profile's name or file (default: what fits)")
    add_accelerator_options(run)
    run.add_argument("--threads", type=whole_number, default=threads(), metavar="N", help="default: half of the cores")
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
        "--no-blocks", action="store_true", help="train with standard operators alone, not with channels in blocks"
    )
    run.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="how much is said on stderr (default: info)",
    )
    add_local_options(run)
    add_policy_option(run)
    run.add_argument(
        "--serve",
        choices=SERVE,
        default=SERVE[0],
        help="the precision at which the model predicts, as long as it says what float32 says (default: float32)",
    )
    run.add_argument(
        "--serve-job",
        type=_job,
        metavar="JOB",
        help="models of this job alone serve predictions (default: the newest model, whichever job it is of)",
    )
    run.add_argument(
        "--train-alone",
        type=_hours,
        default=0.0,
        metavar="HOURS",
        help="train on while the server is away, so often (default: wait for it)",
    )
    run.add_argument(
        "--max-packet",
        type=_packet,
        default=MAX_PACKET,
        metavar="BYTES",
        help="what the broker lets through; less is found out, too, at the price of a pause (default: %(default)s)",
    )
    run.set_defaults(run=_run)


def _job(text: str) -> str:
    try:
        return check_job(text)
    except ProtocolError as error:
        raise argparse.ArgumentTypeError(f"expected {error.expected}, got {text!r}") from error


def _packet(text: str) -> int:
    low, high = LEAF + PACKET_OVERHEAD, MAX_PAYLOAD + PACKET_OVERHEAD
    if not text.isdecimal() or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"expected {low} to {high} bytes, got {text!r}")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    from fedprune_device.agent.agent import Agent
    from fedprune_device.api.options import answering, local_address, open_samples
    from fedprune_device.hardware.probe import check_runtime, probe_apart
    from fedprune_device.hardware.process_memory import own_memory, process_memory
    from fedprune_device.launcher.sd_notify import starting
    from fedprune_device.releases.release_agent import ReleaseAgent, board_installer
    from fedprune_device.releases.release_trial import ReleaseTrial
    from fedprune_device.releases.watchdog import Watchdog
    from fedprune_device.storage.state_directory import DeviceStore
    from fedprune_device.telemetry.reporter import LogReporter, reporting

    logging.basicConfig(
        level=arguments.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    checked_urls(arguments, insecure=arguments.insecure)
    if arguments.no_blocks:
        turn_off()
    turned_off()  # what is wrong with the setting comes first
    floor = read_policy(arguments.privacy)
    care = ThermalGuard(arguments.pause_above, arguments.resume_below)
    trial = ReleaseTrial.current()
    if trial is not None:
        trial.check(arguments.state / "serving")
    profile = _profile(arguments.profile)
    tier = accelerator_of(arguments, profile)
    address = local_address(arguments)
    keeper = None if address is None else tier.keeper(arguments.state)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    owner = DirectoryOwner(arguments.device, arguments.site)
    with ExitStack() as stack, _stopped_children(stopped):
        fixed = None if arguments.data == LOCAL else open_samples(arguments, stack)  # what is wrong with it comes first
        store = stack.enter_context(DeviceStore(arguments.state, owner=owner))
        store.hold_to(floor)
        if store.privacy.private:
            _LOG.info("privacy: %s", store.privacy.describe())
        log, crashes = stack.enter_context(reporting(arguments.state, arguments.device, lambda: store.privacy.private))
        data = open_samples(arguments, stack) if fixed is None else fixed
        if trial is None:  # a release on trial has checked it
            check_runtime()  # before this process loads it, which may end the process
        agents: list[Agent] = []  # the link asks the agent for its will, and the agent speaks through the link
        stack.enter_context(
            answering(
                address,
                arguments,
                data,
                lambda: (agents[0].standing if agents else BoardStatus()).to_dict(),
                cuda=tier.cuda and keeper is None,  # what an engine is measured by must not share its faults
                keeper=keeper,
            )
        )
        member = membership(arguments, insecure=arguments.insecure)
        with starting("waiting to be let into the fleet"):
            if not join_first(member, arguments, patient=arguments.patient, stopped=stopped):
                return int(ExitCode.OK)
        if member.identity is not None:
            owner.claim(arguments.state)
        link, wire = member.open(lambda: agents[0].will())
        report = None
        if not arguments.no_probe:
            held_back = own_memory()  # before onnxruntime is loaded here, which takes memory that the probe finds free
            report = probe_apart(arguments.threads, memory_file=arguments.state / "layer_times.json")
            # A plan counts this process and its samples, which hold memory already.
            held = data.bytes if isinstance(data, LocalData) else 0
            taken = process_memory()
            free = min(report.memory_total, report.memory_available + held_back)
            # On a GPU there are no blocks, whatever the processor beside it has.
            report = replace(
                report,
                memory_available=free,
                block=0 if tier.cuda else report.block,
                process_bytes=None if taken is None else max(taken - held, 2**20),
            )
            shown = {**report.to_dict(), "latency": _latency(report), "forms": _forms(report)}
            _LOG.info("probe: %s", json.dumps(shown))
        releases = ReleaseAgent(
            wire,
            arguments.device,
            arguments.site,
            board_installer(member.identity),
            quiet=lambda: agents[0].quiet,
            restart=lambda: agents[0].stop(),
        )
        heart = Watchdog(releases, trial)
        _LOG.info("board: %s", condition())
        agent = Agent(
            arguments.device,
            arguments.site,
            store,
            LogReporter(heart, arguments.device, arguments.site, log, crashes),
            data,
            profile=profile,
            threads=arguments.threads,
            cuda=tier.cuda,
            probe=report,
            care=care,
            alone=3600 * arguments.train_alone,
            answers=lambda: "" if keeper is None else keeper.status,
            precision=arguments.serve,
            serves=arguments.serve_job or "",
            max_packet=arguments.max_packet,
            web=member.web_context,
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


@contextmanager
def _stopped_children(stopped: threading.Event) -> Iterator[None]:
    """End the body without an error where the service manager's stop signal ended a child process of a check, too."""
    try:
        yield
    except RuntimeUnavailableError:
        if not stopped.is_set():
            raise


def _profile(name: str | None) -> HardwareProfile | None:
    from fedprune.hardware import profile_store
    from fedprune.hardware.identification import identify
    from fedprune_device.hardware.board_facts import facts

    if name:
        return profile_store.find(name)
    try:
        found = identify(facts())
    except ProfileError as error:
        _LOG.warning("no hardware profile fits this board, so that only its disk limits what it accepts: %s", error)
        return None
    _LOG.info("profile: %s", found.describe())
    return found.profile


def _identify(arguments: argparse.Namespace) -> int:
    from fedprune.hardware.identification import identify
    from fedprune_device.hardware.board_facts import facts

    read = facts()
    found = identify(read)
    if arguments.json:
        print(json.dumps({"board": asdict(read), **found.to_dict()}, sort_keys=True))
    else:
        print(found.describe())
    return int(ExitCode.OK)


def _probe(arguments: argparse.Namespace) -> int:
    from fedprune_device.hardware.probe import probe

    turned_off()  # what is wrong with the setting comes first
    report = probe(arguments.threads, begin=_begin)
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
        elif field.name == "forms":
            value = _forms(report)
        if value not in (None, ""):
            print(f"{field.name}: {value}")
    return int(ExitCode.OK)


def _begin(what: str, seconds: float) -> None:
    """Name a measurement that begins, where no spinner turns."""
    if not sys.stderr.isatty():
        print(f"measuring {what}: about {seconds:.0f} s, longer on a slow board", file=sys.stderr, flush=True)


def _latency(report: ProbeReport) -> str:
    """The table of layers' times in a few words."""
    table = report.latency
    if table is None:
        return ""
    error = f"{table.error:.1%}" if table.points else "unknown"
    steps = "channel by channel" if table.block == 1 else f"in steps of {table.block} channels"
    return f"{table.points} measurements of layers, median error {error}, times grow {steps}"


def _forms(report: ProbeReport) -> str:
    """The times of convolutions' forms in a few words."""
    table = report.forms
    if table is None:
        return ""
    return f"{sum(len(times) for _, times in table.rows)} measurements of {len(table.rows)} shapes"


def _hours(text: str) -> float:
    number = float(text)
    if not 0 < number <= _MOST_HOURS:
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most {_MOST_HOURS:g} hours, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
