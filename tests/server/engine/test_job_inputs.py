"""Inputs of a job that differ at a later start: refused where the job keeps its own, else taken and said."""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fedprune.core.errors import ConfigError, DataError
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune_export.importing import import_onnx
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.engine.job_inputs import read_job_model
from fedprune_server.engine.state_folder import StateFolder
from fedprune_server.simulation.digits import digits_model, load_digits
from support.fakes.opened_job import open_job

USER_MODULE = """
import torch
from torch import nn

WIDE, WEIGHT, EXACT, MEAN, SEED = 6, 1.0, 1.0, 0.0, None


class Net(nn.Module):
    input_shape = (4,)

    def __init__(self):
        super().__init__()
        if SEED is not None:
            torch.manual_seed(SEED)
        self.body, self.head = nn.Linear(4, WIDE), nn.Linear(WIDE, 2)
        self.register_buffer("mean", torch.full((4,), MEAN))
        self.noise = torch.rand(2)  # drawn, and neither a parameter nor a buffer

    def forward(self, x):
        return self.head(torch.relu(self.body(x - self.mean))) + self.noise


def loss(outputs, labels):
    return WEIGHT * ((outputs - labels) ** 2).mean(1)


def metric(outputs, labels):
    return EXACT * (outputs.argmax(1) == labels.argmax(1)).float()
"""


@pytest.fixture(scope="module")
def user_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """A user's module with a net, a loss and a metric."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_inputs.py").write_text(USER_MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module("own_inputs")
    del sys.modules["own_inputs"]


@pytest.fixture
def edit(user_module: ModuleType) -> Iterator[Callable[[str, object], None]]:
    """Changes the user's module, which is as it was after the test."""
    path = Path(str(user_module.__file__))

    def write(name: str, value: object) -> None:
        path.write_text(f"{USER_MODULE}\n{name} = {value!r}\n")
        importlib.reload(user_module)

    yield write
    path.write_text(USER_MODULE)
    importlib.reload(user_module)


def torch_config(**changes: Any) -> ServerConfig:
    settings = {"model": "own_inputs:Net", "loss": "own_inputs:loss", "metric": "own_inputs:metric"} | changes
    return ServerConfig(job=Job(recipe=Recipe(loss="custom", metric="custom")), **settings)


