"""A fleet on this machine for a board in an emulator: an identity, Mosquitto as it configures it, a server, a job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedprune_server.simulation.digits import deal_digits, digits_model, write_device_data
from support.processes.machine import find_mosquitto, free_port, listens

SITE = "lab"
_ROUND_S = 600  # a round's deadline: an emulated board is slow


class Headquarters:
    """A server whose fleet is one board, which reaches the broker by `host` and gets `density` of the model."""

    def __init__(self, folder: Path, device: str, *, host: str = "127.0.0.1", density: float = 0.5) -> None:
        self.folder, self.device, self.host, self.density = folder, device, host, density
        self.port, self.join_port = free_port(), free_port()
        self.state = folder / "server"
        self.samples = folder / "samples.npz"
        self._children: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._say("init", "--site", SITE)
        ports = ("--port", str(self.port), "--join-port", str(self.join_port), "--bind", "127.0.0.1")
        broker = folder / "broker"
        names = [word for name in sorted({host, "127.0.0.1"}) for word in ("--host", name)]
        self._say("broker-config", "mosquitto", *names, *ports, "--out", str(broker))
        with (broker / "mosquitto.conf").open("a") as file:
            file.write("user root\n")  # what starts it here can't give its files to another user
        hands = deal_digits([device, "somebody-else"], seed=0)
        write_device_data(self.samples, hands.devices[device])
        np.savez(folder / "evaluation.npz", x=hands.x, y=hands.y)
        (folder / "model.onnx").write_bytes(digits_model())

    @property
    def url(self) -> str:
        """Where the board finds the broker."""
        return f"mqtts://{self.host}:{self.port}"

    @property
    def join_url(self) -> str:
        """Where it asks to be let in."""
        return f"mqtts://{self.host}:{self.join_port}"

    def claim(self) -> str:
        """A one-time claim for the board."""
        return self._say("claim", "--device", self.device).strip()

    def __enter__(self) -> Headquarters:
        self._start("broker", [find_mosquitto(), "-c", str(self.folder / "broker" / "mosquitto.conf")])
        self.wait(lambda: listens(self.port) and listens(self.join_port), "the broker listens", 20)
        job = ["--model", str(self.folder / "model.onnx"), "--evaluation", str(self.folder / "evaluation.npz")]
        job += ["--rounds", "1", "--devices", "1", "--deadline", str(_ROUND_S), "--density", str(self.density)]
        where = ["--broker", f"mqtts://127.0.0.1:{self.port}", "--until-finished", "--verbose"]
        self._start("server", [*_PROGRAM, "run", "--state", str(self.state), *job, "--strategy", "plain", *where])
        return self

    def __exit__(self, *_: object) -> None:
        for child in reversed(self._children):
            child.kill()
            child.wait()

    def status(self) -> dict[str, Any]:
        """What the server has written of job, rounds and devices; empty as long as that is nothing."""
        done = subprocess.run(
            [*_PROGRAM, "status", "--state", str(self.state), "--json"], capture_output=True, text=True, check=False
        )
        status: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return status

    def members(self) -> dict[str, str]:
        """Who asked to be let in, and what became of it."""
        return {row["device"]: row["status"] for row in json.loads(self._say("devices", "--json"))}

    def wait(self, condition: Callable[[], object], what: str, limit_s: float) -> None:
        """Look until something is so."""
        deadline = time.monotonic() + limit_s
        while not condition():
            for child in self._children:
                assert child.poll() in (None, 0), f"{child.args} ended: {self.logs()}"
            assert time.monotonic() < deadline, f"{what}: it never came to that. {self.logs()}"
            time.sleep(0.5)

    @property
    def ended(self) -> bool:
        """Whether the job is done and the server has ended well."""
        return self._children[-1].poll() == 0

    def logs(self) -> str:
        """The end of what all processes said."""
        return "\n".join(f"--- {p.name}\n{p.read_text()[-4000:]}" for p in sorted(self.folder.glob("*.log")))

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            self._children.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))

    def _say(self, command: str, *words: str) -> str:
        done = subprocess.run(
            [*_PROGRAM, command, "--state", str(self.state), *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


_PROGRAM = (sys.executable, "-m", "fedprune_server.cli.main")
