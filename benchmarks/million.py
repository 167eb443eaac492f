"""A day of the coordinator with up to a million boards, on a virtual clock: `python -m benchmarks.million`.

The coordinator is the server's own. Its shell here is a fleet without tensors: boards connect and leave, train and
send for as long as their profiles predict, and a worker answers at once with digests, which are all that a coordinator
sees. Every case runs in a process of its own.

- A board is of one of seven kinds, in the shares of the swarm. Its training takes what the planner predicts for its
  kind's profile and its 50 to 500 samples, times a factor of its own (log-normal, σ = 0.1) and one per round (σ =
  0.07, the mean of 20 draws of PR-FL's 0.3); its link what the profile promises, times a factor of its own (σ = 0.3).
- It is connected once a day, from a time of its own for a quarter of the day to all of it. A board that leaves while
  it works keeps its update, and announces it when it is back if the round still waits.
- One update of 200 fails its checks, and one offer of 200 is refused.
"""

from __future__ import annotations

import gc
import hashlib
import heapq
import json
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from benchmarks.fleet_mixture import SAMPLES, SHARES
from benchmarks.harness import in_fresh_process, peak_bytes, run_cases
from fedprune.coordination import State, make_coordinator
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.rng import keyed_generator
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.planning.cost_prediction import predict_costs
from fedprune.planning.prediction import Prediction
from fedprune.planning.profile_store import find_profile

NET = "resnet20_bn"
RECIPE = Recipe(epochs=50)
DEADLINE_S = 2400.0
DAY_S = 86_400.0
BOARD_SIGMA, ROUND_SIGMA, LINK_SIGMA = 0.1, 0.07, 0.3
ARRIVAL_S = 1800.0
"""Within this time those boards connect that are there at the beginning."""

FAULTS = 0.005
PARTS_KEPT = 10_000
"""As many parts of finished rounds as the server keeps in memory (`fedprune_server.storage.storage`)."""

TIMED = 53
"""One event of this many of a kind is timed; those that come once a round always are."""

RARE = ("Scored", "Closed", "Evaluated")


@dataclass(frozen=True)
class Case:
    """A run: which share of the present boards' updates a round needs, and which it asks for beyond those."""

    boards: int
    participation: float = 0.01
    over_selection: float = 0.1
    hours: float = 24.0


SIZES = tuple(Case(n) for n in (10_000, 100_000, 1_000_000))
CASES = (*SIZES, *(Case(100_000, p, over, 4.0) for p in (0.001, 0.01, 0.1) for over in (0.0, 0.1)))


def architecture() -> str:
    """The net's, made by another process, so that a run's memory holds no compiler."""
    from benchmarks.step_nets import network
    from fedprune_export.importing import export_torch, import_onnx

    return import_onnx(export_torch(network(NET)), NET).architecture.to_json()


def digest(*parts: object) -> str:
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()


def name_of(board: int) -> str:
    return f"board-{board:07d}"


