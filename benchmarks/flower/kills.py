"""What becomes of a job when a client or a server is killed in the middle of a round, and started again or not.

Killed is a process with all that it has started, at once, as in a power cut, while the first client trains in round
`AT`. What is started again is started by the same command.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.flower.material import Job
from benchmarks.flower.measure import Make, apart, running, wait
from benchmarks.flower.meter import Meter
from benchmarks.flower.sides import Fedprune, Flower, Model, Side
from benchmarks.swarm.site import Site
from fedprune.core.errors import FedpruneError

AT = 2
CLIENTS, ROUNDS, EPOCHS = 4, 4, 200
"""Few clients that train for some seconds, so that there is a middle of a round."""

DEADLINE_S = 100.0
"""Seconds after which a round continues without what is missing, on both sides."""

PATIENCE_S = 90.0
"""Seconds without a new round after which a job counts as stuck."""

_AGAIN_S = 5.0
"""Seconds until a server is started again."""

_TRAIN_S = 240.0
_POLL_S = 0.2

Events = list[dict[str, Any]]
Kill = Callable[[Side, Site, Meter, Callable[[str], None]], None]

JOB = Job(CLIENTS, ROUNDS, EPOCHS, deadline_s=DEADLINE_S)
SHORT = replace(JOB, present=CLIENTS - 1)
"""The same where a client stays away while a round begins; fedprune's first then begins with who came first."""


def calm(folder: Path, make: Make) -> Model:
    """The same job without a kill.

    Raises:
        FedpruneError: It doesn't end.
    """
    with running(folder, JOB, make) as (side, _, _):
        wait(lambda: _over(side, ROUNDS), ROUNDS * PATIENCE_S, "the calm job's end")
        return dict(side.model())


def observe(folder: Path, make: Make, kind: str, undisturbed: Model) -> dict[str, Any]:
    """Run the job, kill as `KINDS` has it, and write down what happens, in seconds since the kill.

    Raises:
        FedpruneError: The job doesn't come as far as the kill.
    """
    what, kill = KINDS[kind]
    back = kind != "client, back later"
    with running(folder, JOB if back else SHORT, make) as (side, place, counted):
        wait(lambda: side.trains(JOB.names[0], AT), _TRAIN_S, f"training in round {AT}")
        time.sleep(0.5)
        killed = time.time()
        events: Events = []

        def say(text: str) -> None:
            events.append({"s": round(time.time() - killed, 1), "what": text})

        kill(side, place, counted, say)
        seen, last = len([r for r in side.rounds() if r.at < killed]), time.monotonic()
        while True:
            done = side.rounds()
            for each in done[seen:]:
                begun = f"run {each.run[:6]} begins" if not each.number else ""
                text = begun or f"round {each.number} over, {each.counted} of {CLIENTS} updates in it"
                events.append({"s": round(each.at - killed, 1), "what": text})
            if len(done) > seen and not back:
                side.start_client(JOB.names[0], counted.port)
                back = True
                say("client started again")
            last = time.monotonic() if len(done) > seen else last
            seen = len(done)
            if _over(side, ROUNDS) or time.monotonic() - last > PATIENCE_S:
                break
            time.sleep(_POLL_S)
        if not _over(side, ROUNDS):
            say(f"nothing more in {PATIENCE_S:.0f} s")
        living = sum(map(place.alive, JOB.names))
        say(f"{living} of {CLIENTS} clients' processes run")
        if isinstance(side, Flower):
            say(f"`flwr ls`: {side.status()}")
        return {
            "side": side.title,
            "kind": kind,
            "killed": what,
            "finished": _over(side, ROUNDS),
            "rounds": [[r.number, r.counted, r.accuracy] for r in done if r.number],
            "apart": apart(side.model(), undisturbed) if back else None,
            "events": sorted(events, key=lambda e: e["s"]),
        }


def _over(side: Side, number: int) -> bool:
    done = side.rounds()
    return bool(done) and done[-1].number >= number


def _client_later(side: Side, place: Site, counted: Meter, say: Callable[[str], None]) -> None:
    place.cut(JOB.names[0])


def _client_at_once(side: Side, place: Site, counted: Meter, say: Callable[[str], None]) -> None:
    place.cut(JOB.names[0])
    side.start_client(JOB.names[0], counted.port)
    say("client started again")


def _server(side: Side, place: Site, counted: Meter, say: Callable[[str], None]) -> None:
    place.cut(side.servers[0])
    time.sleep(_AGAIN_S)
    side.start_server()
    say("server started again")


def _broker(side: Side, place: Site, counted: Meter, say: Callable[[str], None]) -> None:
    if not isinstance(side, Fedprune):
        raise FedpruneError(f"{side.title} has no broker")
    place.cut("broker")
    time.sleep(_AGAIN_S)
    side.start_broker()
    say("broker started again")


def _server_app(side: Side, place: Site, counted: Meter, say: Callable[[str], None]) -> None:
    app = side.app("flwr-serverapp", "superlink") if isinstance(side, Flower) else None
    if app is None:
        raise FedpruneError(f"{side.title} runs no ServerApp")
    os.kill(app, signal.SIGKILL)


KINDS: dict[str, tuple[str, Kill]] = {
    "client, back at once": ("a client, started again at once", _client_at_once),
    "client, back later": ("a client, started again when the next round is over", _client_later),
    "server": ("the server, started again after 5 s", _server),
    "server with database": ("the server, which keeps its state in a file, started again after 5 s", _server),
    "broker": ("the broker, started again after 5 s", _broker),
    "server app": ("the ServerApp's process alone", _server_app),
}

OURS = ("client, back at once", "client, back later", "server", "broker")
THEIRS = ("client, back at once", "client, back later", "server", "server with database", "server app")
