"""The parts of a round that are timed and counted: what begins and ends each."""

from __future__ import annotations

from fedprune.coordination import commands as do
from fedprune.coordination import events as on

OF_DEVICES = ("extract", "train", "pull", "aggregate")
"""Parts of one device; `train` is from an offer to the announcement of its update."""

PARTS = ("score", *OF_DEVICES, "close", "evaluate", "round")


def begun(command: do.Command) -> tuple[str, str] | None:
    """The part that a command begins, and its device (empty if it is the whole round's); None for no part."""
    match command:
        case do.Score():
            return "score", ""
        case do.Extract():
            return "extract", command.part.device
        case do.SendOffer():
            return "train", command.device
        case do.PullUpdate():
            return "pull", command.device
        case do.Fold():
            return "aggregate", command.contribution.part.device
        case do.Close():
            return "close", ""
        case do.Evaluate():
            return "evaluate", ""
    return None


def ended(event: on.Event) -> tuple[str, str] | None:
    """The part that an event ends, and its device; None for no part."""
    match event:
        case on.Scored():
            return "score", ""
        case on.Extracted():
            return "extract", event.device
        case on.UpdateAnnounced():
            return "train", event.device
        case on.UpdateStored():
            return "pull", event.device
        case on.Folded():
            return "aggregate", event.device
        case on.Closed():
            return "close", ""
        case on.Evaluated():
            return "evaluate", ""
    return None
