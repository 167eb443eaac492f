"""The parts of a round that are timed and counted: what begins and ends each."""

from __future__ import annotations

from typing import Any, cast

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune_server.executor.background import device_of

OF_DEVICES = ("extract", "train", "pull", "aggregate")
"""Parts of one device; `train` is from an offer to the announcement of its update."""

PARTS = ("score", *OF_DEVICES, "close", "evaluate", "round")


_BEGINS: dict[type[Any], str] = {
    do.Score: "score", do.Extract: "extract", do.SendOffer: "train", do.PullUpdate: "pull", do.Fold: "aggregate",
    do.Close: "close", do.Evaluate: "evaluate",
}  # fmt: skip
_ENDS: dict[type[Any], str] = {
    on.Scored: "score", on.Extracted: "extract", on.UpdateAnnounced: "train", on.UpdateStored: "pull",
    on.Folded: "aggregate", on.Closed: "close", on.Evaluated: "evaluate",
}  # fmt: skip


def begun(what: object) -> tuple[str, str] | None:
    """The part that a command begins, and its device (empty if it is the whole round's); None for no part, and for what
    is no command."""
    part = _BEGINS.get(type(what))
    if part is None or (isinstance(what, do.SendOffer) and what.again):
        return None  # most devices have their update still, and pulling it goes on
    return part, device_of(cast(do.Command, what)) or ""


def ended(what: object) -> tuple[str, str] | None:
    """The part that an event ends, and its device; None for no part, and for what is no event."""
    part = _ENDS.get(type(what))
    return None if part is None else (part, getattr(what, "device", ""))
