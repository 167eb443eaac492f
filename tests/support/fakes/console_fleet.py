"""A fleet that doesn't exist, published for a console: for tests and pictures of its pages."""

import random
import time
from collections.abc import Iterator, Mapping
from typing import Any

from fedprune_server.web.state.order_queue import Order
from fedprune_server.web.state.records import (
    AlertStatus,
    BoardCrashes,
    ChannelCoverage,
    DeviceDetails,
    FinishedRound,
    LogLine,
    PublishedJob,
    Rollouts,
    Site,
    StatusRecord,
)
from fedprune_server.web.state.status_writer import StatusWriter, encode_status

PROFILES = ("raspberry-pi-5", "raspberry-pi-4", "raspberry-pi-zero-2", "jetson-orin-nano", "jetson-agx-orin")
_STATES = ("ready", "offered", "training", "pulling", "folded", "refused", "queued")


class ConsoleFleet:
    """What a server with a round under way publishes; the seed chooses everything, and `rounds` are over."""

    def __init__(self, devices: int = 40, rounds: int = 25, seed: int = 0, jobs: tuple[str, ...] = ("trial",)) -> None:
        self._chance = random.Random(seed)  # nosec B311  # draws a trial, and nothing secret
        self._now = time.time()
        self._jobs = jobs
        self._round = rounds + 1
        self.rows = {r["name"]: r for r in (self._row(i) for i in range(devices))}
        self._ended = rounds

    def begin(self) -> Iterator[StatusRecord]:
        """All records at the start."""
        yield Site("0.1.0", "trial", self._jobs, self._now - 86400, True, "mqtts://127.0.0.1:8883", "sqlite", "folder",
                   False)  # fmt: skip
        for job in self._jobs:
            yield self.job(job)
            for number in range(1, self._ended + 1):
                yield self.round(job, number)
        yield self.rollouts()
        names = list(self.rows) or ["board-0000"]
        for i, (kind, severity) in enumerate(
            [("offline", "warning"), ("hot", "critical"), ("quarantine", "warning"), ("disk", "info")]
        ):
            at = self._now - 60 * i
            gone = at + 30 if i == 3 else None
            yield AlertStatus(f"{kind}-{i}", at, kind, severity, names[i % len(names)], None, f"{kind}: a trial", gone)
        for i in range(120):
            level = ("info", "warning", "error")[i % 3]
            text = f"device {names[i % len(names)]} says <b>line {i}</b>"
            yield LogLine(self._now - 120 + i, level, text, names[i % len(names)], self._jobs[0], self._round)

    def publish(self, writer: StatusWriter, at: float | None = None) -> None:
        """Write everything into a file; `at` is in seconds since 1970, None for now."""
        rows = {name: encode_status(row) for name, row in self.rows.items()}
        write(writer, *self.begin(), rows=rows, at=self._now if at is None else at, whole=True)

    def step(self, writer: StatusWriter) -> None:
        """Write a moment later: some devices have got on; now and then the round ends."""
        self._now = time.time()
        some = self._chance.sample(sorted(self.rows), min(len(self.rows), 50))
        for name in some:
            self._move(self.rows[name])
        records: list[StatusRecord] = [LogLine(self._now, "info", f"round {self._round} goes on", None, self._jobs[0])]
        if self._chance.random() < 0.1:
            self._ended, self._round = self._round, self._round + 1
            records += [self.round(job, self._ended) for job in self._jobs]
        records += [self.job(job) for job in self._jobs]
        write(writer, *records, rows={n: encode_status(self.rows[n]) for n in some})

    def answer(self, order: Order) -> Iterator[StatusRecord]:
        """What a server publishes on an order."""
        if order.kind == "look" and order.device is not None and order.device in self.rows:
            yield self.details(order.device)
            yield self.crashes(order.device)
        if order.kind == "coverage":
            yield self.coverage(order.job or self._jobs[0])

    def job(self, name: str) -> PublishedJob:
        state_counts = {s: sum(r["state"] == s for r in self.rows.values()) for s in _STATES}
        metrics = self._metrics(self._round)
        return PublishedJob(
            name, self._round, 100, "training", self._now + 240, False, metrics, "fedprune", "a" * 64,
            state_counts, 11_173_962,
        )  # fmt: skip

    def round(self, job: str, number: int) -> FinishedRound:
        at, count = self._now - 300 * (self._round - number), len(self.rows)
        return FinishedRound(
            job, number, at, 280 + 40 * self._chance.random(), self._metrics(number), count * 9 // 10, count,
            {"the round is over": count // 20, "not finite": count // 50}, count * 4_000_000, count * 3_500_000,
            {"mean": 0.4, "max": 3.0}, f"{number:064x}",
        )  # fmt: skip

    def rollouts(self) -> Rollouts:
        """A rollout under way, and a finished one."""
        count = len(self.rows)
        row: dict[str, Any] = {
            "name": "rollout 2", "number": 2, "release": "5 (0.1.0)", "stage": 1, "stages": 3, "of": count,
            "done": count // 3, "failed": min(1, count), "given": count // 10, "waiting": count // 2,
            "state": "running", "why": "", "at": self._now - 3600, "failures": {"board-0001": "rolled back: a trial"},
            "subject": 5, "before": "4 (0.0.9)", "leaves": None,
        }  # fmt: skip
        done = {**row, "name": "rollout 1", "number": 1, "stage": 2, "done": count, "failed": 0, "given": 0}
        over = {**done, "waiting": 0, "state": "done", "at": self._now - 864000, "failures": {}}
        over |= {"subject": 4, "before": None}
        return Rollouts((row, over), ("release-5", "release-6"))

    def details(self, device: str) -> DeviceDetails:
        row = self.rows[device]
        share = row["density"] or 0
        history = tuple(
            {"round": n, "at": self._now - 300 * (self._round - n), "progress": "folded", "density": share,
             "samples": 600, "metrics": self._board_metrics(n), "reason": ""}
            for n in range(self._ended, max(0, self._ended - 20), -1)
        )  # fmt: skip
        sizes = {f"layer{i}.conv": (16 * (i + 1), 64 * (i + 1)) for i in range(8)}
        limits = [("memory", 88.6e6, 95e6, "bytes"), ("time", 41.8, 60.0, "s"), ("link", 4.1e6, 10e6, "bytes")]
        plan = {
            "density": row["density"], "binding": "memory",
            "limits": {x[0]: dict(zip(("name", "value", "limit", "unit"), x, strict=True)) for x in limits},
        }  # fmt: skip
        widths = self.channels(sizes)
        figures = self.figures(42.0, row["seconds"])
        return DeviceDetails(device, self._jobs[0], plan, figures, history, widths, time.time())

    @staticmethod
    def channels(sizes: Mapping[str, tuple[int, int]]) -> tuple[dict[str, Any], ...]:
        """Which channels of each group a device holds, given their numbers; the same each time."""
        rows = []
        for group, (kept_channels, of) in sizes.items():
            ranking = list(range(of))
            random.Random(group).shuffle(ranking)  # nosec B311  # as above
            bits = sum(1 << (-of % 8 + of - 1 - c) for c in ranking[:kept_channels])
            rows.append({"group": group, "kept": kept_channels, "of": of, "which": f"{bits:0{2 * ((of + 7) // 8)}x}"})
        return tuple(rows)

    @staticmethod
    def figures(predicted_s: float, measured_s: float | None) -> tuple[dict[str, Any], ...]:
        """Predictions and measurements of a device."""
        rows = (
            ("round", "s", predicted_s, measured_s), ("step", "s", 0.131, 0.127), ("train", "s", 38.2, 37.5),
            ("transfer", "s", 3.8, None), ("latency", "s", 0.0212, 0.0194), ("memory", "bytes", 88.6e6, 84.1e6),
            ("storage", "bytes", 9.2e6, None), ("download", "bytes", 2.05e6, None), ("upload", "bytes", 2.05e6, None),
            ("step_energy", "J", 0.61, None),
        )  # fmt: skip
        return tuple(dict(zip(("what", "unit", "predicted", "measured"), r, strict=True)) for r in rows)

    def crashes(self, device: str) -> BoardCrashes:
        crash = {
            "at": self._now - 7200, "received": self._now - 7100, "cause": "exception", "release": "fedprune 0.1.0",
            "text": "MemoryError: <i>no room</i> for 12 MB", "slot": self.rows[device]["slot"], "uptime_s": 5400.0,
            "temperature_c": 61.5, "memory_available": 21_000_000, "memory_total": 512_000_000,
            "frames": ("fedprune_device.training.trainer:212 in step", "numpy"),
        }  # fmt: skip
        return BoardCrashes(device, (crash,), ({"at": self._now - 60, "text": "the disk of <i>barn</i> is full"},))

    def coverage(self, job: str) -> ChannelCoverage:
        groups = []
        for i in range(8):
            channels, share, groups_held = 64 * (i + 1), 1.0, []
            for _ in range(8):
                groups_held.append({"channels": channels // 8, "share": round(share, 3)})
                share *= 0.5 + self._chance.random() / 2
            groups.append({"name": f"layer{i}.conv", "channels": channels, "held": groups_held})
        return ChannelCoverage(job, self._round, tuple(groups), time.time())

    def _metrics(self, number: int) -> dict[str, float]:
        return {"accuracy": 0.9 - 0.8 / (1 + number / 5), "loss": 2.3 / (1 + number / 8)}

    def _board_metrics(self, number: int) -> dict[str, float]:
        """A board's metrics of a round."""
        metrics = self._metrics(number)
        return {
            "accuracy_before": metrics["accuracy"], "accuracy_after": min(1.0, metrics["accuracy"] * 1.05),
            "loss_before": metrics["loss"], "loss_after": metrics["loss"] * 0.9, "loss_first": metrics["loss"],
            "loss_last": metrics["loss"] * 0.8, "train_accuracy": metrics["accuracy"], "step_seconds": 0.127,
            "latency_seconds": 0.0194, "peak_memory_bytes": 84.1e6, "train_seconds": 37.5 + number % 3,
            "download_seconds": 1.9, "evaluate_seconds": 0.8,
        }  # fmt: skip

    def _row(self, i: int) -> dict[str, Any]:
        chance = self._chance
        online, status = chance.random() < 0.9, "member"
        if i % 97 == 13:
            status, online = "waiting", False
        row: dict[str, Any] = {
            "name": f"board-{i:04d}", "job": self._jobs[i % len(self._jobs)], "online": online, "state": "ready",
            "doing": "ready", "profile": PROFILES[i % len(PROFILES)], "slot": "ab"[i % 2],
            "release": 5, "update": None,
            "density": round(chance.uniform(0.1, 1.0), 3), "parameters": chance.randrange(100_000, 11_000_000),
            "samples": chance.randrange(100, 5000), "seen_at": self._now - chance.uniform(0, 600),
            "temperature_c": round(chance.uniform(40, 85), 1), "versions": {"fedprune": "0.1.0", "onnxruntime": "1.23"},
            "bytes_down": chance.randrange(10**9), "bytes_up": chance.randrange(10**9),
            "seconds": round(chance.uniform(10, 300), 1), "measured": round(chance.uniform(0.5, 0.95), 4),
            "staleness": chance.randrange(4), "quarantine": None,
            "status": status, "key": "ab12-cd34-ef56-7890" if status == "waiting" else None,
            "excluded": None,
        }  # fmt: skip
        row["metrics"] = {"accuracy": row["measured"], "loss": round(chance.uniform(0.1, 2.0), 4)}
        if i % 5 == 1 and status == "member":
            state = ("committed", "trial", "downloading", "rolled back")[i // 5 % 4]
            row["update"] = {"number": 6, "state": state, "reason": "a trial" if state == "rolled back" else "",
                             "at": self._now - 600}  # fmt: skip
            row["release"] = 6 if state == "committed" else 5
        if not online:
            row.update(state=status if status == "waiting" else "offline", doing="offline")
        elif i % 31 == 7:
            row.update(state="excluded", excluded="no width fits its memory", doing="takes no part", density=None,
                       parameters=None)  # fmt: skip
        elif i % 41 == 11:
            row.update(quarantine={"until": self._now + 300, "reason": "too many messages"})
        else:
            self._move(row)
        return row

    def _move(self, row: dict[str, Any]) -> None:
        if row["online"] and row["state"] != "excluded":
            state = self._chance.choice(_STATES)
            doing = f"epoch {self._chance.randrange(1, 4)}/3" if state == "training" else state
            row.update(state=state, doing=doing, seen_at=self._now)


def write(
    writer: StatusWriter,
    *records: StatusRecord,
    rows: Mapping[str, str | None] | None = None,
    at: float | None = None,
    whole: bool = False,
) -> None:
    """Write records and devices as a server does."""
    writer.write(
        [(r, encode_status(r)) for r in records], rows, at=time.time() if at is None else at, is_complete=whole
    )
