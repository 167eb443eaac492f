"""Settings of file and environment: the higher layer wins, and an error says where the setting stands."""

from dataclasses import fields
from pathlib import Path

import pytest

from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.updates.privacy import Privacy
from fedprune_server.config.alert_settings import AlertSettings
from fedprune_server.config.environment import environment_layer, setting_variables
from fedprune_server.config.layers import errors_with_origin, merge_tables, without_secrets
from fedprune_server.config.server_config import TABLE_KEYS, ServerConfig
from fedprune_server.config.tables import config_tables, parse_config
from support.fakes.opened_job import read_config

FREE = {"input_shape", "options"}
"""Checked with the model or the strategy, in words of their own."""

ANYTHING = {"host", "state", "database"}
"""Any text may be one of these."""


def settings() -> list[tuple[str, str]]:
    kinds = {"job": Job, "job.privacy": Privacy, "job.recipe": Recipe, "server": ServerConfig, "alerts": AlertSettings}
    left = {"job", "privacy", "recipe", "alerts"} | FREE
    keys = [(t, f.name) for t, kind in kinds.items() for f in fields(kind) if f.name not in left]  # type: ignore[arg-type]
    return [(t, k) for t, k in keys if t != "server" or k not in TABLE_KEYS]  # which are in tables of their own


@pytest.mark.parametrize(("table", "key"), settings())
def test_a_wrong_value_is_named_with_the_path_of_its_setting(table: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    for value in ("[[{ x = 1 }]]", "-7", '"no\\u0000such"')[: 2 if key in ANYTHING else 3]:
        if (key, value) == ("ignore_label", "-7"):
            continue
        path.write_text(f"[{table}]\n{key} = {value}\n")
        with pytest.raises(ConfigError) as caught:
            read_config(path)
        assert str(caught.value).startswith(f"{path}: {table}.{key}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprt = 1\n", "server.prt: unknown key (did you mean 'port'?)"),
        ("[model]\n[sever]\n", "sever: unknown table (did you mean 'server'?)"),
        ("rounds = 3\n", "rounds: unknown key"),
        ("[job.recpe]\n", "job.recpe: unknown table (did you mean 'recipe'?)"),
        ("server = 3\n", "server: expected a table [server]"),
        ("[job]\nrecipe = 3\n", "job.recipe: "),
        ("[job]\nstrategy = 'fedprune'\n[job.options]\nfoo = 1\n", "job.options.foo: unknown to strategy 'fedprune'"),
        ("[job]\nstrategy = 'fedprune'\n[job.options]\ndensities = [2]\n", "job.options.densities: expected a number"),
        ("[job.schedule]\nknid = 'async'\n", "job.schedule.knid: unknown key (did you mean 'kind'?)"),
        ("[job.schedule]\nkind='async'\nwindow_s = 3\n", "job.schedule.window_s: "),
        ("[job.schedule]\nkind='async'\nstaleness = 'none'\n", "job.schedule.staleness: expected a table"),
        ("[job.schedule]\nkind='async'\n[job.schedule.staleness]\na = nan\n", "job.schedule.staleness.a: "),
        ("[job.options]\nmixup = 1\n", "job.options.mixup: unknown to strategy 'plain': expected robust"),
        ("[job]\nschedule = 'async'\n", "job.schedule: expected a table [job.schedule], got 'async'"),
        ("[[server]]\n", "server: expected a table [server], got list of length 1"),
        ("[server.console]\nport = 1\n", "server.console: expected a text"),
        ("[server]\nconsole = true\n", "server.console: expected a text"),
        ("[job.recipe]\nmetric = {}\n", "job.recipe.metric: expected miou or"),
        ("[job.recipe]\nlr = nan\n", "job.recipe.lr: expected a number from 0 to 1000, got nan"),
        ("[job]\ndeadline_s = inf\n", "job.deadline_s: expected a number above 0"),
        ('[model]\npath = "a\\u0000.onnx"\n', "model.path: expected a text"),
        ('[server]\nstate = "a\\u0000"\n', "server.state: expected a text"),
    ],
)  # fmt: skip
def test_other_mistakes_are_named_with_theirs(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_table_in_the_place_of_a_text_is_told_how_to_write_it(tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text("[server.console]\nport = 8080\n")
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "fleet.toml")
    assert caught.value.got == "table of length 1"
    assert 'console = "..." below [server]' in caught.value.hint
    assert "in a browser" in caught.value.hint  # what the setting is for


def test_variables_are_read_as_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "db").write_text("postgresql+psycopg://ann:o=#@db/fleet\r\n")
    tables = environment_layer(
        {
            "FEDPRUNE_JOB_NAME": "7",
            "FEDPRUNE_JOB_DENSITY": "0.5",
            "FEDPRUNE_JOB_PRECISION": '["float16"]',
            "FEDPRUNE_JOB_RECIPE_CALIBRATE": "true",
            "FEDPRUNE_JOB_OPTIONS_RANKING": "ordered",
            "FEDPRUNE_JOB_OPTIONS_MIXUP": "0.3",
            "FEDPRUNE_MODEL_PATH": "model.onnx",
            "FEDPRUNE_EVALUATION_DATA": "package.module:function",
            "FEDPRUNE_SERVER_CA": "system",
            "FEDPRUNE_SERVER_STATE": "state",
            "FEDPRUNE_SERVER_DATABASE_FILE": "db",
            "FEDPRUNE_DEVICE": "attic",
            "FEDPRUNE_DATA": "/data",
        }
    ).tables
    assert tables == {
        "job": {
            "name": "7",
            "density": 0.5,
            "precision": ["float16"],
            "recipe": {"calibrate": True},
            "options": {"ranking": "ordered", "mixup": 0.3},
        },
        "model": {"path": str(tmp_path / "model.onnx")},
        "evaluation": {"data": "package.module:function"},
        "server": {
            "ca": "system",
            "state": str(tmp_path / "state"),
            "database": "postgresql+psycopg://ann:o=#@db/fleet",
        },
    }


