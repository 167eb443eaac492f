"""`fedprune-server`: run a job on a fleet, look at it, take its model out."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fedprune import __version__
from fedprune.core.cli import run_command, whole_number, with_extra
from fedprune.core.errors import ExitCode
from fedprune_server.cli.alerts import add_alerts_command
from fedprune_server.cli.config import add_config_command
from fedprune_server.cli.demo import register as register_demo
from fedprune_server.cli.identity import name_of
from fedprune_server.cli.identity import register as register_identity
from fedprune_server.cli.observe import add_observe_commands
from fedprune_server.cli.operators import add_operators_command
from fedprune_server.cli.release import add_release_command
from fedprune_server.cli.rollout import add_rollout_command
from fedprune_server.cli.service import add_service_command
from fedprune_server.cli.state import add_health_command, add_state_commands
from fedprune_server.cli.store import add_store_commands

log = logging.getLogger("fedprune.server")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command("fedprune-server", build_parser, argv)


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(
        prog="fedprune-server",
        description="Train one model on a fleet of unequal boards.",
        epilog="Exit codes are explained in docs/exit-codes.md.",
    )
    parser.add_argument("--version", action="version", version=f"fedprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    add_state_commands(commands)
    register_identity(commands)
    register_demo(commands)
    add_release_command(commands)
    add_rollout_command(commands)
    add_store_commands(commands)
    add_config_command(commands)
    add_alerts_command(commands)
    add_service_command(commands)
    add_health_command(commands)
    add_observe_commands(commands)
    add_operators_command(commands)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="run a job, or go on with one after a stop or crash")
    run.add_argument("--config", type=Path, metavar="FILE", help="fleet.toml; the options below win over it")
    run.add_argument("--model", metavar="MODEL", help="model.onnx, or package.module:factory of a torch module")
    run.add_argument("--evaluation", metavar="DATA", help=".npz with x and y, or package.module:function")
    run.add_argument("--calibration", metavar="DATA", help="the same, labels not needed: for batch-norm statistics")
    run.add_argument("--state", type=Path, metavar="DIR", help="what must survive a crash (default: fedprune-state)")
    run.add_argument(
        "--database", metavar="URL", help="postgresql+psycopg://user@host/name (default: SQLite in the state folder)"
    )
    run.add_argument("--blobs", metavar="URL", help="s3://bucket/prefix (default: folder, the state folder)")
    run.add_argument("--broker", metavar="URL", help="mqtts://host[:port], mqtt://host[:port] or embedded (default)")
    run.add_argument(
        "--ca",
        type=Path,
        metavar="FILE",
        help="who vouches for the broker at mqtts://; `system` for the system's authorities (default: the fleet's own)",
    )
    run.add_argument(
        "--insecure", action="store_true", help="without identity, TLS and signatures: for trials on this machine alone"
    )
    run.add_argument("--host", help="address of the embedded broker (default: 127.0.0.1, this machine only)")
    run.add_argument(
        "--port", type=int, help="port of the embedded broker (default: 8883, or 1883 with --insecure; 0: a free one)"
    )
    run.add_argument(
        "--blob-url", metavar="URL", help="where boards find blobs on the web, too, such as https://models.example; off"
    )
    run.add_argument(
        "--serve-blobs", metavar="[ADDRESS:]PORT", help="give out blobs over HTTPS, too (default address: --host); off"
    )
    run.add_argument(
        "--console", metavar="[ADDRESS:]PORT", help="show operators the fleet in a browser (default address: 127.0.0.1)"
    )
    run.add_argument("--site", type=name_of("site"), help="devices of this site take part (default: default)")
    run.add_argument("--profiles", type=Path, metavar="DIR", help="hardware profiles beside the shipped ones")
    run.add_argument("--workers", type=whole_number, metavar="N", help="processes that make submodels (default: 1)")
    run.add_argument("--receivers", type=int, metavar="N", help="processes that take in updates (default: 0)")
    run.add_argument(
        "--workers-url", metavar="URL", help="ray:auto or ray://host:port: a cluster helps (default: processes)"
    )
    run.add_argument(
        "--keep",
        type=whole_number,
        metavar="N",
        help="global models that stay on the disk (default: 3)",
    )
    run.add_argument("--archive", action="store_true", default=None, help="keep all that `replay` needs")
    run.add_argument("--name", help="name of the job")
    run.add_argument(
        "--job", type=Path, action="append", default=[], metavar="FILE",
        help="a further job on the same boards; may be given several times",
    )  # fmt: skip
    run.add_argument("--weight", type=float, metavar="W", help="the job's share of the boards, beside further jobs")
    run.add_argument("--seed", type=int, help="keys every random number")
    run.add_argument("--rounds", type=whole_number, metavar="N", help="rounds to run")
    run.add_argument("--devices", type=whole_number, metavar="N", help="a round starts when so many devices are there")
    run.add_argument("--participation", type=float, metavar="SHARE", help="share of the devices that a round asks")
    run.add_argument(
        "--schedule", metavar="KIND", help="when the model moves: sync, semi-async or async (default: the strategy's)"
    )
    run.add_argument("--over-selection", type=float, metavar="SHARE", help="ask so many more than a round needs")
    run.add_argument("--fairness", type=float, metavar="SHARE", help="places that go to who has waited longest")
    run.add_argument("--in-flight", type=whole_number, metavar="N", help="devices that work at a time (default: all)")
    run.add_argument("--pace", type=float, metavar="X", help="give up who takes X times as long as half of the devices")
    run.add_argument("--deadline", type=float, metavar="S", help="seconds that a round waits for updates")
    run.add_argument(
        "--strategy", metavar="NAME", help="such as fedprune or subflot (docs/strategies), or package.module:function"
    )
    run.add_argument("--density", type=float, metavar="D", help="kept share on all devices; 0: the planner decides")
    run.add_argument(
        "--standby", action="store_true", help="wait while another server has the job, and go on with it if that ends"
    )
    run.add_argument(
        "--take-over", action="store_true",
        help="replace another server of this identity that runs elsewhere: it ends, and boards follow this one",
    )  # fmt: skip
    run.add_argument("--log-format", choices=("text", "json"), help="text (default), or json: an object on each line")
    run.add_argument(
        "--metrics", metavar="[ADDRESS:]PORT", help="figures for Prometheus (default address: 127.0.0.1); off"
    )
    run.add_argument("--traces", metavar="URL", help="spans of rounds to an OpenTelemetry collector, by OTLP; off")
    run.add_argument("--alert-webhook", metavar="URL", help="post alerts as JSON to this address; off")
    run.add_argument("--until-finished", action="store_true", help="end when the job is done")
    run.add_argument("--verbose", "-v", action="store_true", help="say more, such as each device's row per round")
    run.set_defaults(run=with_extra("server", _run))


def _run(arguments: argparse.Namespace) -> int:
    from fedprune.output.log_lines import logged_to_stdout
    from fedprune_server.app import StartOptions, build_app
    from fedprune_server.cli.configuration import configured
    from fedprune_server.engine.state_directory import StateFolder
    from fedprune_server.monitoring.health import Pulse

    config = configured(arguments).config
    options = StartOptions(arguments.job, arguments.insecure, arguments.take_over, arguments.until_finished)
    with ExitStack() as stack:
        stack.enter_context(logged_to_stdout(verbose=arguments.verbose, form=config.log_format))
        pulse, waited = Pulse(), None
        if arguments.standby:
            with pulse.standing_by():
                waited = stack.enter_context(StateFolder(config.state, config.database, standby=True))
            # The other server may have been started with other settings meanwhile.
            config = configured(arguments).config
        app = stack.enter_context(build_app(config, options, waited, pulse))
        with _stopped_by_signals(app.server) as signals:
            app.run()
        interrupted = bool(signals) and not app.server.finished
        if interrupted:
            log.info("stopped: the same command goes on with what %s holds", config.state)
    # SIGTERM is how a service is stopped; Ctrl-C means that the operator didn't wait for the end.
    return int(ExitCode.INTERRUPTED if interrupted and signal.SIGINT in signals else ExitCode.OK)


@contextmanager
def _stopped_by_signals(server: Any) -> Iterator[list[int]]:
    """Stop the server at SIGTERM or Ctrl-C; the signals that came are in the list."""
    came: list[int] = []

    def stop(number: int, _frame: object) -> None:
        came.append(number)  # and nothing slow: the loop may be in the middle of anything
        server.stop()

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            log.info("stopped by %s", signal.Signals(came[0]).name)


if __name__ == "__main__":
    sys.exit(main())
