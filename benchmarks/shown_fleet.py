"""A made-up fleet for the console's pictures and made-up runs for the reports', the same each time."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

from fedprune.jobs.job import Job
from fedprune_server.monitoring.round_rows import RoundRow
from fedprune_server.simulation.datasets.federation import Partition
from fedprune_server.simulation.results.record import DeviceRow, Record
from fedprune_server.web.state import records as r
from support.fakes.console_fleet import ConsoleFleet

GROUPS = (
    ("stem", 32),
    ("block1", 64),
    ("block2", 128),
    ("block3", 128),
    ("block4", 256),
    ("block5", 256),
    ("head", 512),
)
"""Channel groups of the made-up model."""

BOARDS = (
    ("raspberry-pi-zero-2w", 0.14, 0.61), ("raspberry-pi-4b", 0.42, 0.78), ("raspberry-pi-5", 0.75, 0.86),
    ("jetson-nano", 0.56, 0.81), ("jetson-orin-nano", 1.0, 0.91),
)  # fmt: skip
"""Profiles, each with the density and the accuracy that it reaches."""

PLACES = ("orchard", "greenhouse", "barn", "mill", "harbour", "quarry", "library", "workshop")
PARAMETERS = 1_947_114


def name_of(i: int) -> str:
    """The name of a made-up board."""
    return f"{PLACES[i % len(PLACES)]}-{i // len(PLACES) + 1:02d}"


def made_up_run(title: str, devices: int, *, whole: bool = False, rounds: int = 30) -> Record:
    """A run whose numbers are made up.

    Args:
        title: Its name.
        devices: Number of boards.
        whole: Every board trains the whole model.
        rounds: Number of rounds.
    """
    chance, names = random.Random(f"{title}{devices}"), [name_of(i) for i in range(devices)]
    density = {n: 1.0 if whole else BOARDS[i % 5][1] for i, n in enumerate(names)}
    best = {n: BOARDS[i % 5][2] - 0.04 * whole + 0.04 * chance.random() for i, n in enumerate(names)}
    moved = sum(4 * PARAMETERS * d * d for d in density.values())
    accuracy = [0.88 - 0.03 * whole - 0.78 / (1 + n / 3) + 0.01 * chance.uniform(-1, 1) for n in range(rounds)]
    coverage = [[sum(d * size > c for d in density.values()) for c in range(size)] for _, size in GROUPS]
    rows = tuple(
        RoundRow(
            n + 1, 60.0 * (n + 1) * (1.6 if whole else 1.0), "a" * 64,
            {"accuracy": accuracy[n], "loss": 2.3 / (1 + n / 6)},
            {m: max(0.1, best[m] - 0.6 / (1 + n / 3) + 0.02 * chance.uniform(-1, 1)) for m in names},
            devices, int(moved * (n + 1)), int(0.62 * moved * (n + 1)), updates=devices, coverage=coverage,
        )
        for n in range(rounds)
    )  # fmt: skip
    plans = tuple(
        DeviceRow(
            n, BOARDS[i % 5][0], 300 + 37 * i % 900, tuple(max(1, round(density[n] * s)) for _, s in GROUPS),
            density[n], "" if density[n] == 1.0 else ("memory", "time", "bytes")[i % 3],
            int(PARAMETERS * density[n] ** 2),
            compared={
                "step_seconds": (0.11 + 0.01 * (i % 7), 0.1 + 0.012 * (i % 5)),
                "latency_seconds": (0.021, 0.019 + 0.001 * (i % 4)),
                "peak_memory_bytes": (88.6e6 + 1e6 * (i % 9), 84.1e6 + 1.3e6 * (i % 6)),
            },
        )
        for i, n in enumerate(names)
    )  # fmt: skip
    channels = {n: tuple(tuple(range(w)) for w in d.widths) for n, d in zip(names, plans, strict=True)}
    counts = {n: tuple(max(0, chance.randrange(-90, 120)) for _ in range(10)) for n in names}
    return Record(title, Job(rounds=rounds).to_dict(), GROUPS, plans, rows, channels, "payload of messages",
                  partition=Partition("leaves", (), counts))  # fmt: skip


class ShownFleet(ConsoleFleet):
    """A fleet with plausible names and numbers, the same each time.

    Args:
        devices: Number of boards.
    """

    def __init__(self, devices: int) -> None:
        super().__init__(devices, 42, 7, ("leaves",))
        self._now = time.time()

    def begin(self) -> Iterator[r.Record]:
        for word in super().begin():
            if not isinstance(word, (r.AlertStatus, r.LogLine, r.Site)):
                yield word
            elif isinstance(word, r.Site):
                yield r.Site(word.version, "orchards", ("leaves",), self._now - 186400, True, "mqtts://broker.example:8883",
                           "postgresql", "S3", False)  # fmt: skip
        count, names = len(self.rows), list(self.rows)
        hot, quarantined, failed, busy = (names[i % count] for i in (19, 93, 12, 7))
        for i, (severity, device, text) in enumerate(
            (
                ("critical", hot, "81.4 °C for 5 minutes: training is throttled"),
                ("warning", quarantined, "in quarantine for 10 minutes: 214 invalid messages"),
                ("warning", failed, "rolled back to runtime 11: ended before it was healthy"),
            )
        ):
            yield r.AlertStatus(f"a{i}", self._now - 240 * (i + 1), "trial", severity, device, "leaves", text)
        lines = (
            ("info", None, f"round 42 of 60: {count * 92 // 100} of {count} counted, accuracy 91.2%"),
            ("info", busy, "planned again: density 0.42, bound by memory"),
            ("warning", quarantined, "the update came after the round's end; it counts in the next one"),
            ("info", None, "rollout 2 of release 12: stage 2 of 3 begins with 16 boards"),
            ("warning", hot, "81.4 °C: steps take 1.6 times as long as planned"),
            ("info", None, f"round 43 of 60 begins with {count} boards"),
        )
        for i, (level, device, text) in enumerate(lines):
            yield r.LogLine(
                self._now - 90 + 13 * i, level, text, device, "leaves" if device else None, 43 if device else None
            )

    def job(self, name: str) -> r.PublishedJob:
        parts = super().job(name).parts
        return r.PublishedJob(
            name,
            43,
            60,
            "training",
            self._now + 260,
            False,
            self._metrics(42),
            "fedprune",
            "a" * 64,
            1.0,
            parts,
            1_947_114,
        )

    def round(self, job: str, number: int) -> r.FinishedRound:
        chance, count = random.Random(number), len(self.rows)
        lost = chance.randrange(1 + count // 10)
        late, odd = lost * 2 // 3, lost - lost * 2 // 3
        refused = {k: n for k, n in (("the round is over", late), ("larger than any earlier update", odd)) if n}
        down = int(count * 1.3e6 * (1 + 0.08 * chance.random()))
        at, seconds = self._now - 400 * (43 - number), 330 + 60 * chance.random()
        return r.FinishedRound(job, number, at, seconds, self._metrics(number), count - lost, count, refused, down,
                          int(down * 0.62), {"mean": 0.05 + 0.1 * chance.random(), "max": 1.0},
                         f"{chance.getrandbits(256):064x}")  # fmt: skip

    def rollouts(self) -> r.Rollouts:
        count, failed = len(self.rows), min(1, len(self.rows) // 50)
        done_now = count // 12
        now = {
            "name": "rollout 2", "number": 2, "release": "12 (0.2.0)", "stage": 1, "stages": 3, "of": count,
            "done": done_now, "failed": failed, "given": count // 30,
            "waiting": count - done_now - failed - count // 30, "state": "running", "why": "", "at": self._now - 5400,
            "failures": dict.fromkeys(list(self.rows)[12:13], "rolled back: exit code 1 before it was healthy"),
            "subject": 12, "before": "11 (0.1.1)", "leaves": None,
        }  # fmt: skip
        done = {"name": "rollout 1", "number": 1, "release": "11 (0.1.1)", "stage": 2, "done": count, "failed": 0,
                "given": 0, "waiting": 0, "state": "done", "at": self._now - 1814400, "failures": {},
                "subject": 11, "before": None}  # fmt: skip
        return r.Rollouts((now, {**now, **done}), ("release-12", "release-11"))

    def details(self, device: str) -> r.DeviceDetails:
        row, chance = self.rows[device], random.Random(device)
        limits = (("memory", 196.4e6, 204.0e6, "bytes"), ("time", 318.0, 420.0, "s"), ("link", 1.31e6, 20e6, "bytes"),
                  ("bytes", 1.31e6, 4e6, "bytes"), ("storage", 9.2e6, 2e9, "bytes"))  # fmt: skip
        plan = {
            "density": row["density"], "binding": "memory",
            "limits": {x[0]: dict(zip(("name", "value", "limit", "unit"), x, strict=True)) for x in limits},
        }  # fmt: skip
        history = tuple(
            {"round": n, "at": self._now - 400 * (43 - n), "samples": 842,
             "progress": "refused" if n == 38 else "folded", "density": row["density"],
             "reason": "the round is over" if n == 38 else "",
             "metrics": {"accuracy": 0.86 + 0.02 * chance.random(), "loss": 0.4 + 0.05 * chance.random()}}
            for n in range(42, 30, -1)
        )  # fmt: skip
        widths = self.channels({g: (round(row["density"] * n), n) for g, n in GROUPS})
        figures = self.figures(row["seconds"] * 0.96, row["seconds"])
        return r.DeviceDetails(device, "leaves", plan, figures, history, widths, self._now)

    def crashes(self, device: str) -> r.BoardCrashes:
        return r.BoardCrashes(device, ())

    def coverage(self, job: str) -> r.Coverage:
        groups = []
        for name, channels in GROUPS:
            held: list[dict[str, Any]] = []
            for c in range(channels):
                share = round(
                    sum(r["density"] * channels > c for r in self.rows.values() if r["density"]) / len(self.rows), 3
                )
                if held and held[-1]["share"] == share:
                    held[-1]["channels"] += 1
                else:
                    held.append({"channels": 1, "share": share})
            groups.append({"name": name, "channels": channels, "held": held})
        return r.Coverage(job, 43, tuple(groups), self._now)

    def _metrics(self, number: int) -> dict[str, float]:
        chance = random.Random(1000 + number)
        fall = 1 / (1 + number / 4)
        return {
            "accuracy": 0.95 - 0.72 * fall + 0.012 * chance.uniform(-1, 1),
            "loss": 0.18 + 2.1 * fall + 0.02 * chance.uniform(-1, 1),
        }

    def _row(self, i: int) -> dict[str, Any]:
        row, chance = super()._row(i), random.Random(i)
        board, density, accuracy = BOARDS[i * 7 % 5]
        found = accuracy + 0.03 * chance.random()
        row.update(
            name=name_of(i), profile=board,
            slot="ab"[i % 2], release=12 if i % 12 == 0 else 11, update=None, samples=chance.randrange(300, 1400),
            versions={"onnxruntime": "1.23.2", "python": "3.11"},
            metrics={"accuracy": found, "loss": round(1.5 - found, 4)}, measured=found,
            bytes_down=chance.randrange(3, 90) * 1_130_000, bytes_up=chance.randrange(3, 60) * 1_010_000, staleness=0,
        )  # fmt: skip
        if row["density"] is not None:
            row.update(
                density=round(density * chance.uniform(0.85, 1.0), 2), parameters=int(density * density * 1_947_114)
            )
        return row
