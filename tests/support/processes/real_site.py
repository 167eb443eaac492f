"""A site of real processes on this machine: a server, its broker and its boards, and what they work on."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fedprune.coordination import Phase, State
from fedprune.core.errors import StorageError
from fedprune.jobs.state import Progress
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.messaging.broker.broker_files import BrokerAddress, write_broker
from fedprune_server.storage.storage import Storage
from support.processes.machine import embedded_broker, find_mosquitto, free_port, listens
from support.waiting import until

FILES = """
[model]
path = "model.onnx"

[evaluation]
data = "evaluation.npz"
"""
"""What every configuration says of `write_material`'s files."""


HOLDING_PROGRAM = """\
import runpy, sys, time
from dataclasses import replace
from pathlib import Path
from fedprune_device.training.trainer import Trainer

folder, train = Path(sys.argv[1]), Trainer.train

def held(trainer, tensors, data, task, control):
    name = f"{task.seed}-{task.round}"

    def step(done, steps):
        control.progress(done, steps)
        if done == (steps + 1) // 2 and (folder / name).exists():
            (folder / f"{name}-{task.device}").touch()
            while (folder / name).exists() and not control.stop():
                time.sleep(0.01)

    return train(trainer, tensors, data, task, replace(control, progress=step))

Trainer.train = held
sys.argv[:3] = sys.argv[2:3]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=False)
"""
"""Runs a board that stands in the middle of its training in rounds that are held: what must come to pass while a round
is under way can't come too late."""

AMQTT_ONLY = """\
import runpy, sys
from fedprune_server.messaging.broker import programs

programs.find_mosquitto = lambda: None
sys.argv[:2] = sys.argv[1:2]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=False)
"""
"""Runs a server as on a machine without Mosquitto."""

_Site = TypeVar("_Site", bound="Site")


def job_config(name: str, *, recipe: Mapping[str, object] | None = None, **job: object) -> str:
    """A server's configuration: a job of two boards that wait for long, but for what is named, and its recipe."""
    job = {"name": name, "devices": 2, "density": 0.5, "deadline_s": 300, **job}
    tables = {"job": job, "job.recipe": recipe or {}}
    return "".join(
        f"[{table}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in entries.items())
        for table, entries in tables.items()
    )


def write_material(folder: Path, samples: Mapping[str, int], hidden: int = 32) -> Path:
    """A small classifier, of so many hidden units, and samples for every device and to evaluate on."""
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32), name)

    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], transB=1),
            helper.make_node("Relu", ["h"], ["a"]),
            helper.make_node("Gemm", ["a", "w2", "b2"], ["logits"], transB=1),
        ],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])],
        [weight("w1", hidden, 8), weight("b1", hidden), weight("w2", 3, hidden), weight("b2", 3)],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx"
    )
    truth = random.standard_normal((8, 3))
    for name, count in {**samples, "evaluation": 200}.items():
        x = random.standard_normal((count, 8)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=x, y=(x @ truth).argmax(1))
    return folder


