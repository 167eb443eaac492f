"""Messages about a job between an aggregator and its parent: events, commands, and rows of the state, as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.errors import ProtocolError
from fedprune.jobs.state import Device, Phase, Task
from fedprune.wire.topics import check_name

Body = Mapping[str, Any]

UP: tuple[type[Any], ...] = (
    on.Extracted,
    on.UpdateAnnounced,
    on.UpdateStored,
    on.UpdateRejected,
    on.OfferRefused,
    on.Folded,
    on.Measured,
    on.AddedUp,
    on.Reconnected,
    on.Disconnected,
)
"""Events that an aggregator reports."""

_EVENTS = {kind.__name__: kind for kind in UP}
_PLAIN: Mapping[str, type[Any]] = {
    kind.__name__: kind for kind in (do.SendOffer, do.PullUpdate, do.Acknowledge, do.Cancel, do.TellFinished, do.Finish)
}

_TYPES: Mapping[str, type[Any] | tuple[type[Any], ...]] = {"str": str, "int": int, "float": (int, float)}

_HEAD = ("round", "model", "ranking", "order", "memory", "paused")


@dataclass(frozen=True)
class Steered:
    """A parent's decisions about a job: rows of its state, and commands.

    Attributes:
        head: Attributes of the state; empty if they haven't changed.
        devices: Rows by device; None for a device that has moved to another region.
        tasks: Rows of parts by device, likewise.
        whole: The rows are all rows of this region.
    """

    job: str
    head: Body = field(default_factory=dict)
    devices: Mapping[str, Device | None] = field(default_factory=dict)
    tasks: Mapping[str, Task | None] = field(default_factory=dict)
    commands: tuple[do.Command, ...] = ()
    whole: bool = False


def event_body(event: on.Event) -> list[Any]:
    return [type(event).__name__, vars(event)]


def read_event(body: Any) -> on.Event:
    """An event of an aggregator. Raises `ProtocolError` for an invalid one."""
    event: on.Event = _made(_EVENTS, *_named(body))
    return event


def head_of(state: State) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _HEAD} | {"phase": state.phase.value}


def device_body(device: Device, region: str) -> dict[str, Any]:
    """A device's row for a region: plans, probes and most of profiles are the parent's."""
    body = {k: getattr(device, k) for k in device.__match_args__ if k not in ("plan", "probe")}
    profile = {k: device.profile[k] for k in ("name", "title") if k in device.profile}
    past, buffer = device.past, device.buffer
    if past is not None:
        past = past | {"region": below(past.get("region", ""), region)}
    if buffer is not None and (found := buffer.get("contribution")) is not None:
        buffer = buffer | {"contribution": found | {"region": below(found.get("region", ""), region)}}
    return body | {
        "probe": None, "profile": profile, "region": below(device.region, region), "past": past, "buffer": buffer,
    }  # fmt: skip


def places(device: Device | None, task: Task | None) -> set[str]:
    """The aggregators that a device's rows concern: where it is connected, and where updates of it are."""
    found = set() if task is None else {task.region}
    if device is not None:
        contribution = (device.buffer or {}).get("contribution") or {}
        found |= {device.region, (device.past or {}).get("region", ""), contribution.get("region", "")}
    return {first(path) for path in found if path}


def first(path: str) -> str:
    """The first aggregator of a path."""
    return path.partition("/")[0]


def away_too_long(path: str) -> str:
    """Why parts of a region don't count whose aggregator is no longer waited for."""
    return f"its aggregator {first(path)} was away for too long"


def joined(region: str, path: str) -> str:
    """The path, seen from the parent, of a path below the aggregator `region`. Raises `ProtocolError` if the path has
    a part that is no name."""
    return "/".join([region, *(check_name(part, "region") for part in path.split("/"))]) if path else region


def task_body(task: Task, region: str) -> dict[str, Any]:
    return task.to_dict() | {"region": below(task.region, region)}


def below(path: str, region: str) -> str:
    """A path relative to `region`, as its aggregator uses it."""
    return path.removeprefix(region).removeprefix("/") if path == region or path.startswith(f"{region}/") else path


