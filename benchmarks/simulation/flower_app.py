"""FedAvg by Flower's simulation: `PYTHON -m benchmarks.simulation.flower_app FOLDER ROUNDS OUT`.

It runs in an environment with `flwr[simulation]` and torch, without fedprune. Each client takes one core, so that as
many train at once as the machine has cores.
"""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.simulation.local_training import Material, initial_state, save_state
from benchmarks.simulation.stamps import Stamps

FOLDER, ROUNDS, OUT = "SIMULATION_FOLDER", "SIMULATION_ROUNDS", "SIMULATION_OUT"  # in the environment of all processes

client_app, server_app = ClientApp(), ServerApp()


@cache
def _material() -> Material:
    return Material(Path(os.environ[FOLDER]))


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """A client's part in a round."""
    torch.set_num_threads(1)
    material = _material()
    device, round_ = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
    state = material.train(message.content["arrays"].to_torch_state_dict(), device, round_)
    metrics = MetricRecord({"num-examples": material.task.samples})
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Flower's own strategy; the model is evaluated after every round."""
    material, stamps, accuracies = _material(), Stamps(), list[float]()
    count, out = material.task.devices, Path(os.environ[OUT])

    def evaluate(round_: int, arrays: ArrayRecord) -> MetricRecord:
        state = arrays.to_torch_state_dict()
        accuracy = material.accuracy(state)
        if round_:  # it is called before the first, too
            accuracies.append(accuracy)
            if round_ == 1:
                save_state(out.with_suffix(".npz"), state)
            stamps.add()
        return MetricRecord({"accuracy": accuracy})

    strategy = FedAvg(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count
    )  # fmt: skip
    initial = ArrayRecord(initial_state(material.net))
    strategy.start(grid, initial, num_rounds=int(os.environ[ROUNDS]), evaluate_fn=evaluate)
    out.write_text(json.dumps({**stamps.result(), "accuracies": accuracies, "threads": 1}))


def main(folder: str, rounds: str, out: str) -> None:
    os.environ |= {FOLDER: folder, ROUNDS: rounds, OUT: out, "FLWR_TELEMETRY_ENABLED": "0"}
    cores = os.cpu_count() or 1
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": cores}}
    run_simulation(server_app, client_app, Material(Path(folder)).task.devices, backend_config=resources)


if __name__ == "__main__":
    # Other processes import it by its name: functions of `__main__` would be pickled with all they refer to.
    from benchmarks.simulation import flower_app

    flower_app.main(*sys.argv[1:])
