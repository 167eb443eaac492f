"""Tasks other than one class per sample, from the job to the report and to a board's own prediction."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedprune_export as fx
from fedprune.model.recipe import Recipe
from fedprune.planning.profile_store import find_profile
from fedprune_device.cli.main import main as device
from fedprune_device.data.dataset import LocalData
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.results.tables import final_rows
from fedprune_server.simulation.simulation import Simulation
from support.fakes.digits_simulation import KINDS, digits_simulation, final_weights
from support.nets.small_nets import Reader

pytestmark = pytest.mark.torch

K, SIDE, VOID = 3, 12, 255


class Shapes(nn.Module):
    """A small net that looks at halves of the picture, too: the class of each pixel."""

    input_shape = (3, SIDE, SIDE)

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.coarse = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.out = nn.Conv2d(28, K, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        local = self.local(x)
        return self.out(torch.cat([local, nn.functional.interpolate(self.coarse(local), scale_factor=2.0)], 1))


def pixels(seed: int, count: int = 60) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pictures of a bright and a dark square on noise, and what each pixel belongs to; the frame isn't labelled."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 0.5, (count, 3, SIDE, SIDE)).astype(np.float32)
    y = np.zeros((count, SIDE, SIDE), np.uint8)
    for i in range(count):
        for kind, light in ((1, 1.5), (2, -1.5)):
            top, left = rng.integers(0, SIDE - 4, 2)
            x[i, :, top : top + 4, left : left + 4] += light
            y[i, top : top + 4, left : left + 4] = kind
    y[:, [0, -1]], y[:, :, [0, -1]] = VOID, VOID
    return x, y


def overlap(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """1 minus the soft overlap of the squares (Dice)."""
    share = outputs.softmax(1)[:, 1:]
    masks = torch.stack([labels == 1, labels == 2], 1).float()
    return 1 - ((2 * (share * masks).sum((2, 3)) + 1) / ((share + masks).sum((2, 3)) + 1)).mean(1)


overlap.target_shape, overlap.target_dtype = (SIDE, SIDE), "int64"  # type: ignore[attr-defined]


def simulation(folder: Path, recipe: dict[str, Any], loss: Any = None) -> Simulation:
    torch.manual_seed(0)
    model, fleet = fx.load(Shapes(), loss=loss), []
    for number, name in enumerate(KINDS):
        x, y = pixels(number)
        fleet.append(VirtualDevice(name, find_profile(name), LocalData(x[:45], y[:45], x[45:], y[45:])))
    training = {"epochs": 3, "batch_size": 15, "lr": 0.2, **recipe}
    return digits_simulation(
        folder, model=model, fleet=fleet, evaluation=pixels(9), rounds=3, strategy="fedprune",
        recipe=Recipe.from_dict(training),
    )  # fmt: skip


def test_a_loss_of_ones_own_is_lowered_by_a_fleet(tmp_path: Path) -> None:
    run = simulation(tmp_path, {"loss": "custom"}, overlap)
    run.run()
    losses = [row.metrics.get("loss") or 9.0 for row in run.record().rounds]
    assert run.record().measure == "loss"
    assert losses[-1] < losses[0] - 0.05, losses


def test_a_fleet_trains_by_a_teachers_outputs(tmp_path: Path) -> None:
    """With all settings of the optimiser's state and rate."""

    def with_teacher_outputs(seed: int) -> LocalData:
        x, y = pixels(seed)
        labels = 4 * (y[:, None] == np.arange(K)[:, None, None]).astype(np.float32) - 2
        return LocalData(x[:45], labels[:45], x[45:], labels[45:])

    torch.manual_seed(0)
    test = with_teacher_outputs(9)
    settings = {"optimizer": "lion", "keep_optimizer_state": True, "lr_warmup": 0.5, "lr_schedule": "cosine"}
    run = digits_simulation(
        tmp_path, model=fx.load(Shapes()),
        fleet=[VirtualDevice(n, find_profile(n), with_teacher_outputs(i)) for i, n in enumerate(KINDS)],
        evaluation=(test.x_train, test.y_train), rounds=3, strategy="fedavg",
        recipe=Recipe.from_dict({"epochs": 3, "batch_size": 15, "lr": 0.01, "loss": "distill", **settings}),
    )  # fmt: skip
    run.run()
    record = run.record()
    losses = [row.metrics.get("loss") or 9.0 for row in record.rounds]
    assert losses[-1] < 0.8 * losses[0], losses
    assert record.measure == "loss"
    assert record.last.metrics.get("accuracy") is None