@pytest.mark.parametrize("key", ["A", "ZED"])
def test_a_table_in_a_file_and_a_variable_of_its_key_are_joined(tmp_path: Path, key: str) -> None:
    (tmp_path / "options").write_text(f"{{b = 2, {key.lower()} = 3}}\n")
    table, single = "FEDPRUNE_JOB_OPTIONS_FILE", f"FEDPRUNE_JOB_OPTIONS_{key}"
    tables = environment_layer({table: str(tmp_path / "options"), single: "1"}).tables
    assert tables["job"]["options"] == {"b": 2, key.lower(): 1}


def test_a_variable_that_holds_a_table_is_named_for_what_is_in_it() -> None:
    layer = environment_layer({"FEDPRUNE_JOB_SCHEDULE": '{kind = "async", foo = 1}'})
    with pytest.raises(ConfigError, match=r"FEDPRUNE_JOB_SCHEDULE: "), errors_with_origin([layer]):
        raise ConfigError(("job", "schedule", "foo"), expected="no such key")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FEDPRUNE_SERVER_KEPT": "3"}, "FEDPRUNE_SERVER_KEPT (did you mean 'FEDPRUNE_SERVER_KEEP'?)"),
        ({"FEDPRUNE_SEVER_KEEP": "3"}, "FEDPRUNE_SEVER_KEEP (did you mean 'FEDPRUNE_SERVER_KEEP'?)"),
        ({"FEDPRUNE_JBO_NAME": "a"}, "FEDPRUNE_JBO_NAME (did you mean 'FEDPRUNE_JOB_NAME'?)"),
        ({"FEDPRUNE_SERVER_SERVICE_HOST": "10.0.0.1"}, "enableServiceLinks: false"),
        (
            {"FEDPRUNE_SERVER_KEEP": "three"},
            'not a value as in TOML: 3, 0.5, true, ["a"]): server.keep: expected a whole',
        ),
        ({"FEDPRUNE_SERVER_KEEP": "3\nsite = 'x'"}, "server.keep: expected a whole number from 1 to 1000000"),
        ({"FEDPRUNE_SERVER_KEEP": ""}, "server.keep: expected a whole number from 1 to 1000000, got ''"),
        (
            {"FEDPRUNE_SERVER_PORT": "65536"},
            "FEDPRUNE_SERVER_PORT: server.port: expected a whole number from 0 to 65535",
        ),
        ({"FEDPRUNE_SERVER_CONSOLE_INSECURE": "yes"}, "server.console_insecure: expected true or false, got 'yes'"),
        ({"FEDPRUNE_SERVER_CONSOLE": " "}, "FEDPRUNE_SERVER_CONSOLE: server.console: expected a text"),
        ({"FEDPRUNE_JOB_RECIPE_LR": "NaN"}, "job.recipe.lr: expected a number from 0 to 1000, got 'NaN'"),
        (
            {"FEDPRUNE_JOB_RECIPE_LR": "1e999"},
            "FEDPRUNE_JOB_RECIPE_LR: job.recipe.lr: expected a number from 0 to 1000",
        ),
        ({"FEDPRUNE_JOB_PRECISION": "float16"}, "job.precision: expected a list"),
        (
            {"FEDPRUNE_JOB_OPTIONS": "3", "FEDPRUNE_JOB_OPTIONS_MIXUP": "1"},
            "OPTIONS: job.options: expected a table, since",
        ),
        ({"FEDPRUNE_SERVER_DATABASE_FILE": "/nowhere"}, "DATABASE_FILE: can't read /nowhere: No such file"),
        ({"FEDPRUNE_SERVER_DATABASE_FILE": "/dev/null"}, "DATABASE_FILE: /dev/null: expected a text of 1 to"),
        ({"FEDPRUNE_SERVER_SITE": "a", "FEDPRUNE_SERVER_SITE_FILE": "b"}, "SITE_FILE: expected this or the variable"),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_environment(environment)
    assert str(caught.value).startswith("environment variable FEDPRUNE_")
    assert caught.value.exit_code == ConfigError.exit_code
    assert message in str(caught.value)


