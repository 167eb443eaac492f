"""The pages on settings and exit codes agree with the code."""

import re
from pathlib import Path

from fedprune.core.errors import ExitCode
from fedprune_server.config.tables import parse_config
from support.paths import ROOT

DOCS = ROOT / "docs"


def example() -> dict[str, object]:
    block = re.search(r"```toml\n(.*?)```", (DOCS / "configure-a-job.md").read_text(), re.DOTALL)
    assert block is not None
    return parse_toml(block.group(1))


def parse_toml(text: str) -> dict[str, object]:
    try:
        import tomllib
    except ModuleNotFoundError:
        import tomli as tomllib
    return tomllib.loads(text)


def test_the_example_configuration_is_valid(tmp_path: Path) -> None:
    assert parse_config(example(), tmp_path).job.name == "leaves"


def test_the_other_tables_of_settings_are_valid(tmp_path: Path) -> None:
    pages = ("rounds.md", "several-jobs.md")
    blocks = [b for page in pages for b in re.findall(r"```toml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)]
    jobs = [parse_config(parse_toml(block), tmp_path).job for block in blocks]
    assert [(j.name, j.schedule.get("kind")) for j in jobs] == [("job", "semi-async"), ("birds", None)]


def test_every_exit_code_has_a_paragraph_that_says_how_to_resolve_it() -> None:
    text = (DOCS / "exit-codes.md").read_text()
    paragraphs = dict(re.findall(r"^## (\d+: \w+)\n\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    assert list(paragraphs) == [f"{int(c)}: {c.name}" for c in ExitCode]
    assert all("How to resolve" in " ".join(p.split()) for p in paragraphs.values())