class Site:
    """Real processes: a server, its devices and a broker. Use it as a context: they end with it.

    Args:
        material: What `write_material` wrote.
        config: The server's configuration, but for `FILES`.
        patience_s: How long something may take that is waited for.
        mosquitto: Whether the broker is a process of its own, or the server's.
        amqtt: Whether the server finds no Mosquitto for its broker.
        secure: Whether the server has an identity and devices join with claims; Mosquitto gets the configuration that
            the server writes for it.
    """

    def __init__(
        self,
        material: Path,
        folder: Path,
        config: str,
        devices: Sequence[str],
        patience_s: float,
        *,
        mosquitto: bool = False,
        amqtt: bool = False,
        secure: bool = False,
        may_hold: bool = False,
    ) -> None:
        self.material = material
        self.folder = folder
        self.devices = tuple(devices)
        self.patience_s = patience_s
        self.mosquitto = mosquitto
        self.amqtt = amqtt
        self.secure = secure
        self.state = folder / "server"
        self.port = free_port()
        self.join_port = self.port + 1
        self.board_ports: dict[str, int] = {}
        """Where boards find the broker that don't find it at its own port."""
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.may_hold, self.holds = may_hold, folder / "holds"
        self.holds.mkdir(exist_ok=True)
        (folder / "fleet.toml").write_text(config + self.files())
        if secure:
            with IdentityFolder.make(self.state, "default") as identity:
                for name in self.devices:
                    (folder / f"{name}.claim").write_text(identity.make_claim(name, 3600).text)
                if mosquitto:
                    self.write_broker(identity)
        elif mosquitto:
            (folder / "mosquitto.conf").write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\n")

    def files(self) -> str:
        """What a configuration says of the material."""
        text = FILES
        for name in ("model.onnx", "evaluation.npz"):
            text = text.replace(f'"{name}"', json.dumps(str(self.material / name)))
        return text

    def write_broker(self, identity: IdentityFolder) -> None:
        """Give Mosquitto the files that the server writes for it."""
        broker = BrokerAddress(("127.0.0.1",), self.port, self.join_port, self.folder, bind="127.0.0.1")
        write_broker(identity, "mosquitto", broker, self.folder)
        with (self.folder / "mosquitto.conf").open("a") as file:
            file.write("user root\n")  # what starts it here can't give its files to another user

    def open_broker(self) -> str:
        """Let every client do anything at Mosquitto, as a hostile broker would; returns where one without a certificate
        connects."""
        (self.folder / "acl").write_text("pattern readwrite #\n")
        (self.folder / "acl-join").write_text("topic readwrite #\n")
        return self._url(self.join_port)

    def __enter__(self: _Site) -> _Site:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_all()

    @property
    def url(self) -> str:
        """Where the broker is."""
        return self._url(self.port)

    def _url(self, port: int) -> str:
        return f"{'mqtts' if self.secure else 'mqtt'}://127.0.0.1:{port}"

    def start(self, name: str, *, in_group: bool = False) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self.command(name), stdout=log, stderr=log, env=environment, start_new_session=in_group
            )

    def command(self, name: str) -> list[str]:
        if name == "broker":
            return [find_mosquitto(), "-c", str(self.folder / "mosquitto.conf")]
        python, security = [sys.executable, "-m"], [] if self.secure else ["--insecure"]
        if name == "server":
            where = ["--broker", self.url] if self.mosquitto else ["--port", str(self.port)]
            run = ["run", "--config", str(self.folder / "fleet.toml"), "--state", str(self.state), "--until-finished"]
            start = [*python[:1], "-c", AMQTT_ONLY] if self.amqtt else python
            return [*start, "fedprune_server.cli.main", *run, *where, *security]
        if self.secure:
            security = ["--claim", str(self.folder / f"{name}.claim"), "--join", f"mqtts://127.0.0.1:{self.join_port}"]
        url = self._url(self.board_ports.get(name, self.port))
        start = [*python[:1], "-c", HOLDING_PROGRAM, str(self.holds)] if self.may_hold else python
        return [
            *(*start, "fedprune_device.cli.main", "run", "--broker", url, "--device", name, "--no-probe", *security),
            *("--data", str(self.material / f"{name}.npz"), "--state", str(self.folder / name), "--threads", "1"),
            *("--profile", "raspberry-pi-4b", "--until-finished", "--patient"),
        ]

    def start_all(self) -> None:
        if self.mosquitto:
            self.start("broker")
        self.start("server")
        self.wait_for(lambda: listens(self.port), "the broker listens")
        for name in self.devices:
            self.start(name)

    def stop_all(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def kill(self, name: str) -> None:
        """kill -9; of an embedded broker, only of it."""
        if name == "broker" and not self.mosquitto:
            broker = embedded_broker(self.processes["server"].pid)
            assert broker is not None
            os.kill(broker, signal.SIGKILL)
            return
        self.processes[name].kill()
        self.processes[name].wait()
        self.start(name)

    def hold(self, *rounds: int, seed: int = 0) -> None:
        """From now on devices stand in the middle of their training in these rounds of the job with this seed."""
        for number in rounds:
            (self.holds / f"{seed}-{number}").touch()

    def wait_until_held(self, number: int, *devices: str, seed: int = 0) -> None:
        """Wait until devices, by default all of them, are in the middle of a round that is held."""
        marks = [self.holds / f"{seed}-{number}-{name}" for name in devices or self.devices]
        self.wait_for(lambda: all(mark.exists() for mark in marks), f"devices train in round {number}")

    def wait_for_the_middle(self, number: int) -> None:
        """Wait for the middle of a round that is held: all devices train, and nobody has delivered."""
        self.wait_until_held(number)
        state = self.saved_state()
        assert state is not None
        assert (state.round, state.phase) == (number, Phase.TRAINING), self.logs()
        assert all(t.progress is Progress.OFFERED for t in state.tasks.values()), self.logs()

    def let_go(self, number: int, seed: int = 0) -> None:
        """Hold a round no longer."""
        (self.holds / f"{seed}-{number}").unlink()

    def saved_state(self) -> State | None:
        """What the server has saved."""
        try:
            with Storage.open_existing(self.state) as storage:
                return storage.load()
        except StorageError:
            return None  # not yet

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        until(condition, what, explain=self.logs)

    def finish(self, patience_s: float | None = None) -> State:
        """Wait for the end of all processes but Mosquitto, each for the site's patience by default."""
        for name in ("server", *self.devices):
            try:
                code = self.processes[name].wait(patience_s or self.patience_s)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{name} doesn't end: {self.logs()}") from None
            assert code == 0, self.logs()
        state = self.saved_state()
        assert state is not None
        return state

    def finish_complete(self) -> State:
        """Wait for the end of a job in which whatever was trained counts."""
        state = self.finish()
        assert state.phase is Phase.FINISHED
        for summary in state.history:
            assert {p["progress"] for p in summary["devices"].values()} == {"folded"}, self.logs()
        return state

    def logs_in_full(self) -> str:
        """All that its processes wrote."""
        return "\n".join(p.read_text() for p in sorted(self.folder.glob("*.log")))

    def logs(self) -> str:
        """What its processes wrote last, for who reads why a test failed."""
        return "\n".join(f"--- {p.name}\n{p.read_text()[-3000:]}" for p in sorted(self.folder.glob("*.log")))
