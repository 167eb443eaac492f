"""`fedprune-device train`: a bundle in, the same bundle with trained weights out, without a server."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.core.errors import ExitCode
from fedprune.model.selection import Tensors
from fedprune.runtime.bundle import MANIFEST, WEIGHTS, open_bundle
from fedprune_device.cli import main
from fedprune_device.data.dataset import LocalData
from fedprune_device.serving.predictor import Predictor
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingControl, TrainingTask

pytestmark = pytest.mark.board

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def samples(tmp_path: Path, data: LocalData) -> Path:
    path = tmp_path / "attic.npz"
    np.savez(path, x_train=data.x_train, y_train=data.y_train, x_test=data.x_test, y_test=data.y_test)
    return path


def train(bundle: Path, samples: Path | str, out: Path, *options: str) -> int:
    return main.main(["train", "--bundle", str(bundle), "--data", str(samples), "--out", str(out), *options])


def accuracy(folder: Path, data: LocalData) -> float:
    return float(np.mean(np.argmax(Predictor(folder).predict(data.x_test), axis=1) == data.y_test))


def test_a_trained_bundle_has_the_weights_that_training_gives(
    tmp_path: Path, bundle: Path, samples: Path, data: LocalData, weights: Tensors, capsys: Capture
) -> None:
    assert train(bundle, samples, tmp_path / "out", "--epochs", "3", "--set", "lr=0.1", "--threads", "1") == ExitCode.OK
    source, trained = open_bundle(bundle), open_bundle(tmp_path / "out")
    for field in (lambda b: b.selection.digest, lambda b: b.recipe, lambda b: b.target, lambda b: b.class_names):
        assert field(trained) == field(source)
    recipe = source.recipe.from_dict({**source.recipe.to_dict(), "epochs": 3, "lr": 0.1})
    expected = Trainer(bundle / "training.onnx").train(
        weights, data, TrainingTask(recipe, seed=0, device="", round=1, classes=3, widths=source.selection.widths)
    )
    for name, value in tensorfile.load_tensors(trained.path(WEIGHTS)).items():
        np.testing.assert_array_equal(value, expected.tensors[name])
    before, after = accuracy(bundle, data), accuracy(tmp_path / "out", data)
    assert after > before
    assert len(capsys.readouterr().err.splitlines()) == 1, "in a pipe a line every ten seconds, and the last"
    assert train(bundle, samples, tmp_path / "again", "--epochs", "3", "--set", "lr=0.1", "--json") == ExitCode.OK
    body = json.loads(capsys.readouterr().out)
    assert (body["steps"], body["samples"], body["test_samples"]) == (9, 70, 20)
    assert (body["before"]["accuracy"], body["after"]["accuracy"]) == (pytest.approx(before), pytest.approx(after))
    assert body["out"] == str(tmp_path / "again")


def interrupt_training(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Press Ctrl-C once a training step is done."""
    plain_train: Callable[..., Any] = Trainer.train

    def train_and_interrupt(
        trainer: Trainer, tensors: Any, data: Any, task: TrainingTask, control: TrainingControl
    ) -> Any:
        def press_at_step(done: int, total: int) -> None:
            control.progress(done, total)
            if done == step:
                os.kill(os.getpid(), signal.SIGINT)

        return plain_train(trainer, tensors, data, task, replace(control, progress=press_at_step))

    monkeypatch.setattr(Trainer, "train", train_and_interrupt)


def test_an_interrupted_training_keeps_what_was_trained(
    tmp_path: Path, bundle: Path, samples: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert train(bundle, samples, tmp_path / "whole", "--epochs", "9", "--set", "max_steps=4") == ExitCode.OK
    interrupt_training(monkeypatch, 4)
    assert train(bundle, samples, tmp_path / "out", "--epochs", "9") == ExitCode.INTERRUPTED
    interrupted, short = open_bundle(tmp_path / "out"), open_bundle(tmp_path / "whole")
    assert interrupted.path(WEIGHTS).read_bytes() == short.path(WEIGHTS).read_bytes()
    message = capsys.readouterr().err.splitlines()[-1]
    assert message == f"interrupted: after 4 of 27 steps; {tmp_path / 'out'} holds what was trained until then"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--set", "optimizer=adam"), ExitCode.USAGE, "needs another training graph"),
        (("--set", "rate=1"), ExitCode.CONFIG, "rate"),
        (("--lr", "1e3", "--epochs", "9", "--set", "weight_decay=1000"), ExitCode.DIVERGED, "not finite"),
        (("--data", "nothing.npz"), ExitCode.DATA, "nothing.npz"),
    ],
)
def test_what_can_not_be_trained_is_one_line_and_leaves_no_bundle(
    tmp_path: Path, bundle: Path, samples: Path, options: tuple[str, ...], code: ExitCode, message: str, capsys: Capture
) -> None:
    assert train(bundle, samples, tmp_path / "out", *options) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_the_result_takes_the_place_of_nothing_else(
    tmp_path: Path, bundle: Path, samples: Path, capsys: Capture
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    assert train(bundle, samples, tmp_path / "full") == ExitCode.BUNDLE
    assert "holds no bundle" in capsys.readouterr().err
    (bundle / MANIFEST).write_text(json.dumps({**json.loads((bundle / MANIFEST).read_text()), "widths": [9]}))
    assert train(bundle, samples, tmp_path / "out") == ExitCode.BUNDLE
