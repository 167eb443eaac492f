"""`fedprune-server alerts test`: whether notifications arrive."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from fedprune.core.cli import with_extra
from fedprune.core.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from fedprune_server.monitoring.notifications import Channel, Message


def add_alerts_command(commands: Any) -> None:
    alerts = commands.add_parser("alerts", help="try the notifications of alerts")
    actions = alerts.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "send a test notification by every way that `run` with the same options would use"
    test = actions.add_parser(
        "test",
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        parents=[commands.choices["run"]],
        add_help=False,
    )
    test.set_defaults(run=with_extra("server", _test))


def _test(arguments: argparse.Namespace) -> int:
    from fedprune_server.cli.run_options import configured
    from fedprune_server.monitoring.notifications import channels, trial

    config = configured(arguments).config
    found = channels(config.alerts)
    if not found:
        raise ConfigError(
            "[alerts]", expected="a webhook or mail_to", got="none", hint="docs/observe.md#notifications has the keys."
        )
    return max(_tried(channel, trial(config.site, time.time())) for channel in found)


def _tried(channel: Channel, message: Message) -> int:
    from fedprune_server.monitoring.notifications import NotificationError

    try:
        print(f"{channel.name}: delivered: {channel.send(message)}", flush=True)
    except NotificationError as error:
        print(f"{channel.name}: failed: {error}", flush=True)
        return int(error.exit_code)
    return int(ExitCode.OK)