class Fleet:
    """The boards: arrays, so that they take little memory next to the coordinator's."""

    def __init__(self, case: Case, net: Architecture) -> None:
        n = case.boards
        self.net = net
        self.profiles = [find_profile(name) for name in SHARES]
        self.bodies = [p.to_dict() for p in self.profiles]
        chance = keyed_generator(0, "million")
        self.kind = chance.choice(len(SHARES), n, p=list(SHARES.values())).astype(np.int8)
        self.samples = chance.integers(*SAMPLES, n, endpoint=True, dtype=np.int32)
        self.speed = chance.lognormal(0, BOARD_SIGMA, n).astype(np.float32)
        self.link = chance.lognormal(0, LINK_SIGMA, n).astype(np.float32)
        self.memory = chance.normal(1.05, 0.03, n).astype(np.float32)  # measured over predicted: results/planner.md
        share = chance.uniform(0.25, 1.0, n)
        begin = chance.random(n) * DAY_S
        end = begin + share * DAY_S  # those who are there at midnight, too, are so at the run's beginning
        self.session = np.zeros(n, np.int16)
        self.offered = np.zeros(n, np.int16)
        self.until = np.full(n, -1.0, np.float32)
        early = end > DAY_S
        first = chance.random(n) * ARRIVAL_S
        births = np.concatenate([first[early], begin])
        deaths = np.concatenate([np.maximum(end[early] - DAY_S, first[early]), end])
        who = np.concatenate([np.flatnonzero(early), np.arange(n)]).astype(np.int32)
        self._times = np.concatenate([births, deaths])
        self._who = np.concatenate([who, who])
        self._ends = np.concatenate([deaths, np.full(len(deaths), -1.0)]).astype(np.float32)
        order = np.argsort(self._times, kind="stable")
        self._times, self._who, self._ends = self._times[order], self._who[order], self._ends[order]
        self._factors = keyed_generator(0, "million", "rounds")
        self._drawn = list[float]()

    def moves(self) -> Iterator[tuple[float, int, float]]:
        """Time, board, and the end of its connection, or -1 where it is that end; in order."""
        for at in range(0, len(self._times), 10_000):
            rows = (column[at : at + 10_000].tolist() for column in (self._times, self._who, self._ends))
            yield from zip(*rows, strict=True)

    def born(self, board: int) -> on.DeviceBorn:
        kind, samples = int(self.kind[board]), int(self.samples[board])
        return on.DeviceBorn(name_of(board), int(self.session[board]), self.bodies[kind], samples, None, ("int8",))

    def predicted(self, board: int) -> Prediction:
        return self._predicted(int(self.kind[board]), int(self.samples[board]))

    @cache  # noqa: B019 - there is one fleet
    def _predicted(self, kind: int, samples: int) -> Prediction:
        return predict_costs(self.net, self.net.sizes, self.profiles[kind], RECIPE, samples)

    def factor(self) -> float:
        """The next round's factor on a training time."""
        if not self._drawn:
            self._drawn += self._factors.lognormal(0, ROUND_SIGMA, 10_000).tolist()
        return float(self._drawn.pop())

    def transfer_s(self, board: int, size: int, *, down: bool) -> float:
        link = self.profiles[self.kind[board]].link
        rate = link.down_bytes_s if down else link.up_bytes_s
        return float(2 * link.latency_s + size / rate * self.link[board])


