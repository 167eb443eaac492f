"""`fedprune-server alerts test`: sends a test notification."""

from __future__ import annotations

import argparse
import time
from typing import Any

from fedprune.core.cli import add_json_option, print_json
from fedprune.core.errors import ConfigError, ExitCode
from fedprune_server.cli.run import load_config, run_options


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
    from fedprune_server.monitoring.notification_channels import NotificationError, notification_channels, test_message

    config = load_config(arguments).config
    channels_in_use = notification_channels(config.alerts)
    if not channels_in_use:
        raise ConfigError(
            "[alerts]", expected="a webhook or services", got="none", hint="docs/observe.md#notifications has the keys."
        )
    rows = list[dict[str, Any]]()
    for channel in channels_in_use:
        try:
            answer, code = channel.send(test_message(config.site, time.time())), ExitCode.OK
        except NotificationError as error:
            answer, code = str(error), error.exit_code
        delivered = code is ExitCode.OK
        rows.append({"channel": channel.name, "delivered": delivered, "answer": answer, "exit_code": int(code)})
        if not arguments.json:
            print(f"{channel.name}: {'delivered' if delivered else 'failed'}: {answer}", flush=True)
    if arguments.json:
        print_json(rows)
    return max(int(row["exit_code"]) for row in rows)