@pytest.fixture(scope="module")
def began(user_module: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder whose job began with that module."""
    state = tmp_path_factory.mktemp("began") / "state"
    with StateFolder(state) as folder:
        open_job(folder, torch_config())
    return state


@pytest.mark.torch
def test_a_factory_that_draws_other_weights_gives_the_same_model(began: Path) -> None:
    before = (began / "model.onnx").read_bytes()
    with StateFolder(began) as folder:
        assert open_job(folder, torch_config()).setting_changes == []
    assert (began / "model.onnx").read_bytes() == before


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("WIDE", 8, "own_inputs:Net is not the model"),
        ("MEAN", 0.5, "own_inputs:Net is not the model"),  # a tensor's value alone
        ("SEED", 3, "own_inputs:Net is not the model"),  # weights that are read, not drawn
        ("WEIGHT", 100.0, "own_inputs:loss is not the loss"),
        ("EXACT", 2.0, "own_inputs:metric is not the metric"),
    ],
)
def test_other_code_of_a_torch_model_loss_or_metric_is_refused(
    name: str, value: object, what: str, began: Path, edit: Callable[[str, object], None]
) -> None:
    edit(name, value)
    with StateFolder(began) as folder, pytest.raises(ConfigError, match=what) as error:
        folder.read_job(torch_config())
    assert error.value.hint


@pytest.mark.torch
def test_a_loss_without_its_model_is_compared(began: Path, edit: Callable[[str, object], None]) -> None:
    with StateFolder(began) as folder:
        assert open_job(folder, torch_config(model=None)).setting_changes == []
        edit("WEIGHT", 100.0)
        with pytest.raises(ConfigError, match="is not the loss"):
            folder.read_job(torch_config(model=None))


def test_adapters_without_their_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(digits_model())
    with StateFolder(tmp_path / "state") as folder:
        open_job(folder, ServerConfig(model=str(tmp_path / "model.onnx")))
        with pytest.raises(ConfigError, match="lora"):
            folder.read_job(ServerConfig(lora="2"))
        with pytest.raises(ConfigError, match="output"):
            folder.read_job(ServerConfig(output="v11"))
        with pytest.raises(ConfigError, match="is not the model"):
            folder.read_job(ServerConfig(base="float16"))


def test_a_job_trains_from_the_value_that_its_settings_name(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(digits_model())
    raw = read_job_model(ServerConfig(model=str(tmp_path / "model.onnx"), output="v7"))
    assert [n.op for n in import_onnx(raw, "model").graph.nodes][-1] == "Conv"


def test_a_model_whose_source_is_gone_is_said_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(digits_model())
    with StateFolder(tmp_path / "state") as folder:
        open_job(folder, ServerConfig(model=str(model)))
        model.unlink()
        caplog.clear()
        opened = open_job(folder, ServerConfig(model=str(model)))
    assert opened.setting_changes == []
    assert str(model) in caplog.text


def test_other_samples_of_the_server_are_taken_and_said(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(digits_model())
    x, y = load_digits()[:2]
    source = tmp_path / "samples.npz"
    config = ServerConfig(model=str(tmp_path / "model.onnx"), evaluation=str(source), calibration=str(source))
    with StateFolder(tmp_path / "state") as folder:
        np.savez(source, x=x[:20], y=y[:20])
        assert open_job(folder, config).setting_changes == []
        np.savez_compressed(source, x=x[:20], y=y[:20])  # another file of the same samples
        assert open_job(folder, config).setting_changes == []
        np.savez(source, x=x[:20], y=y[1:21])
        assert [line.partition(":")[0] for line in open_job(folder, config).setting_changes] == ["evaluation"]
        np.savez(source, x=x[1:21], y=y[1:21])
        changes = open_job(folder, config).setting_changes
        assert [line.partition(":")[0] for line in changes] == ["evaluation", "calibration"]
        assert open_job(folder, config).setting_changes == []
        lines = open_job(folder, replace(config, calibration=None)).setting_changes
        assert [line.partition(":")[0] for line in lines] == ["calibration"]


def test_another_built_in_metric_is_taken_and_a_loss_only_if_the_server_s_labels_fit(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(digits_model())
    x, y = load_digits()[:2]
    np.savez(tmp_path / "samples.npz", x=x[:20], y=y[:20])
    config = ServerConfig(model=str(tmp_path / "model.onnx"), evaluation=str(tmp_path / "samples.npz"))

    def with_recipe(**choices: str) -> ServerConfig:
        return replace(config, job=Job(recipe=Recipe(**choices)))  # type: ignore[arg-type]

    with StateFolder(tmp_path / "state") as folder:
        assert open_job(folder, config).setting_changes == []
        assert [line.partition(":")[0] for line in open_job(folder, with_recipe(metric="miou")).setting_changes] == [
            "recipe.metric"
        ]
        with pytest.raises(DataError):
            folder.read_job(with_recipe(loss="mse"))
        assert open_job(folder, with_recipe(metric="miou")).setting_changes == []
        with pytest.raises(ConfigError):  # the model brings no loss of its own
            folder.read_job(replace(with_recipe(loss="custom"), evaluation=None))
        lines = open_job(folder, replace(with_recipe(loss="mse"), evaluation=None)).setting_changes
        assert [line.partition(":")[0] for line in lines] == ["recipe.loss", "recipe.metric", "evaluation"]


def test_other_code_of_a_strategy_is_taken_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_bytes(digits_model())
    (tmp_path / "own_helper.py").write_text("SHARE = 1\n")
    (tmp_path / "own_plan.py").write_text(
        "from fedprune.strategies.presets import PRESETS\n"
        "import own_helper\n\n\ndef plain(job):\n    return PRESETS['plain'](job)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = ServerConfig(model=str(tmp_path / "model.onnx"), job=Job(strategy="own_plan:plain"))
    try:
        with StateFolder(tmp_path / "state") as folder:
            assert open_job(folder, config).setting_changes == []
            (tmp_path / "own_helper.py").write_text("SHARE = 2\n")
            assert [line.partition(":")[0] for line in open_job(folder, config).setting_changes] == ["strategy"]
            assert open_job(folder, config).setting_changes == []
    finally:
        sys.modules.pop("own_plan", None)
        sys.modules.pop("own_helper", None)
