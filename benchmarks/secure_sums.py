"""Secure sums of a hundred boards: what masks, keys and shares cost boards and the server.

    OMP_NUM_THREADS=1 python -m benchmarks.secure_sums

The hundred boards and their server run their own code in one process, without a network. Every board has the same
number of numbers; the sum is compared with the one without masks.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from random import Random
from typing import Any, TypeVar

import numpy as np

from benchmarks.harness import run_cases
from fedprune.secure_aggregation.collector import Collector
from fedprune.secure_aggregation.masks import Vector
from fedprune.secure_aggregation.participant import Participant
from fedprune.secure_aggregation.session import SecureSumSession
from fedprune.security.keys import SigningKey

BOARDS, NUMBERS = 100, 250_000
STEPS = ("advertise", "share", "mask", "unmask")
CASES = (("chosen", 32, 0.0), ("chosen", 32, 0.2), ("chosen", 64, 0.2), ("all", 32, 0.2))
"""Which neighbours a board has, bits of a number, and the share of boards that drop out between shares and vectors."""

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


def measured(graph: str, bits: int, dropping: float) -> dict[str, Any]:
    """One secure sum: bytes and processor time of a board, medians over boards, and processor time of the server."""
    words = (NUMBERS, 0) if bits == 32 else (0, NUMBERS)
    if graph == "all":
        session = SecureSumSession(b"benchmark", BOARDS, BOARDS // 2 + 1, *words)
    else:
        session = SecureSumSession.choose(b"benchmark", BOARDS, *words)
    identities = {f"board-{i:02}": SigningKey.make() for i in range(BOARDS)}
    directory = {name: key.verifying_key for name, key in identities.items()}
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
        "dropped": len(gone),
        "exact": total.to_bytes() == expected.to_bytes(),
        "up": {step: statistics.median(sizes) for step, sizes in up.items()},
        "down": {step: statistics.median(sizes) for step, sizes in down.items()},
        "board_ms": {step: statistics.median(meter.times[step]) for step in STEPS},
        "server_ms": sum(meter.times["server"]),
        "unmasking_ms": sum(meter.times["unmasking"]),
    }


def _advertised(
    session: SecureSumSession, name: str, identity: SigningKey, directory: Any
) -> tuple[Participant, bytes]:
    board = Participant(session, name, identity, directory)
    return board, board.advertise()


if __name__ == "__main__":
    wanted = [dict(zip(("graph", "bits", "dropping"), case, strict=True)) for case in CASES]
    run_cases("secure_sums", __doc__, wanted, measured, "cryptography")
