"""`fedprune-server alerts test`: sends a test notification."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from fedprune.core.cli import add_json_option, print_json
from fedprune.core.errors import ConfigError, ExitCode
from fedprune_server.cli.run import load_config, run_options

if TYPE_CHECKING:
    from fedprune_server.monitoring.notification_channels import Message, NotificationChannel


def add_alerts(alerts: argparse.ArgumentParser) -> None:
    actions = alerts.add_subparsers(dest="action", required=True, metavar="ACTION")
    test = actions.add_parser(
        "test",
        help="send a test notification by every way that `run` with the same options would use",
        parents=[run_options()],
    )
    add_json_option(test)
    test.set_defaults(function=_test)


def _test(arguments: argparse.Namespace) -> int:
    from fedprune_server.monitoring.notification_channels import notification_channels, test_message

    config = load_config(arguments).config
    channels_in_use = notification_channels(config.alerts)
    if not channels_in_use:
        raise ConfigError(
            "[alerts]", expected="a webhook or services", got="none", hint="docs/observe.md#notifications has the keys."
        )
    rows = []
    for channel in channels_in_use:
        rows.append(_test_channel(channel, test_message(config.site, time.time())))
        if not arguments.json:
            row = rows[-1]
            print(f"{row['channel']}: {'delivered' if row['delivered'] else 'failed'}: {row['answer']}", flush=True)
    if arguments.json:
        print_json(rows)
    return max(int(row["exit_code"]) for row in rows)


def _test_channel(channel: NotificationChannel, message: Message) -> dict[str, Any]:
    from fedprune_server.monitoring.notification_channels import NotificationError

    try:
        answer, code = channel.send(message), ExitCode.OK
    except NotificationError as error:
        answer, code = str(error), error.exit_code
    return {"channel": channel.name, "delivered": code is ExitCode.OK, "answer": answer, "exit_code": int(code)}
