"""Simulated rounds per minute, compared with Flower's and a torch loop's: `python benchmarks/simulation_speed.py`.

All three train the same torch nets on the same samples with the same recipe: FedAvg, every device in every round. Each
run is a fresh process, and the sides of a case run one after the other, so that neighbours on the machine hit them
alike. Flower runs in its own environment, with its extra for simulations (`make build/flower/installed`, then
`build/flower/bin/pip install 'flwr[simulation]==1.41.0' torch==2.13.0`): one Ray actor per core, whose ClientApp is the
loop's own training. `--cases lenet:20 ...` runs these alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

CASES = ("lenet:20", "resnet20_bn:20", "lenet:200", "resnet20_bn:200")
"""Net and number of devices."""

SIDES = ("fedprune", "loop", "flower")
ROUNDS = 4
SAMPLES = 64
BATCH = 32
LR, MOMENTUM = 0.02, 0.9
CORES = os.cpu_count() or 1
FLOWER = Path("build/flower/bin/python")
RESULT = Path(__file__).parent / "results" / "simulation_speed.json"

Arrays = dict[str, np.ndarray[Any, Any]]


def samples(device: int, shape: tuple[int, ...]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A device's samples: ten pictures that are the same everywhere, under noise."""
    pictures = np.random.default_rng(0).standard_normal((10, *shape)).astype(np.float32)
    rng = np.random.default_rng(1 + device)
    y = rng.integers(0, 10, SAMPLES)
    return pictures[y] + rng.standard_normal((SAMPLES, *shape)).astype(np.float32), y


# -- torch: the loop, and Flower's ClientApp ---------------------------------------------------------------------------


