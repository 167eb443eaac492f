"""`fedprune-server alerts test`: whether notifications arrive."""

from __future__ import annotations

import argparse
import time

from fedprune.core.errors import ConfigError, ExitCode
from fedprune_server.cli.run import configured, run_options
from fedprune_server.monitoring.notifications import Channel, Message, NotificationError, channels, trial


def add_alerts(alerts: argparse.ArgumentParser) -> None:
    actions = alerts.add_subparsers(dest="action", required=True, metavar="ACTION")
    test = actions.add_parser(
        "test",
        help="send a test notification by every way that `run` with the same options would use",
        parents=[run_options()],
    )
    test.set_defaults(function=_test)


def _test(arguments: argparse.Namespace) -> int:
    config = configured(arguments).config
    found = channels(config.alerts)
    if not found:
        raise ConfigError(
            "[alerts]", expected="a webhook or mail_to", got="none", hint="docs/observe.md#notifications has the keys."
        )
    return max(_tried(channel, trial(config.site, time.time())) for channel in found)


def _tried(channel: Channel, message: Message) -> int:
    try:
        print(f"{channel.name}: delivered: {channel.send(message)}", flush=True)
    except NotificationError as error:
        print(f"{channel.name}: failed: {error}", flush=True)
        return int(error.exit_code)
    return int(ExitCode.OK)
