"""Secure sums of a hundred boards, and whole rounds of six: what masks, keys and shares cost boards and the server.

    OMP_NUM_THREADS=1 python -m benchmarks.secure_sums

The hundred boards and their server run their own code in one process, without a network. Every board has the same
number of numbers; the sum is compared with the one without masks. The six are the demo's boards, a process each, with a
server and a broker; jobs with and without masks take turns, and their models are compared.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import numpy as np

from benchmarks.harness import arguments, save, setting
from fedprune.secure_aggregation.collector import Collector
from fedprune.secure_aggregation.masks import Vector
from fedprune.secure_aggregation.participant import Participant
from fedprune.secure_aggregation.session import Session
from fedprune.security.keys import SigningKey
from fedprune_server.cli.demo import DemoFolder, run_job
from fedprune_server.simulation.digits import deal, digits_model, write_hand
from fedprune_server.simulation.fleet.simulated_fleet import DEMO_BOARDS, demo_job

BOARDS, NUMBERS = 100, 250_000
STEPS = ("advertise", "share", "mask", "unmask")
CASES = (("chosen", 32, 0.0), ("chosen", 32, 0.2), ("chosen", 64, 0.2), ("all", 32, 0.2))
"""Neighbours of a board, bits of a number, and the share of boards that drop out between their shares and vectors."""

JOBS = (
    ("plain", {}),
    ("masked", {"secure_aggregation": True}),
    ("plain, int8", {"compression": "int8"}),
    ("masked, int8", {"secure_aggregation": True, "compression": "int8"}),
)
"""Jobs of the six boards, by name."""

TURNS, ROUNDS = 2, 4

_Result = TypeVar("_Result")


class Meter:
    """Milliseconds of processor time by what was done."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)

    def run(self, what: str, work: Callable[[], _Result]) -> _Result:
        start = time.process_time()
        result = work()
        self.times[what].append(1e3 * (time.process_time() - start))
        return result


def measured(neighbours: str, bits: int, dropping: float) -> dict[str, Any]:
    """One secure sum: bytes and processor time of a board, medians over boards, and processor time of the server."""
    words = (NUMBERS, 0) if bits == 32 else (0, NUMBERS)
    if neighbours == "all":
        session = Session(b"benchmark", BOARDS, BOARDS // 2 + 1, *words)
    else:
        session = Session.choose(b"benchmark", BOARDS, *words)
    identities = {f"board-{i:02}": SigningKey.make() for i in range(BOARDS)}
    directory = {name: key.verifying for name, key in identities.items()}
    random, meter = np.random.default_rng(1), Meter()
    gone = set(random.permutation(sorted(identities))[: round(dropping * BOARDS)].tolist())
    inputs = {
        n: Vector(random.integers(0, 2**32, words[0], np.uint32), random.integers(0, 2**64, words[1], np.uint64))
        for n in identities
    }
    up: dict[str, list[int]] = {step: [] for step in STEPS}
    down: dict[str, list[int]] = {step: [0] for step in STEPS}
    collector = Collector(session, directory, Random(1))
    boards = {}
    for name, identity in identities.items():
        boards[name], message = meter.run("advertise", partial(_advertised, session, name, identity, directory))
        up["advertise"].append(len(message))
        meter.run("server", partial(collector.add_advertisement, name, message))

    def exchange(
        step: str,
        begin: Callable[[], Mapping[str, bytes]],
        answer: Callable[[str, bytes], bytes],
        take: Callable[[str, bytes], None],
    ) -> None:
        messages = meter.run("server", begin)
        down[step] = [len(raw) for raw in messages.values()]
        for name in messages.keys() - (gone if step == "mask" else set()):
            message = meter.run(step, partial(answer, name, messages[name]))
            up[step].append(len(message))
            meter.run("server", partial(take, name, message))

    expected = Vector.zeros(session)
    for name in set(inputs) - gone:
        expected.add(inputs[name])
    exchange("share", collector.rosters, lambda name, raw: boards[name].share(raw), collector.add_shares)
    # Masked in place: each vector is needed once.
    exchange("mask", collector.deliveries, lambda name, raw: boards[name].mask(raw, inputs[name]), collector.add_masked)
    exchange("unmask", collector.survivors, lambda name, raw: boards[name].unmask(raw), collector.add_unmasking)
    total = meter.run("unmasking", collector.total)
    return {
        "neighbours": min(session.degree, BOARDS - 1),
        "threshold": session.threshold,
        "bits": bits,
        "dropped": len(gone),
        "exact": total.to_bytes() == expected.to_bytes(),
        "up": {step: statistics.median(sizes) for step, sizes in up.items()},
        "down": {step: statistics.median(sizes) for step, sizes in down.items()},
        "board_ms": {step: statistics.median(meter.times[step]) for step in STEPS},
        "server_ms": sum(meter.times["server"]),
        "unmasking_ms": sum(meter.times["unmasking"]),
    }


def _advertised(session: Session, name: str, identity: SigningKey, directory: Any) -> tuple[Participant, bytes]:
    board = Participant(session, name, identity, directory)
    return board, board.advertise()


def fleet_rounds(folder: Path) -> list[dict[str, Any]]:
    """Rounds of each of `JOBS`: a board's bytes, a mean over boards and rounds, and a round's seconds, a median.

    Counted from the first round's end, when boards have graphs, and codes their step.
    """
    base = replace(demo_job(1, ROUNDS), strategy="plain", options={}, density=1.0, byte_budget=0, move_limit=0.0)
    place, data = DemoFolder.prepare(folder, 1), deal([board.name for board in DEMO_BOARDS], seed=1)
    place.model.write_bytes(digits_model())
    np.savez(place.evaluation, x=data.x, y=data.y)
    np.savez(place.calibration, x=data.calibration)
    for board in DEMO_BOARDS:
        write_hand(place.data(board.name), data.devices[board.name])
    seconds: dict[str, list[float]] = defaultdict(list)
    found: dict[str, dict[str, Any]] = {}
    for turn in range(TURNS):
        for at, (name, settings) in enumerate(JOBS):
            record = run_job(name, replace(base, name=f"job-{at}-{turn}", **settings), place)
            first, last = record.rounds[0], record.rounds[-1]
            seconds[name] += [after.at - before.at for before, after in pairwise(record.rounds)]
            shares = len(DEMO_BOARDS) * (len(record.rounds) - 1)
            found[name] = {
                "job": name,
                "boards": len(DEMO_BOARDS),
                "up": (last.up - first.up) / shares,
                "down": (last.down - first.down) / shares,
                "model": last.model,
                "counted": min(len(each.local) for each in record.rounds),
            }
    return [row | {"round_s": statistics.median(seconds[name])} for name, row in found.items()]


def main() -> None:
    options = arguments(__doc__)
    rows = [measured(*case) for case in CASES[: 1 if options.only else None]]
    with tempfile.TemporaryDirectory() as folder:
        rounds = [] if options.only else fleet_rounds(Path(folder))
    body = {"setting": setting("cryptography"), "boards": BOARDS, "numbers": NUMBERS, "rows": rows, "rounds": rounds}
    save(options.out or "secure_sums", body)


if __name__ == "__main__":
    main()
