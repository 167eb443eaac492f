"""Secure sums of a hundred boards, and whole rounds of six: what masks, keys and shares cost boards and the server.

    OMP_NUM_THREADS=1 python benchmarks/secure_sums.py

The hundred boards and their server run their own code in one process, without a network. Every board has the same
number of numbers; the sum is compared with the one without masks. The six are the demo's boards, a process each, with a
server and a broker; jobs with and without masks take turns, and their models are compared.
"""

from __future__ import annotations

import argparse
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
from synthetic_nets import setting, write

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


def page(about: dict[str, Any], rows: list[dict[str, Any]], rounds: list[dict[str, Any]]) -> str:
    """The results as a page."""
    lines = []
    for row in rows:
        vector = row["up"]["mask"]
        around = sum(row["up"].values()) + sum(row["down"].values()) - vector
        board = [f"{row['board_ms'][step]:.1f}" for step in STEPS]
        server = [f"{row['server_ms'] / 1e3:.2f}", f"{row['unmasking_ms'] / 1e3:.2f}"]
        head = [str(row[key]) for key in ("neighbours", "threshold", "bits", "dropped")]
        cells = [*head, "yes" if row["exact"] else "**no**", f"{vector / 1e3:,.0f}", f"{around / 1e3:.1f}"]
        lines.append("| " + " | ".join([*cells, *board, *server]) + " |")
    table = "\n".join(lines)
    first = rows[1]
    steps = "\n".join(f"| {step} | {first['down'][step]:,.0f} | {first['up'][step]:,.0f} |" for step in STEPS)
    fleet = "\n".join(
        f"| {row['job']} | {row['counted']} | {row['up'] / 1e3:.1f} | {row['down'] / 1e3:.1f} | {row['round_s']:.2f} |"
        for row in rounds
    )
    same = "the same, bit for bit" if rounds[0]["model"] == rounds[1]["model"] else "**not the same**"
    titles = (
        *("neighbours", "threshold", "bits", "dropped", "exact", "vector, kB", "other bytes, kB"),
        *("keys, ms", "shares, ms", "masks, ms", "answer, ms", "server: messages, s", "server: unmasking, s"),
    )
    return f"""# Secure sums

{about["date"]}, {about["cpu"]}, {about["cores"]} cores (one used; load {about["load"]} at the start),
Python {about["python"]}, numpy {about["numpy"]}, cryptography {about["cryptography"]}.
`OMP_NUM_THREADS=1 python benchmarks/secure_sums.py`

{BOARDS} boards with {NUMBERS:,} numbers each, in one process without a network. Dropped boards have sent their
shares but no vector, the most expensive moment for the server. As float32 such an update has
{4 * NUMBERS / 1e3:,.0f} kB, in the codec `int8` about {NUMBERS / 1e3:,.0f} kB. Bytes and milliseconds are medians
over boards, milliseconds processor time of this machine. A Raspberry Pi 4, whose processor has no instructions for
AES, was not measured.

| {" | ".join(titles)} |
|{"---|" * len(titles)}
{table}

Bytes of a board in the second row:

| step | to the board | from the board |
|---|---|---|
{steps}

## Rounds of a fleet

The demo's {len(DEMO_BOARDS)} boards at full width, a process each, with a server and its broker on this machine.
Jobs took turns, {TURNS} times; a job has {ROUNDS} rounds, and the first is left out: there boards fetch graphs, and
`int8` with masks has no step yet. Bytes are a board's in a round, of all messages and files; seconds are the median
of all rounds, with the time to train.

| job | boards that counted, at least | up, kB | down, kB | round, s |
|---|---|---|---|---|
{fleet}

The models of `plain` and `masked` are {same}.
"""


def main() -> None:
    """Measure and write the results."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    about = setting("cryptography")
    rows = [measured(*case) for case in CASES]
    with tempfile.TemporaryDirectory() as folder:
        rounds = fleet_rounds(Path(folder))
    write("secure_sums", {"setting": about, "rows": rows, "rounds": rounds}, page(about, rows, rounds))


if __name__ == "__main__":
    main()