def test_a_bundle_that_labels_pixels_trains_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, (x, y) = fx.load(Shapes()), pixels(1)
    np.savez(tmp_path / "pixels.npz", x=x, y=y)
    plan = fx.plan(model, KINDS[0], recipe=Recipe(ignore_label=VOID, epochs=2, batch_size=15, lr=0.2))
    report = fx.export(
        model, plan, tmp_path / "bundle", data=tmp_path / "pixels.npz", class_names=["none", "light", "dark"]
    )
    assert report.accuracy is not None
    source, out = str(tmp_path / "pixels.npz"), tmp_path / "trained"
    assert device(["train", "--bundle", str(tmp_path / "bundle"), "--data", source, "--out", str(out)]) == 0
    assert "accuracy" in capsys.readouterr().out.partition("after:")[2]
    assert device(["predict", "--bundle", str(out), "--input", str(tmp_path / "pixels.npz")]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith(f"0: {SIDE} x {SIDE} positions, none ")


def test_boards_and_server_judge_by_the_tasks_own_metric(tmp_path: Path) -> None:
    run = simulation(tmp_path, {"ignore_label": VOID, "balance_classes": True, "metric": "miou"})
    run.run()
    record = run.record()
    assert record.measure == "miou"
    scores = [value or 0.0 for value in record.global_values()]
    assert {row.updates for row in record.rounds} == {len(KINDS)}
    assert scores[-1] > scores[0], scores
    largest_share = float(np.mean(pixels(9)[1][pixels(9)[1] != VOID] == 0))
    assert (record.last.metrics.get("accuracy") or 0.0) > largest_share + 0.05
    assert scores[-1] < (record.last.metrics.get("accuracy") or 0.0), "most places are of no square"
    assert set(record.last.local) == set(KINDS)
    assert set(record.last.device_metrics) >= {"miou_before", "miou_after", "accuracy_after", "loss_after"}
    assert "local miou" in final_rows([record])[0]


def test_boards_train_unequal_ranks_of_adapters_and_nothing_else(tmp_path: Path) -> None:
    def sentences(seed: int) -> LocalData:
        x = np.random.default_rng(seed).integers(0, 11, (200, *Reader.input_shape))
        return LocalData(x[:150], x[:150, 0] % 5, x[150:], x[150:, 0] % 5)

    torch.manual_seed(0)
    model, test = fx.load(Reader(), lora="16:q.weight,v.weight,wide.weight"), sentences(9)
    names = [f"board-{n}" for n in range(4)]
    run = digits_simulation(
        tmp_path, model=model,
        fleet=[VirtualDevice(n, find_profile(KINDS[1]), sentences(i)) for i, n in enumerate(names)],
        evaluation=(test.x_train, test.y_train), rounds=4, strategy="fedprune", compression="none",
        options={"densities": [1.0, 0.5, 0.25, 0.125], "core": 0}, recipe=Recipe(epochs=4, batch_size=10, lr=0.02),
    )  # fmt: skip
    run.run()
    record, trained = run.record(), final_weights(run)
    losses = [row.metrics.get("loss") or 9.0 for row in record.rounds]
    assert losses[-1] < losses[0] - 0.05, losses
    for name, before in model.tensors.items():
        assert np.array_equal(before, trained[name]) == (".lora_" not in name), name
    holders = [4] * 2 + [3] * 2 + [2] * 4 + [1] * 8
    assert [sorted(ranks, reverse=True) for ranks in record.last.coverage] == [holders] * 3
    adapters = sum(value.nbytes for name, value in model.tensors.items() if ".lora_" in name)
    expected_bytes = {name: adapters * share for name, share in zip(names, (1, 0.5, 0.25, 0.125), strict=True)}
    assert all(0 <= up - expected_bytes[name] < 1000 for name, (_, up, *_) in record.last.spent.items()), (
        record.last.spent
    )


def test_a_low_base_travels_once_and_adapters_in_every_round(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 11, (60, *Reader.input_shape))
    data = LocalData(x[:40], x[:40, 0] % 5, x[40:], x[40:, 0] % 5)
    torch.manual_seed(0)
    model = fx.load(Reader(), lora="16:q.weight,v.weight,wide.weight", base="int8")
    run = digits_simulation(
        tmp_path, model=model, fleet=[VirtualDevice(n, find_profile(KINDS[1]), data) for n in "ab"],
        evaluation=(data.x_train, data.y_train), rounds=3, compression="none", compression_down="none",
        strategy="fedprune", options={"densities": [1.0, 0.5]}, recipe=Recipe(epochs=1, batch_size=10, lr=0.02),
    )  # fmt: skip
    run.run()
    assert set(final_weights(run)) == {n for n in model.tensors if ".lora_" in n}
    adapters = sum(value.nbytes for value in model.tensors.values())
    first, second, third = run.record().rounds
    for share, name in ((1, "a"), (0.5, "b")):
        down, up, *_ = first.spent[name]
        assert down > adapters * share + len(model.base_file or b"")
        assert 0 <= up - adapters * share < 1000
        for later in (second, third):
            down, up, *_ = later.spent[name]
            assert 0 <= down - adapters * share < 1000, later.spent
            assert 0 <= up - adapters * share < 1000, later.spent
