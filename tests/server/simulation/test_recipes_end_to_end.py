"""Recipes of every kind from the job to the report: simulated fleets run the server's and the board's code."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.model.recipe import Recipe
from fedprune_device.data.dataset import LocalData
from fedprune_server.simulation.results.report import run_document
from fedprune_server.simulation.results.tables import final_figures
from fedprune_server.simulation.simulation import Simulation
from support.fakes.digits_simulation import KINDS, boards, digits, digits_net, digits_simulation

NAMES = KINDS[:2]
Labels = Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], np.ndarray[Any, Any]]

LABELS: dict[str, Labels] = {
    "cross_entropy": lambda x, y: y,
    "bce": lambda x, y: np.arange(10) <= y[:, None],
    "mse": lambda x, y: x.reshape(len(x), 8, 8)[:, 1:6:4, 1:6].reshape(len(x), 10),
}
LABELS["huber"] = LABELS["mse"]


def simulation(folder: Path, recipe: dict[str, Any], **settings: Any) -> Simulation:
    """Two devices whose labels fit the recipe's loss."""
    labels, data = LABELS[recipe.get("loss", "cross_entropy")], digits(NAMES)
    fleet = [
        replace(b, data=LocalData(d.x_train, labels(d.x_train, d.y_train), d.x_test, labels(d.x_test, d.y_test)))
        for b, d in zip(boards(NAMES), data.devices.values(), strict=True)
    ]
    settings = {"recipe": Recipe.from_dict(recipe), "evaluation": (data.x, labels(data.x, data.y)), **settings}
    return digits_simulation(folder, keeps_state=False, title="numbers", fleet=fleet, density=0.5, **settings)


@pytest.mark.parametrize(
    "recipe",
    [
        {"loss": "bce", "balance_classes": True, "lr": 0.02, "epochs": 3},
        {"optimizer": "adamw", "lr": 0.003, "clip_norm": 1.0, "accumulate": 4, "label_smoothing": 0.1},
        {"optimizer": "adam", "lr": 0.003, "ordered_dropout": [0.25, 0.5], "epochs": 2},
    ],
    ids=lambda r: r.get("loss", r.get("optimizer")),
)
def test_a_job_of_this_recipe_learns(tmp_path: Path, recipe: dict[str, Any]) -> None:
    run = simulation(tmp_path, recipe)
    run.run()
    first, last = (run.state.history[i]["metrics"] for i in (0, -1))
    assert last["loss"] < first["loss"]
    assert last["accuracy"] > first["accuracy"]
    for device_row in run.state.history[-1]["devices"].values():
        assert device_row["metrics"]["loss_after"] < device_row["metrics"]["loss_before"]
        assert 0 < device_row["metrics"]["accuracy_after"] <= 1


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_where_numbers_are_predicted_all_numbers_are_losses(tmp_path: Path, loss: str) -> None:
    run = simulation(tmp_path, {"loss": loss, "lr": 0.05, "epochs": 2, "huber_delta": 0.2})
    run.run()
    for entry in run.state.history:
        assert set(entry["metrics"]) == {"loss", "samples"}
        for device_row in entry["devices"].values():
            assert not [name for name in device_row["metrics"] if "accuracy" in name]
            assert device_row["metrics"]["loss_after"] < device_row["metrics"]["loss_before"]
    record = run.record()
    assert record.measure == "loss"
    assert record.last.local == {n: p["metrics"]["loss_after"] for n, p in entry["devices"].items()}
    assert record.final() == pytest.approx((np.mean(list(record.last.local.values())), entry["metrics"]["loss"]))
    assert "accurac" not in run_document(record, record).to_markdown().lower()
    figures = final_figures(record)
    assert figures["global_loss"] == pytest.approx(np.mean([e["metrics"]["loss"] for e in run.state.history]))
    assert "local_loss" in figures


def test_frozen_tensors_of_the_global_model_keep_their_bits(tmp_path: Path) -> None:
    model = replace(digits_net(), graph=digits_net().graph.copy())
    names = [t.name for t in model.architecture.tensors]
    last = names[-1].rpartition(".")[0]
    tiny = model.tensors[names[0]].copy()
    tiny.flat[0] = 1e-30  # sums of updates would round it off
    model.graph.initializers[names[0]] = tiny
    run = simulation(tmp_path, {"trainable": [f"{last}.*"], "lr": 0.1}, model=model)
    shares: set[float] = set()

    def look(simulation: Simulation) -> None:
        for task in simulation.state.tasks.values():
            if task.update and task.offer:
                shares.add(task.update["size"] / task.offer["weights"]["size"])

    run.run(look)
    assert shares
    assert max(shares) < 0.6  # what stays doesn't travel up
    after = tensorfile.decode(run.store.read(run.state.model))
    for name, value in model.tensors.items():
        assert (after[name].tobytes() == value.tobytes()) == (not name.startswith(last)), name
