"""Events, commands and rows arrive at the other side as they were, and what is malformed is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.errors import ProtocolError
from fedprune.jobs.state import Device, Phase, Progress, State, Task
from fedprune_server.aggregators.messages import (
    UP,
    command_body,
    device_body,
    event_body,
    head_of,
    read_event,
    read_steered,
    task_body,
)

pytestmark = pytest.mark.soak

PAST = do.Past(1, "a" * 64, "b" * 64, (3,), None, "int8", "c" * 64)
PART = do.Part("ant", 2, (3, 4), 0.5, 10, PAST, 1)
BASIS = do.Basis(3, "d" * 64, "e" * 64, None, {"velocity": "f" * 64})
FOUND = do.Contribution(BASIS, PART, "a" * 64, None, "b" * 64, 10, 5, (3, 4), None, None, {"w": 0.5}, "north/valley")
MEMORY = {"velocity": "f" * 64}
EVENTS = [
    on.Extracted(3, "ant", 1, {"widths": [3], "weights": {"sha256": "a" * 64}}),
    on.UpdateAnnounced("ant", 3, 1, "a" * 64, {"sha256": "b" * 64}, 10, 5, {"accuracy": 0.5}),
    on.UpdateStored("ant", 3, 1, "a" * 64, "valley"),
    on.UpdateRejected("ant", 3, 1, "it isn't finite", "malformed", "valley"),
    on.OfferRefused("ant", 3, 1, "no memory", region="valley"),
    on.Folded("ant", 3, 1),
    on.Measured(3, 7, {"ant": {"": 0.25}}, {"bee": "damaged"}),
    on.AddedUp(3, 8, "a" * 64),
    on.Reconnected("valley"),
    on.Disconnected("valley", "it was away for too long"),
]
COMMANDS = [
    do.Extract(BASIS, PART, do.Coding("int8", None, do.Held("a" * 64, "b" * 64, (3,), None)), 2),
    do.Extract(BASIS, PART),
    do.Fold(3, "a" * 64, MEMORY, FOUND),
    do.Measure(3, 7, "a" * 64, MEMORY, (FOUND,)),
    do.AddUp(3, 8, "a" * 64, MEMORY, (FOUND, FOUND)),
    do.SendOffer("ant", 3, 1, {"widths": [3]}),
    do.PullUpdate("ant", 3, 1, {"sha256": "a" * 64}),
    do.Acknowledge("ant", 3, 1, "a" * 64),
    do.Cancel("ant", 3, 1, "the round is over"),
    do.TellFinished("ant", "a" * 64),
    do.Finish("a" * 64),
]


def sent(body: Any) -> Any:
    return json.loads(json.dumps(body, default=vars))


def steered(**changes: Any) -> dict[str, Any]:
    body = {"kind": "steered", "job": "j", "head": {}, "devices": {}, "tasks": {}, "commands": [], "whole": False}
    return body | changes


def test_there_is_an_example_of_every_event() -> None:
    assert {type(e) for e in EVENTS} == set(UP)


@pytest.mark.parametrize("event", EVENTS, ids=lambda e: type(e).__name__)
def test_events_arrive_as_they_were(event: on.Event) -> None:
    found = read_event(sent(event_body(event)))
    assert vars(found) | {"devices": None} == vars(event) | {"devices": None}
    assert list(getattr(found, "devices", ())) == list(getattr(event, "devices", ()))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: type(c).__name__)
def test_commands_arrive_as_they_were(command: do.Command) -> None:
    assert read_steered(steered(commands=sent([command_body(command, "coast")]))).commands == (command,)


def test_an_aggregator_knows_its_own_updates_by_an_empty_region_and_those_below_by_their_path() -> None:
    found = read_steered(steered(commands=sent([command_body(do.Fold(3, "a" * 64, {}, FOUND), "north")]))).commands
    assert isinstance(found[0], do.Fold)
    assert found[0].contribution.region == "valley"
    here = command_body(do.AddUp(3, 8, "a" * 64, {}, (FOUND,)), "north/valley")
    assert read_steered(steered(commands=sent([here]))).commands[0].contributions[0].region == ""  # type: ignore[union-attr]


def test_rows_arrive_as_they_were_without_what_the_parent_alone_needs() -> None:
    state = State("a" * 64, 3, Phase.TRAINING, ranking="b" * 64, memory=MEMORY, paused=True)
    device = Device(5, True, {"name": "pi", "title": "Pi", "train_rate": 3}, {"x": 1}, 10, {"y": 2}, region="north")
    device.past, device.held, device.widths = (
        {"weights": "c" * 64, "region": "north/valley"},
        {"ranking": "d" * 64},
        (3, 4),
    )
    task = Task(1, (3, 4), progress=Progress.STORED, offer={"widths": [3]}, weights="e" * 64, region="north/valley")
    rows = {"ant": device_body(device, "north"), "bee": None}
    body = steered(head=head_of(state), devices=rows, tasks={"ant": task_body(task, "north")}, whole=True)
    found = read_steered(sent(body))
    assert found.whole
    assert found.head["phase"] is Phase.TRAINING
    assert {k: v for k, v in found.head.items() if k != "phase"} == {
        "round": 3, "model": "a" * 64, "ranking": "b" * 64, "order": None, "memory": MEMORY, "paused": True,
    }  # fmt: skip
    assert found.devices["bee"] is None
    copy = found.devices["ant"]
    assert copy is not None
    assert copy.to_dict() == device.to_dict() | {
        "profile": {"name": "pi", "title": "Pi"}, "probe": None, "plan": None, "region": "",
        "past": {"weights": "c" * 64, "region": "valley"},
    }  # fmt: skip
    part = found.tasks["ant"]
    assert part is not None
    assert part.to_dict() == task.to_dict() | {"region": "valley"}


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        ["Folded"],
        ["Folded", []],
        ["Closed", {}],
        ["Folded", {"device": "ant"}],
        ["Folded", {"device": 3, "round": 1, "attempt": 1}],
        ["Folded", {"device": "ant", "round": "1", "attempt": 1}],
        ["Folded", {"device": "ant", "round": True, "attempt": 1}],
    ],
    ids=str,
)
def test_malformed_events_are_refused(body: Any) -> None:
    with pytest.raises(ProtocolError):
        read_event(body)


@pytest.mark.parametrize(
    "changes",
    [
        {"head": {"phase": "resting"}},
        {"head": 3},
        {"devices": {"ant": {"session": 3}}},
        {"tasks": {"ant": {"attempt": 3, "widths": [3], "progress": "lost"}}},
        {"tasks": []},
        {"commands": [["Close", {}]]},
        {"commands": [["Extract", {"basis": {}}]]},
        {"commands": [["Cancel", {"device": "ant"}]]},
        {"commands": 3},
    ],
    ids=str,
)
def test_malformed_decisions_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        read_steered(steered(**changes))
