"""The page of all settings, from the classes that check them: docs/reference/settings.md."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Collection
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Schedule, Staleness
from fedprune.model.recipe import Recipe
from fedprune.updates.privacy import Privacy
from fedprune_server.cli.main import build_parser
from fedprune_server.config.alert_settings import AlertSettings
from fedprune_server.config.server_config import SERVER_KEYS, TABLE_KEYS, ServerConfig
from manual.docstring import attributes

_HEAD = """# Settings

<!-- Made by `python -m manual`: change the classes instead. -->

Every key of a `fleet.toml` with its default. [Configure a job](../configure-a-job.md#fleettoml) shows such a file. A
[simulation](../simulate.md) has further tables. Options of `fedprune-server run` take precedence over the file.
"""
_SCHEDULE = """`kind`, also `--schedule`, is `sync`, `semi-async` or `async`
([when to take which](../rounds.md#schedules)).
Left out, the strategy's own schedule holds. Further keys:
"""
_RENAMED = {"deadline_s": "deadline"}


def page() -> str:
    """The page, in Markdown."""
    options = _options()
    said = _descriptions(ServerConfig)
    rows = [
        f"| `[{table}] {key}` | {_option(name, options)} | {_cell(said[name])} |"
        for name, (table, key) in TABLE_KEYS.items()
    ]
    parts = [
        _HEAD,
        "## The model and its data\n",
        "\n".join(["| key | option | |", "|---|---|---|", *rows]) + "\n",
        "## `[job]`\n",
        _table(Job, options, leave={"recipe", "options", "privacy", "schedule"}),
        "`[job.options]` are the strategy's own settings: [its page](../strategies/README.md) has them.\n",
        "## `[job.recipe]`\n",
        "How boards train.\n",
        _table(Recipe, set()),
        "## `[job.privacy]`\n",
        "What the page on [privacy](../privacy.md) is about.\n",
        _table(Privacy, set()),
        "## `[job.schedule]`\n",
        _SCHEDULE,
        _table(Schedule, set(), leave={"kind", "participation", "deadline_s", "staleness"}),
        "### `staleness`\n",
        'A table within: `staleness = { decay = "polynomial", a = 0.5 }`.\n',
        _table(Staleness, set()),
        "## `[server]`\n",
        _table(ServerConfig, options, only=SERVER_KEYS),
        "## `[alerts]`\n",
        "Who is [notified of alerts](../observe.md#notifications). `--alert-webhook` sets `webhook`.\n",
        _table(AlertSettings, set()),
    ]
    return "\n".join(parts)


def _options() -> set[str]:
    """The options of `fedprune-server run`."""
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            run: argparse.ArgumentParser = action.choices["run"]
            return {name.removeprefix("--") for inner in run._actions for name in inner.option_strings}
    return set()


def _table(
    cls: type[Any], options: Collection[str], *, only: Collection[str] | None = None, leave: Collection[str] = ()
) -> str:
    said = _descriptions(cls)
    rows = ["| key | default | option | |", "|---|---|---|---|"]
    for field in fields(cls):
        if field.name not in leave and (only is None or field.name in only):
            option = _option(field.name, options)
            rows.append(f"| `{field.name}` | {_default(field)} | {option} | {_cell(said[field.name])} |")
    if not any("--" in row.split(" | ")[2] for row in rows[2:]):
        rows = [
            "|".join(row.replace("\\|", "\0").split("|")[i] for i in (0, 1, 2, 4, 5)).replace("\0", "\\|")
            for row in rows
        ]
    return "\n".join(rows) + "\n"


def _descriptions(cls: type[Any]) -> dict[str, str]:
    return {f.name: f.metadata["text"] for f in fields(cls) if "text" in f.metadata} or attributes(cls)


def _option(name: str, options: Collection[str]) -> str:
    option = _RENAMED.get(name, name).replace("_", "-")
    return f"`--{option}`" if option in options else ""


def _default(field: Field[Any]) -> str:
    if field.default is MISSING:
        made = field.default_factory() if field.default_factory is not MISSING else None
        return "" if made is None else f"`{json.dumps(made)}`"
    value = field.default
    if value is None:
        return ""
    return f"`{json.dumps(str(value) if isinstance(value, Path) else value)}`"


def _cell(text: str) -> str:
    outside = re.split(r"(`[^`]*`)", text)
    shown = [part if part.startswith("`") else part.replace("*", "\\*").replace("_", "\\_") for part in outside]
    return "".join(shown).replace("|", "\\|")
