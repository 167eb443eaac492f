"""fleet.toml: what is right is read, what is wrong is named with file, table and key."""

from dataclasses import fields
from pathlib import Path

import pytest

from fedprune.core.errors import ConfigError
from fedprune_export.model_options import ImportChoices
from fedprune_server.cli.main import build_parser
from fedprune_server.cli.run import load_config
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.config.tables import config_tables, parse_config
from fedprune_server.engine.job_inputs import import_choices
from support.fakes.opened_job import read_config

WHOLE = """
[job]
name = "leaves"
seed = 7
rounds = 20
devices = 4
deadline_s = 120.0
scorer = "curvature"

[job.recipe]
epochs = 2
lr = 0.1

[model]
path = "model.onnx"

[evaluation]
data = "eval.npz"

[server]
site = "greenhouse"
broker = "mqtts://broker.example"
state = "state"
keep = 5
"""


def read(folder: Path, text: str) -> ServerConfig:
    path = folder / "fleet.toml"
    path.write_text(text)
    return read_config(path)


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    config = read(tmp_path, WHOLE)
    assert (config.job.name, config.job.rounds, config.job.recipe.epochs) == ("leaves", 20, 2)
    assert (config.site, config.broker, config.keep) == ("greenhouse", "mqtts://broker.example", 5)


def test_paths_count_from_the_folder_of_the_file(tmp_path: Path) -> None:
    config = read(tmp_path, WHOLE)
    assert config.model == str(tmp_path / "model.onnx")
    assert config.evaluation == str(tmp_path / "eval.npz")
    assert config.state == tmp_path / "state"


def test_a_ca_is_a_file_beside_the_configuration_and_for_tls_alone(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("x")
    assert read(tmp_path, '[server]\nbroker = "mqtts://broker.example"\nca = "ca.pem"').ca == tmp_path / "ca.pem"
    with pytest.raises(ConfigError, match=r"server\.ca: .*mqtts"):
        read(tmp_path, '[server]\nca = "ca.pem"')
    with pytest.raises(ConfigError, match=r"server\.ca: .*other\.pem"):
        read(tmp_path, '[server]\nbroker = "mqtts://broker.example"\nca = "other.pem"')


def test_a_torch_factory_may_need_an_input_shape(tmp_path: Path) -> None:
    text = '[model]\npath = "nets:make"\ninput_shape = [3, 8, 8]'
    assert read(tmp_path, text).input_shape == (3, 8, 8)
    assert read(tmp_path, text.replace("8, 8", '"4:8"')).input_shape == (3, "4:8")
    with pytest.raises(ConfigError, match=r"model\.input_shape: .*8:4"):
        read(tmp_path, text.replace("8, 8", '"8:4"'))
    for wrong in ("[]", "[3, 8.0]", "[true]", "8"):
        with pytest.raises(ConfigError, match=r"model\.input_shape"):
            read(tmp_path, text.replace("[3, 8, 8]", wrong))


def test_a_loss_of_ones_own_goes_with_its_recipe(tmp_path: Path) -> None:
    text = '[job.recipe]\nloss = "custom"\n[model]\nloss = "'
    assert read(tmp_path, text + 'my_losses:dice"').loss == "my_losses:dice"
    assert read(tmp_path, text + 'dice.onnx"').loss == str(tmp_path / "dice.onnx")
    with pytest.raises(ConfigError, match=r"model\.loss: .*cross_entropy"):
        read(tmp_path, '[model]\nloss = "my_losses:dice"')


def test_an_empty_file_gives_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "") == ServerConfig()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        read_config(tmp_path / "nowhere.toml")


def test_a_simulations_tables_are_left_to_the_simulation(tmp_path: Path) -> None:
    body = {"job": {"name": "leaves"}, "devices": [{"name": "a"}], "dropouts": {"share": 0.1}}
    assert parse_config(body, tmp_path) == parse_config({"job": body["job"]}, tmp_path)


MODEL_CHOICES = """
[model]
path = "net.onnx"
input_shape = [3, "4:8"]
fix = { rate = 16000 }
token_ids = true
output = "scores"
class_axis = -1
parameters = ["a.weight"]
prefer = "fine"
lora = "8"
base = "int8"
"""


def test_choices_of_a_models_import_are_the_same_in_a_file_and_as_options(tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(MODEL_CHOICES)
    (tmp_path / "names").write_text("a.weight\n")
    options = "--input-shape 3,4:8 --fix rate=16000 --token-ids --output scores --class-axis -1 --prefer fine --lora 8"
    words = [
        "run",
        "--state",
        str(tmp_path),
        "--base",
        "int8",
        "--parameters",
        str(tmp_path / "names"),
        *options.split(),
    ]
    file_config = read_config(tmp_path / "fleet.toml")
    assert file_config.model == str(tmp_path / "net.onnx")
    expected = ImportChoices(
        input_shape=(3, "4:8"), fix={"rate": 16000}, token_ids=True, output="scores", class_axis=-1,
        parameters=("a.weight",), prefer="fine", lora="8", base="int8", loss="cross_entropy",
    )  # fmt: skip
    assert all(getattr(expected, c.name) != c.default for c in fields(ImportChoices) if c.name != "metric")
    for config in (file_config, load_config(build_parser().parse_args(words), {}).config):
        assert import_choices(config) == expected
        assert parse_config(config_tables(config), Path()) == config


@pytest.mark.parametrize(
    "text",
    [
        "class_axis = 9",
        'prefer = "few"',
        'base = "int4"',
        "token_ids = 1",
        'fix = "rate"',
        'fix = { rate = "16k" }',
        "parameters = 1",
    ],
)
def test_choices_of_a_models_import_that_make_no_sense(tmp_path: Path, text: str) -> None:
    (tmp_path / "fleet.toml").write_text(f"[model]\n{text}\n")
    with pytest.raises(ConfigError, match=f"model.{text.split()[0]}"):
        read_config(tmp_path / "fleet.toml")
