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
from fedprune.core.cli import run_command, with_extra
from fedprune.core.errors import ExitCode
from fedprune_server.cli.alerts import add_alerts_command
from fedprune_server.cli.config import add_config_command
from fedprune_server.cli.demo import register as register_demo
from fedprune_server.cli.identity import register as register_identity
from fedprune_server.cli.observe import add_observe_commands
from fedprune_server.cli.operators import add_operators_command
from fedprune_server.cli.release import add_release_command
from fedprune_server.cli.rollout import add_rollout_command
from fedprune_server.cli.service import add_service_command
from fedprune_server.cli.state import add_health_command, add_state_commands
from fedprune_server.cli.store import add_store_commands

log = logging.getLogger("fedprune.server")

_WITH_SETTINGS = ("run", "config", "alerts")


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else list(argv)
    return run_command("fedprune-server", lambda: build_parser(given), given)


def build_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser; `argv` tells whether the command needs the options of settings, which take a while."""
    parser = argparse.ArgumentParser(
        prog="fedprune-server",
        description="Train one model on a fleet of unequal boards.",
        epilog="Exit codes are explained in docs/exit-codes.md.",
    )
    parser.add_argument("--version", action="version", version=f"fedprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands, has_settings=argv is None or any(word in _WITH_SETTINGS for word in argv[:1]))
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


def _add_run(commands: Any, *, has_settings: bool) -> None:
    run = commands.add_parser("run", help="run a job, or go on with one after a stop or crash")
    run.add_argument("--config", type=Path, metavar="FILE", help="fleet.toml; the options below win over it")
    run.add_argument(
        "--insecure", action="store_true", help="without identity, TLS and signatures: for trials on this machine alone"
    )
    run.add_argument(
        "--job", type=Path, action="append", default=[], metavar="FILE",
        help="a further job on the same boards; may be given several times",
    )  # fmt: skip
    run.add_argument(
        "--standby", action="store_true", help="wait while another server has the job, and go on with it if that ends"
    )
    run.add_argument(
        "--take-over", action="store_true",
        help="replace another server of this identity that runs elsewhere: it ends, and boards follow this one",
    )  # fmt: skip
    run.add_argument("--until-finished", action="store_true", help="end when the job is done")
    run.add_argument("--verbose", "-v", action="store_true", help="log more, such as each device's row per round")
    if has_settings:
        from fedprune_server.cli.run_options import add_settings

        add_settings(run)
    run.set_defaults(run=with_extra("server", _run))


def _run(arguments: argparse.Namespace) -> int:
    from fedprune.output.log_lines import logged_to_stdout
    from fedprune_server.app import StartOptions, build_app
    from fedprune_server.cli.run_options import configured
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
