"""The timed parts of a round, such as `train`: the command that begins each, and the event that ends it."""

from __future__ import annotations

from typing import Any, cast

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune_server.executor.background import command_device

# Parts of one device, which run side by side; those of the whole round have no device. `train` is from an offer to the
# announcement of its update, and includes the download.
DEVICE_PARTS = ("extract", "train", "pull", "aggregate")

ROUND_PARTS = ("score", *DEVICE_PARTS, "close", "evaluate", "round")

_STARTING_COMMANDS: dict[type[Any], str] = {
    do.Score: "score", do.Extract: "extract", do.SendOffer: "train", do.PullUpdate: "pull", do.FoldUpdate: "aggregate",
    do.Close: "close", do.Evaluate: "evaluate",
}  # fmt: skip
_ENDING_EVENTS: dict[type[Any], str] = {
    on.Scored: "score", on.Extracted: "extract", on.UpdateAnnounced: "train", on.UpdateStored: "pull",
    on.Folded: "aggregate", on.Closed: "close", on.Evaluated: "evaluate",
}  # fmt: skip


def started_part(command: object) -> tuple[str, str] | None:
    """The part that a command begins, and its device (empty for the whole round's); None if it begins no part."""
    begun_part = _STARTING_COMMANDS.get(type(command))
    if begun_part is None or (isinstance(command, do.SendOffer) and command.was_announced):
        return None  # most devices still have their update, so that pulling continues and no training begins
    return begun_part, command_device(cast(do.Command, command)) or ""


def finished_part(event: object) -> tuple[str, str] | None:
    """The part that an event ends, and its device; None if it ends no part."""
    ended_part = _ENDING_EVENTS.get(type(event))
    return None if ended_part is None else (ended_part, getattr(event, "device", ""))
