"""The parts of a round that are timed and counted: what begins and ends each."""

from __future__ import annotations

from typing import Any, cast

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune_server.executor.background import device_of

# Parts of one device, which run side by side; those of the whole round have no device. `train` is from an offer to the
# announcement of its update, and includes the download.
OF_DEVICES = ("extract", "train", "pull", "aggregate")

PARTS = ("score", *OF_DEVICES, "close", "evaluate", "round")


_BEGINS: dict[type[Any], str] = {
    do.Score: "score", do.Extract: "extract", do.SendOffer: "train", do.PullUpdate: "pull", do.Fold: "aggregate",
    do.Close: "close", do.Evaluate: "evaluate",
}  # fmt: skip
_ENDS: dict[type[Any], str] = {
    on.Scored: "score", on.Extracted: "extract", on.UpdateAnnounced: "train", on.UpdateStored: "pull",
    on.Folded: "aggregate", on.Closed: "close", on.Evaluated: "evaluate",
}  # fmt: skip


def begun(command: object) -> tuple[str, str] | None:
    """The part that a command begins, and its device (empty if it is the whole round's); None for no part, and for what
    is no command."""
    begun_part = _BEGINS.get(type(command))
    if begun_part is None or (isinstance(command, do.SendOffer) and command.again):
        return None  # most devices still have their update, so that pulling continues and no training begins
    return begun_part, device_of(cast(do.Command, command)) or ""


def ended(event: object) -> tuple[str, str] | None:
    """The part that an event ends, and its device; None for no part, and for what is no event."""
    ended_part = _ENDS.get(type(event))
    return None if ended_part is None else (ended_part, getattr(event, "device", ""))
