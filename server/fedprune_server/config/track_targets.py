"""The setting `track`: which experiment trackers get a job's rounds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedprune.core.errors import ConfigError, KeyPath, Subject, did_you_mean, value_text
from fedprune_server.config.alert_settings import OFF
from fedprune_server.trackers.tracker import TOOLS, tracker_class

_FORMS = ", ".join(f"`{tool}[:{tracker_class(tool).destination_form}]`" for tool in TOOLS)
TRACK_TEXT = f"Experiment trackers that get every round: {_FORMS}, several with commas; `off` for none."
TRACK_METAVAR = "TOOL[:DESTINATION],..."


@dataclass(frozen=True)
class TrackTarget:
    """An experiment tracker, and where in it the run goes; empty for the tool's usual place."""

    tool: str
    destination: str = ""

    def __str__(self) -> str:
        return f"{self.tool}:{self.destination}" if self.destination else self.tool


def track_targets(text: str, what: Subject) -> tuple[TrackTarget, ...]:
    """The trackers of a setting, which errors name as `what`. Raises `ConfigError` if one is unknown, comes twice, or
    has a password in its address."""
    if text == OFF:
        return ()
    targets = []
    for entry in text.split(","):
        tool, colon, destination = entry.strip().partition(":")
        if tool not in TOOLS or (colon and not destination) or not entry.isprintable():
            raise ConfigError(
                what,
                expected=f"{', '.join(TOOLS)}, each alone or with :DESTINATION, and commas between them, or {OFF!r}",
                got=f"{value_text(entry.strip())}{did_you_mean(tool, TOOLS)}",
            )
        # Settings are stored, shown and backed up, so that they must not hold a tracker's password.
        if "@" in destination.partition("://")[2].partition("/")[0]:
            raise ConfigError(
                what, expected="an address without a user", got=value_text(destination.rpartition("@")[2]),
                hint="It would be stored with the settings. Give the whole address in the variable "
                f"MLFLOW_TRACKING_URI, and {tool} alone here.",
            )  # fmt: skip
        targets.append(TrackTarget(tool, destination))
    if len(set(targets)) < len(targets):
        raise ConfigError(what, expected="each of them once", got=value_text(text))
    return tuple(targets)


def anchor_track_folders(text: str, folder: Path, setting: KeyPath) -> str:
    """The setting, whose path errors name, with trackers' folders counted from `folder`.

    Raises `ConfigError` if such a folder's path has a comma, which separates trackers.
    """
    entries = []
    for tool, colon, destination in (entry.strip().partition(":") for entry in text.split(",")):
        if destination and tool in TOOLS and tracker_class(tool).takes_folder:
            destination = str(folder / destination)
            if "," in destination:
                raise ConfigError(
                    "a tracker's folder",
                    path=setting,
                    expected="a path without commas",
                    got=destination,
                    hint="Give an absolute path without commas, or rename the folder.",
                )
        entries.append(f"{tool}{colon}{destination}")
    return ",".join(entries)
