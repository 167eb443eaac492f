"""The pages on settings and exit codes agree with the code."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from fedprune.core.errors import ExitCode
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.updates.privacy import WRITTEN, Privacy
from fedprune_server.config.alert_settings import AlertSettings
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.config.tables import parse_config
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
    assert parse_config(example(), tmp_path).job.name == "leaves"


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
    assert set(body["alerts"]) == alerts - {"webhook_secret", "services"}  # type: ignore[call-overload]
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


def test_the_other_tables_of_settings_are_valid(tmp_path: Path) -> None:
    pages = ("rounds.md", "several-jobs.md")
    blocks = [b for page in pages for b in re.findall(r"```toml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)]
    jobs = [parse_config(parsed(block), tmp_path).job for block in blocks]
    assert [(j.name, j.schedule.get("kind")) for j in jobs] == [("job", "semi-async"), ("birds", None)]


def test_every_exit_code_has_a_paragraph_that_says_how_to_resolve_it() -> None:
    text = (DOCS / "exit-codes.md").read_text()
    parts = dict(re.findall(r"^## (\d+: \w+)\n\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    assert list(parts) == [f"{int(c)}: {c.name}" for c in ExitCode]
    assert all("How to resolve" in " ".join(p.split()) for p in parts.values())