class TorchClient:
    """Local training in torch, as one writes it."""

    def __init__(self, net: str) -> None:
        import torch
        from step_nets import network

        torch.manual_seed(0)
        self.torch, self.net = torch, network(net)
        self.shape = tuple(self.net.input_shape)

    def weights(self) -> Arrays:
        """Copies of the module's tensors."""
        return {n: v.detach().numpy().copy() for n, v in self.net.state_dict().items()}

    def train(self, weights: Arrays, device: int, number: int) -> tuple[Arrays, float]:
        """One epoch; returns the weights and the mean loss."""
        torch = self.torch
        self.net.load_state_dict({n: torch.from_numpy(np.array(v)) for n, v in weights.items()})
        self.net.train()
        optimizer = torch.optim.SGD(self.net.parameters(), LR, MOMENTUM)
        x, y = (torch.from_numpy(a) for a in samples(device, self.shape))
        losses = []
        order = torch.from_numpy(np.random.default_rng((number, device)).permutation(len(y)))
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(self.net(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return self.weights(), sum(losses) / len(losses)


def run_loop(net: str, devices: int) -> Iterator[float]:
    """FedAvg in one process, in torch's threads: yields the mean loss of every round."""
    client = TorchClient(net)
    client.torch.set_num_threads(CORES)
    weights = client.weights()
    for number in range(1, ROUNDS + 1):
        total: Arrays = {}
        losses = []
        for device in range(devices):
            got, loss = client.train(weights, device, number)
            losses.append(loss)
            for name, value in got.items():
                total[name] = total[name] + value if name in total else value.astype(np.float64)
        weights = {n: (v / devices).astype(weights[n].dtype) for n, v in total.items()}
        yield sum(losses) / devices


def run_flower(net: str, devices: int, ended: Callable[[float], None]) -> None:
    """Flower's simulation with its own FedAvg."""
    from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    here = str(Path(__file__).parent)
    client_app, server_app = ClientApp(), ServerApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        sys.path[:0] = [here] if here not in sys.path else []
        import simulation_speed

        client = simulation_speed.client_of(net)
        given = {k: v.numpy() for k, v in message.content["arrays"].items()}
        device, number = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
        got, loss = client.train(given, device, number)
        arrays = ArrayRecord({k: Array(np.asarray(v)) for k, v in got.items()})
        metrics = MetricRecord({"num-examples": SAMPLES, "loss": loss})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    class Watched(FedAvg):
        """Flower's own, which reports the end of each round."""

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            got = super().aggregate_train(server_round, replies)
            ended(float(got[1]["loss"]))
            return got

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Watched(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=devices)
        arrays = ArrayRecord({k: Array(v) for k, v in TorchClient(net).weights().items()})
        strategy.start(grid, arrays, num_rounds=ROUNDS, timeout=3600.0)

    run_simulation(
        server_app,
        client_app,
        devices,
        backend_config={
            "init_args": {"num_cpus": CORES, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


_CLIENTS: dict[str, TorchClient] = {}


def client_of(net: str) -> TorchClient:
    """An actor's module, made once, on one thread: actors share the cores."""
    if net not in _CLIENTS:
        _CLIENTS[net] = TorchClient(net)
        _CLIENTS[net].torch.set_num_threads(1)
    return _CLIENTS[net]


# -- fedprune ----------------------------------------------------------------------------------------------------------


def run_fedprune(net: str, devices: int, ended: Callable[[float], None]) -> None:
    """fedprune's simulation, a process per core."""
    from step_nets import network

    from fedprune.jobs.job import Job
    from fedprune.model.recipe import Recipe
    from fedprune.planning.profile_store import find
    from fedprune_device.data.dataset import LocalData
    from fedprune_export.importing import export_torch, import_onnx
    from fedprune_server.simulation.experiment import Experiment
    from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
    from fedprune_server.simulation.results.run_folder import simulate

    module = network(net)
    shape = tuple(module.input_shape)
    model = import_onnx(export_torch(module), net)
    board = find("jetson-orin-nano")
    fleet = []
    for i in range(devices):
        x, y = samples(i, shape)
        fleet.append(VirtualDevice(f"device-{i:03}", board, LocalData(x, y, x[:0], y[:0])))
    recipe = Recipe(epochs=1, batch_size=BATCH, lr=LR, momentum=MOMENTUM, weight_decay=0.0, evaluate_every=ROUNDS)
    job = Job(
        rounds=ROUNDS, devices=devices, strategy="plain", scorer="ordered", density=1.0, deadline_s=1e7, recipe=recipe
    )
    over = 0

    def progress(simulation: Any) -> None:
        nonlocal over
        history = simulation.state.history
        if len(history) > over:
            over = len(history)
            losses = [d["metrics"]["loss_last"] for d in history[-1]["devices"].values()]
            ended(sum(losses) / len(losses))

    simulate(Experiment("speed", job, model, fleet, workers=CORES), None, progress)


# -- the table ---------------------------------------------------------------------------------------------------------


def measure(side: str, net: str, devices: int) -> None:
    """Run one side; a line of JSON on stdout says what it took."""
    began = time.perf_counter()
    ends: list[float] = []
    losses: list[float] = []

    def ended(loss: float) -> None:
        ends.append(time.perf_counter() - began)
        losses.append(loss)

    if side == "loop":
        for loss in run_loop(net, devices):
            ended(loss)
    else:
        (run_flower if side == "flower" else run_fedprune)(net, devices, ended)
    if len(ends) != ROUNDS or not all(math.isfinite(x) for x in losses) or losses[-1] >= losses[0]:
        raise SystemExit(f"{side}: expected {ROUNDS} rounds of falling loss, got {losses}")
    rounds = [b - a for a, b in pairwise(ends)]
    print(json.dumps({"first_s": ends[0], "round_s": statistics.median(rounds), "losses": losses}))


def alone(side: str, case: str) -> dict[str, Any]:
    """One side in a fresh process."""
    python = str(FLOWER.absolute()) if side == "flower" else sys.executable
    environment = {**os.environ, "OMP_NUM_THREADS": str(CORES if side == "loop" else 1), "RAY_DEDUP_LOGS": "0"}
    command = [python, "-W", "ignore", __file__, "--one", side, "--cases", case]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{side} {case}: {done.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(next(x for x in reversed(done.stdout.splitlines()) if x.startswith('{"first_s"')))
    return row


def page(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"""# Speed of simulations

{about["date"]}, {about["cpu"]}, {about["cores"]} cores (load {about["load"]} from neighbours), Python
{about["python"]}, onnxruntime {about["onnxruntime"]}, torch {about["torch"]}, flwr {about["flwr"]} with ray
{about["ray"]}. `python benchmarks/simulation_speed.py`

FedAvg of whole models, every device in every round, {SAMPLES} samples each, one epoch in batches of {BATCH}, SGD with
momentum. *Loop*: a loop over the devices in one process, in torch with a thread per core. *Flower*: its simulation with
one Ray actor per core, in which that loop's torch code trains on one thread. *fedprune*: its simulator with a process
per core, in which the boards' own code trains, and which checks every update as a server does. A round is the median of
those after the first, of {ROUNDS}.

| net | devices | fedprune, rounds/min | loop | Flower | times the loop | Flower | first round, s | loop | Flower |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""
    ]
    ratios: dict[str, list[float]] = {"loop": [], "flower": []}
    for row in rows:
        net, _, devices = row["case"].partition(":")
        took = {side: row[side]["round_s"] for side in SIDES}
        for side, found in ratios.items():
            found.append(took[side] / took["fedprune"])
        cells = [f"{60 / took[s]:.1f}" for s in SIDES] + [f"{found[-1]:.2f}" for found in ratios.values()]
        cells += [f"{row[s]['first_s']:.1f}" for s in SIDES]
        lines.append(f"| {net} | {devices} | " + " | ".join(cells) + " |")
    means = {side: statistics.geometric_mean(found) for side, found in ratios.items()}
    lines += ["", f"Geometric mean: {means['loop']:.2f} times the loop, {means['flower']:.2f} times Flower.", ""]
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="NET:DEVICES")
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        net, _, devices = options.cases[0].partition(":")
        with TemporaryDirectory(prefix="fedprune-speed-") as folder:
            os.chdir(folder)
            measure(options.one, net, int(devices))
        return
    if not FLOWER.exists():
        raise SystemExit(f"{FLOWER} is missing: see the top of benchmarks/simulation_speed.py")
    from synthetic_nets import setting, write

    versions = [FLOWER, "-c", "import flwr, ray; print(flwr.__version__, ray.__version__)"]
    flwr, ray = subprocess.run(versions, capture_output=True, text=True, check=True).stdout.split()
    rows = []
    for case in options.cases:
        rows.append({"case": case, **{side: alone(side, case) for side in SIDES}})
        print(case, {side: round(rows[-1][side]["round_s"], 2) for side in SIDES}, flush=True)
    about = {**setting("onnxruntime", "torch"), "flwr": flwr, "ray": ray}
    write(RESULT, {**about, "rows": rows}, page(rows, about))


if __name__ == "__main__":
    main()