class Shell:
    """Drives a coordinator on the virtual clock, and takes its time."""

    def __init__(self, case: Case, net: Architecture) -> None:
        job = Job(
            name="million",
            rounds=10**6,
            devices=max(1, case.boards // 4),
            participation=case.participation,
            over_selection=case.over_selection,
            deadline_s=DEADLINE_S,
            recipe=RECIPE,
        )
        self.case, self.fleet = case, Fleet(case, net)
        self.state = State(model=digest("initial"), architecture=net.digest)
        self.collected = self.collections = 0
        self.coordinator = make_coordinator(job, net, self.state)
        self.now = 0.0
        self.later: list[tuple[float, int, on.Event, int]] = []
        self.order = 0
        self.unsent: dict[int, on.UpdateAnnounced] = {}
        self.spent: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()
        self.timed: Counter[str] = Counter()
        self.turns = self.updates = 0
        self.recipe = RECIPE.to_offer()
        self.graph = {"sha256": digest("graph"), "size": 300_000}
        self.rounds: list[dict[str, float]] = []
        self._faults = keyed_generator(0, "million", "faults")

    def run(self) -> None:
        end, moves = 3600 * self.case.hours, self.fleet.moves()
        time_, board, until = next(moves)
        while min(time_, self.later[0][0] if self.later else time_) < end:
            if self.later and self.later[0][0] <= time_:
                self.now, _, event, session = heapq.heappop(self.later)
                self._happens(event, session)
                continue
            self.now = time_
            fleet = self.fleet
            if until < 0:
                fleet.until[board] = -1.0
                self.feed(on.DeviceDied(name_of(board), int(fleet.session[board])))
            else:
                fleet.session[board] += 1
                fleet.until[board] = until
                self.feed(fleet.born(board))
                if board in self.unsent:
                    self.feed(self.unsent[board])
            time_, board, until = next(moves, (np.inf, 0, 0.0))

    def _happens(self, event: on.Event, session: int) -> None:
        """An event that was due now, if it isn't a board's whose connection has ended."""
        if isinstance(event, (on.UpdateAnnounced, on.UpdateStored, on.OfferRefused)):
            board = int(event.device[6:])
            if isinstance(event, on.UpdateAnnounced):
                self.unsent[board] = event
            if self.fleet.session[board] != session or self.fleet.until[board] < 0:
                return
            if isinstance(event, on.UpdateStored):
                self.unsent.pop(board, None)
        self.feed(event)

    def feed(self, event: on.Event) -> None:
        """A turn: an event, and all that follows from it at once."""
        due = deque([event])
        while due:
            event = due.popleft()
            kind = type(event).__name__
            self.counted[kind] += 1
            for command in self._handled(event, kind):
                answer = self.answer(command)
                if answer is not None:
                    due.append(answer)
        self.turns += 1
        self.state.mark_saved()

    def _handled(self, event: on.Event, kind: str) -> list[do.Command]:
        """The coordinator's answer to an event; what it takes is measured now and then, since clocks take time, too."""
        if self.counted[kind] % TIMED and kind not in RARE:
            return self.coordinator.handle(event, self.now)
        gone, began = self.collected, time.thread_time_ns()
        commands = self.coordinator.handle(event, self.now)
        self.spent[kind] += time.thread_time_ns() - began - (self.collected - gone)
        self.timed[kind] += 1
        return commands

    def _collecting(self, phase: str, info: dict[str, int]) -> None:
        """Python looks for unreachable objects among all that there are."""
        if info["generation"] == 2:
            self.collected += time.thread_time_ns() * (1 if phase == "stop" else -1)
            self.collections += phase == "stop"

    def answer(self, command: do.Command) -> on.Event | None:
        """The worker's answer, at once; answers of boards come later."""
        match command:
            case do.Extract():
                return on.Extracted(command.basis.round, command.part.device, command.part.attempt, self.offer(command))
            case do.SendOffer():
                self._work(command)
            case do.PullUpdate():
                board = int(command.device[6:])
                took = self.fleet.transfer_s(board, command.weights["size"], down=False)
                stored = on.UpdateStored(command.device, command.round, command.attempt, command.weights["sha256"])
                self._later(self.now + took, stored, int(self.fleet.session[board]))
            case do.FoldUpdate():
                part, number = command.contribution.part, command.contribution.basis.round
                if self._faults.random() < FAULTS:
                    return on.UpdateRejected(part.device, number, part.attempt, "out of range", "diverged")
                self.updates += 1
                return on.Folded(part.device, number, part.attempt)
            case do.Cancel():
                self.unsent.pop(int(command.device[6:]), None)
            case do.Score():
                self.rounds.append({"round": command.round, "began": self.now, "asked": len(command.participants)})
                return on.Scored(command.round, digest("ranking", command.round))
            case do.Close():
                return on.Closed(command.round, digest("model", command.round))
            case do.Evaluate():
                self.rounds[-1] |= {"ended": self.now}
                self.state.drop_old_summaries(PARTS_KEPT)
                return on.Evaluated(command.round, {"loss": 1.0, "accuracy": 0.5})
            case do.WakeAt():
                self._later(command.at, on.Ticked(), 0)
        return None

    def offer(self, command: do.Extract) -> dict[str, Any]:
        widths = list(command.part.widths)
        return {
            "selection": digest("selection", command.basis.ranking, widths),
            "ranking": command.basis.ranking,
            "widths": widths,
            "weights": {"sha256": digest("weights", command.basis.round, widths), "size": 1_100_000},
            "training": self.graph,
            "inference": self.graph,
            "recipe": self.recipe,
            "update_size": 1_100_000,
        }

    def _work(self, command: do.SendOffer) -> None:
        board = int(command.device[6:])
        fleet, session = self.fleet, int(self.fleet.session[board])
        fleet.offered[board] += 1
        known = self.unsent.get(board)
        if known is not None and (known.round, known.attempt) == (command.round, command.attempt):
            return  # trained already, and announced again
        down_s = fleet.transfer_s(board, command.offer["weights"]["size"], down=True)
        if self._faults.random() < FAULTS:
            refused = on.OfferRefused(command.device, command.round, command.attempt, "no room", "no room")
            self._later(self.now + down_s, refused, session)
            return
        predicted, factor = fleet.predicted(board), float(fleet.speed[board]) * fleet.factor()
        update = on.UpdateAnnounced(
            command.device,
            command.round,
            command.attempt,
            command.offer["weights"]["sha256"],
            {"sha256": digest(command.device, command.round), "size": command.offer["update_size"]},
            int(fleet.samples[board]),
            predicted.steps,
            {
                "loss": 0.5,
                "step_seconds": predicted.step_s * factor,
                "latency_seconds": predicted.latency_s * factor,
                "peak_memory_bytes": round(predicted.memory_bytes * float(fleet.memory[board])),
            },
        )
        self._later(self.now + down_s + predicted.train_s * factor, update, session)

    def _later(self, at: float, event: on.Event, session: int) -> None:
        self.order += 1
        heapq.heappush(self.later, (at, self.order, event, session))


def measure(**case: Any) -> dict[str, Any]:
    """Run a case in a process of its own."""
    net = in_fresh_process(architecture)
    return in_fresh_process(simulated, Case(**case), net)  # type: ignore[no-any-return]


def simulated(case: Case, net: str) -> dict[str, Any]:
    base, began, cpu = peak_bytes() / 2**20, time.time(), time.process_time()
    shell = Shell(case, Architecture.from_json(net))
    fleet = peak_bytes() / 2**20
    gc.callbacks.append(shell._collecting)
    shell.run()
    gc.callbacks.clear()
    cpu = time.process_time() - cpu
    peak, counted = peak_bytes() / 2**20, shell.counted
    entries = (entry for roll in (shell.state.devices, shell.state.tasks) for entry in roll.values())
    each = {k: shell.spent[k] / shell.timed[k] / 1e3 for k in counted if shell.timed[k]}
    events, spent = sum(counted.values()), sum(each[k] * counted[k] for k in each)
    ended = [r for r in shell.rounds if "ended" in r]
    lasted = [r["ended"] - r["began"] for r in ended]
    return {
        "wall_s": round(time.time() - began, 1),
        "cpu_s": round(cpu, 1),
        "coordinator_s": round(spent / 1e6, 2),
        "collections": shell.collections,
        "collections_s": round(shell.collected / 1e9, 2),
        "events": events,
        "events_of": dict(counted),
        "us_of": {k: round(v, 2) for k, v in each.items()},
        "us_per_event": round(spent / events, 2),
        "us_per_update": round(spent / max(1, shell.updates), 1),
        "updates": shell.updates,
        "turns": shell.turns,
        "peak_mb": round(peak),
        "fleet_mb": round(fleet - base),
        "base_mb": round(base),
        "state_bytes": sum(len(json.dumps(e.to_dict(), separators=(",", ":"))) for e in entries),
        "rounds": len(ended),
        "round_s": [round(float(q), 1) for q in np.quantile(lasted, (0.1, 0.5, 0.9))] if lasted else [],
        "asked": round(float(np.median([r["asked"] for r in ended]))) if ended else 0,
        "offered_boards": int(np.count_nonzero(shell.fleet.offered)),
        "offered_most": int(shell.fleet.offered.max()),
    }


if __name__ == "__main__":
    run_cases("million", __doc__, [asdict(case) for case in CASES], measure)