def command_body(command: do.Command, region: str) -> list[Any]:
    """A command for an aggregator, with paths relative to its region."""
    if isinstance(command, do.Fold):
        command = replace(command, contribution=_below(command.contribution, region))
    elif isinstance(command, do.Measure):
        command = replace(command, contributions=tuple(_below(c, region) for c in command.contributions))
    return [type(command).__name__, vars(command)]


def steered_body(
    region: str,
    job: str,
    head: Mapping[str, Any] | None = None,
    devices: Mapping[str, Any] | None = None,
    tasks: Mapping[str, Any] | None = None,
    commands: Sequence[do.Command] = (),
    *,
    whole: bool = False,
) -> dict[str, Any]:
    """JSON of a parent's decisions about a job, as `read_steered` reads it."""
    return {
        "kind": "steered",
        "job": job,
        "head": head or {},
        "devices": devices or {},
        "tasks": tasks or {},
        "commands": [command_body(c, region) for c in commands],
        "whole": whole,
        "more": False,
    }


def _below(found: do.Contribution, region: str) -> do.Contribution:
    return replace(found, region=below(found.region, region))


def read_steered(body: Body) -> Steered:
    """A parent's decisions from JSON. Raises `ProtocolError` if it can't be read."""
    try:
        head = dict(body["head"])
        if head:
            head["phase"] = Phase(head["phase"])
        devices = {str(n): None if row is None else Device.from_dict(row) for n, row in body["devices"].items()}
        tasks = {str(n): None if row is None else Task.from_dict(row) for n, row in body["tasks"].items()}
        commands = tuple(_command(c) for c in body["commands"])
        return Steered(str(body["job"]), head, devices, tasks, commands, bool(body["whole"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProtocolError(f"decisions of a parent ({type(error).__name__}: {error})") from error


def whole_of(parts: Sequence[Steered]) -> Steered:
    """One `Steered` of the parts in several messages."""
    devices = {name: row for part in parts for name, row in part.devices.items()}
    tasks = {name: row for part in parts for name, row in part.tasks.items()}
    return replace(parts[-1], devices=devices, tasks=tasks)


def _command(body: Any) -> do.Command:
    kind, values = _named(body)
    reader = _READERS.get(kind)
    command: do.Command = _made(_PLAIN, kind, values) if reader is None else reader(values)
    return command


def _extract(values: Body) -> do.Extract:
    coding = dict(values["coding"])
    held = None if coding["held"] is None else do.Held.from_dict(coding["held"])
    basis, part = do.Basis.from_dict(values["basis"]), do.Part.from_dict(values["part"])
    codecs = do.Coding(**{**coding, "held": held})
    return do.Extract(basis, part, codecs, int(values["accumulate"]), str(values["unit"]))


def _fold(values: Body) -> do.Fold:
    return do.Fold(**{**values, "contribution": do.Contribution.from_dict(values["contribution"])})


def _measure(kind: type[do.Measure]) -> Callable[[Body], do.Measure]:
    def read(values: Body) -> do.Measure:
        return kind(**{**values, "contributions": tuple(map(do.Contribution.from_dict, values["contributions"]))})

    return read


_READERS: Mapping[str, Callable[[Body], do.Command]] = {
    "Extract": _extract,
    "Fold": _fold,
    "Measure": _measure(do.Measure),
    "AddUp": _measure(do.AddUp),
}


def _named(body: Any) -> tuple[str, Body]:
    if not isinstance(body, list) or len(body) != 2 or not isinstance(body[1], dict):
        raise ProtocolError("an event or command", expected="its name and its values", got=repr(body)[:80])
    return str(body[0]), body[1]


def _made(kinds: Mapping[str, type[Any]], kind: str, values: Body) -> Any:
    if kind not in kinds:
        raise ProtocolError("kind of event or command", expected=", ".join(kinds), got=kind[:80])
    types = {f.name: f.type for f in fields(kinds[kind])}
    for name, value in values.items():
        expected = _TYPES.get(str(types.get(name)))
        if expected is not None and (not isinstance(value, expected) or isinstance(value, bool)):
            raise ProtocolError(f"{kind}: {name}", expected=str(types[name]), got=repr(value)[:80])
    try:
        return kinds[kind](**{k: v for k, v in values.items() if k in types})
    except TypeError as error:
        raise ProtocolError(f"{kind} of an aggregator or parent ({error})") from error
