"""What a SuperNode runs for every message: the board's own trainer on the same graph, samples and recipe."""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedprune.model.recipe import Recipe
from fedprune_device.data.array_source import load_data
from fedprune_device.training.trainer import Trainer, TrainingTask

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training."""
    folder, name = Path(str(context.run_config["folder"])), str(context.node_config["device"])
    setting = json.loads((folder / "setting.json").read_text())
    given = message.content["arrays"]
    result = Trainer(folder / "training.onnx").train(
        {key: array.numpy() for key, array in given.items()},
        load_data(str(folder / f"{name}.npz")),
        TrainingTask(
            Recipe.from_dict(setting["recipe"]),
            seed=setting["seed"],
            device=name,
            round=int(message.content["config"]["server-round"]),
            classes=setting["classes"],
        ),
    )
    arrays = ArrayRecord({key: Array(value) for key, value in result.tensors.items()})
    metrics = MetricRecord({"num-examples": result.samples, "loss": result.loss_last})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
