"""What the SuperLink runs: Flower's own FedAvg, and a line in a file for every round that is over."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedprune.core import tensorfile

app = ServerApp()


class Counted(FedAvg):
    """Flower's own FedAvg, which remembers how many updates are in a round."""

    counted = 0

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Count, and leave the rest to Flower."""
        got = list(replies)
        self.counted = sum(not reply.has_error() for reply in got)
        return super().aggregate_train(server_round, got)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Wait for all clients, then train for so many rounds."""
    strategy = Counted(fraction_train=1.0, fraction_evaluate=0.0)
    config = context.run_config
    folder, rounds = Path(str(config["folder"])), int(config["rounds"])
    setting = json.loads((folder / "setting.json").read_text())
    samples = np.load(folder / "evaluation.npz")
    session = ort.InferenceSession(folder / "inference.onnx", providers=["CPUExecutionProvider"])
    weights = tensorfile.decode((folder / "weights.safetensors").read_bytes())
    while len(list(grid.get_node_ids())) < int(config["clients"]):
        time.sleep(0.2)

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        """The global model on the server's samples; called once before the first round, too."""
        tensors = {key: array.numpy() for key, array in arrays.items()}
        (logits,) = session.run(None, {setting["input"]: samples["x"], **tensors})
        accuracy = float((np.asarray(logits).argmax(1) == samples["y"]).mean())
        np.savez(folder / "flower_model.npz", **tensors)
        line = {
            "run": context.run_id,
            "round": number,
            "at": time.time(),
            "accuracy": accuracy,
            "counted": strategy.counted,
        }
        with (folder / "flower_rounds.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return MetricRecord({"accuracy": accuracy})

    strategy.start(
        grid,
        ArrayRecord({key: Array(np.asarray(value)) for key, value in weights.items()}),
        num_rounds=rounds,
        timeout=float(config["timeout"]),
        evaluate_fn=evaluate,
    )