def read_environment(environment: dict[str, str]) -> ServerConfig:
    layer = environment_layer(environment)
    with errors_with_origin([layer]):
        return parse_config(layer.tables, Path())


@pytest.mark.parametrize("name", ["FEDPRUNE_SEVER_SERVICE_HOST", "FEDPRUNE_JOBS_PORT_53_UDP_PROTO", "FEDPRUNE_SEVER"])
def test_names_that_nobody_misspelt_pass(name: str) -> None:
    assert environment_layer({name: "x"}).tables == {}


def test_the_upper_layer_wins_key_by_key() -> None:
    below = {"job": {"rounds": 1, "recipe": {"lr": 1, "epochs": 2}}, "server": {"keep": 3}}
    above = {"job": {"recipe": {"lr": 5}}, "model": {"path": "m"}}
    both = {"job": {"rounds": 1, "recipe": {"lr": 5, "epochs": 2}}, "server": {"keep": 3}, "model": {"path": "m"}}
    assert merge_tables(below, above) == both


def test_a_configuration_becomes_tables_and_tables_that_configuration(tmp_path: Path) -> None:
    config = ServerConfig(
        job=Job(name="leaves", strategy="fedprune", options={"mixup": 0.2}, precision=("int8",)),
        model="model.onnx", evaluation="a.b:c", broker="mqtts://u:p@b", ca=Path("system"), port=0, weight=0.5,
        state=tmp_path, profiles=tmp_path, input_shape=(3, 8, 8), database="postgresql+psycopg://db/x",
    )  # fmt: skip
    assert parse_config(config_tables(config), Path()) == config
    assert parse_config(config_tables(ServerConfig()), Path()) == ServerConfig()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mqtts://ann:se:c@ret@broker:8883", "mqtts://ann:***@broker:8883"),
        ("postgresql+psycopg://ann@db/x?password=secret&sslmode=require", "postgresql+psycopg://ann@db/x?password=***&sslmode=require"),
        ("mqtts://ann@broker", "mqtts://ann@broker"),
    ],
)  # fmt: skip
def test_no_password_is_shown(text: str, expected: str) -> None:
    assert without_secrets(text) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {"FEDPRUNE_SERVER_BROKER": "http://ann:secret@broker"},
        {"FEDPRUNE_SERVER_BROKER": "mqtt://ann:secret@broker", "FEDPRUNE_SERVER_CA": "system"},
    ],
    ids=["scheme", "ca"],
)
def test_no_error_has_a_password(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(environment_layer(environment).tables, Path())
    assert "secret" not in str(caught.value)


def test_every_setting_has_a_variable_of_its_own() -> None:
    variables = setting_variables()
    paths = {path for path, _ in variables.values()}
    assert len(paths) == len(variables)
    assert {(*t.split("."), k) for t, k in settings()} <= paths
    assert not any(name.endswith("_FILE") for name in variables)  # which says where a secret is
    assert variables["FEDPRUNE_SERVER_DATABASE"] == (("server", "database"), True)
    assert variables["FEDPRUNE_MODEL_LOSS"] == (("model", "loss"), True)
    assert variables["FEDPRUNE_JOB_RECIPE_LR"] == (("job", "recipe", "lr"), False)
