"""The pages on settings and exit codes agree with the code."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from fedprune.core.errors import ExitCode, FedpruneError
from fedprune.jobs.job import Job
from fedprune.model.recipe import LOSSES, OPTIMIZERS, SCHEDULES, Recipe
from fedprune.updates.privacy import WRITTEN, Privacy
from fedprune_server.config.alert_settings import AlertSettings
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.config.tables import parse_config
from manual.errors import by_exit_code
from support.paths import ROOT

DOCS = ROOT / "docs"


def example() -> dict[str, object]:
    text = (DOCS / "configure-a-job.md").read_text()
    block = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return parsed(block.group(1))


def parsed(text: str) -> dict[str, object]:
    try:
        import tomllib
    except ModuleNotFoundError:
        import tomli as tomllib
    return tomllib.loads(text)


def test_the_example_configuration_is_valid(tmp_path: Path) -> None:
    assert parse_config(example(), "example", tmp_path).job.name == "leaves"


def test_the_example_configuration_has_every_key() -> None:
    body = example()
    job = dict(body["job"])  # type: ignore[call-overload]
    assert set(job.pop("recipe")) == {f.name for f in fields(Recipe)} - set(WRITTEN) - {
        "secure_aggregation",  # the job's own, which it writes
        "ignore_label",
        "metric",
    }
    assert set(job["privacy"]) == {f.name for f in fields(Privacy)}
    assert set(job) == {f.name for f in fields(Job)} - {"recipe"}
    alerts = {f.name for f in fields(AlertSettings)}
    assert set(body["alerts"]) == alerts - {"webhook_secret", "mail_password"}  # type: ignore[call-overload]
    tables = {"job", "model", "evaluation", "calibration", "alerts"}
    assert tables <= set(body)
    server = {f.name for f in fields(ServerConfig)} - tables - {"input_shape", "loss", "lora", "base", "metric"}
    assert set(body["server"]) == server - {
        "ca",
        "console_certificate",
        "console_key",
        "console_releases",
        "database",
        "profiles",
    }  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("setting", "words"), [("loss", LOSSES), ("optimizer", tuple(OPTIMIZERS)), ("lr_schedule", SCHEDULES)]
)
def test_the_example_names_every_value_of_a_choice(setting: str, words: tuple[str, ...]) -> None:
    line = re.search(rf"^{setting} = .*$", (DOCS / "configure-a-job.md").read_text(), re.MULTILINE)
    assert line is not None
    assert set(words) <= set(re.findall(r"\w+", line[0]))


def test_the_example_names_the_right_defaults() -> None:
    text = (DOCS / "configure-a-job.md").read_text()
    said = dict(re.findall(r"^(\w+) = .*default (\S+)$", text, re.MULTILINE))
    assert {"rounds", "devices", "epochs", "keep"} <= set(said)
    for kind in (Job, Privacy, Recipe, ServerConfig, AlertSettings):
        for field in fields(kind):
            if field.name in said:
                default = field.default
                shown = json.dumps(str(default) if isinstance(default, Path) else default)
                assert said.pop(field.name) == shown
    assert said == {}


def test_the_other_tables_of_settings_are_valid(tmp_path: Path) -> None:
    pages = ("rounds.md", "several-jobs.md")
    blocks = [b for page in pages for b in re.findall(r"```toml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)]
    jobs = [parse_config(parsed(block), "example", tmp_path).job for block in blocks]
    assert [(j.name, j.schedule.get("kind")) for j in jobs] == [("job", "semi-async"), ("birds", None)]


def test_every_exit_code_has_a_paragraph_that_says_how_to_resolve_it() -> None:
    text = (DOCS / "exit-codes.md").read_text()
    parts = dict(re.findall(r"^## (\d+: \w+)\n\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    assert list(parts) == [f"{int(c)}: {c.name}" for c in ExitCode]
    assert all("How to resolve" in " ".join(p.split()) for p in parts.values())


def test_every_error_is_listed_with_its_exit_code() -> None:
    text = (DOCS / "exit-codes.md").read_text()
    parts = dict(re.findall(r"^## (\d+): \w+\n\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    listed = {code: re.findall(r"`(\w+)`", part.partition("\nIn Python: ")[2]) for code, part in parts.items()}
    assert listed == {str(int(code)): names for code, names in by_exit_code(DOCS.parent).items()}


def test_errors_are_found_with_the_exit_codes_that_they_have() -> None:
    """Reading the source gives what Python gives, for the errors that are imported here."""
    known = {name: code for code, names in by_exit_code(DOCS.parent).items() for name in names}
    waiting = list(FedpruneError.__subclasses__())
    assert len(waiting) > 15
    while waiting:
        error = waiting.pop()
        if error.__module__.startswith("fedprune"):
            assert known[error.__name__] == error.exit_code
            waiting += error.__subclasses__()


def test_the_table_of_exit_codes_is_complete() -> None:
    rows = re.findall(r"\| (\d+) \| (\w+) ", (DOCS / "exit-codes.md").read_text())
    assert {(int(a), b) for a, b in rows} == {(int(c), c.name) for c in ExitCode}
