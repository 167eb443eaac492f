"""The pages of tasks show the results that there are, and jobs with the recipes that gave them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedprune.core.errors import ConfigError
from fedprune.core.imports import import_user_module
from fedprune.core.toml_file import read_toml
from fedprune_server.config.tables import parse_config
from support.paths import ROOT

pytestmark = pytest.mark.torch

FOLDER = ROOT / "docs" / "tasks"
PAGES = sorted(set(FOLDER.glob("*.md")) - {FOLDER / "README.md"})
OWN_MODEL = "adapters.md"  # whose job starts from a model of one's own, in place of the benchmark's


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.tasks import pages

    return pages


def tasks_on(page: Path) -> list[str]:
    return re.findall(r"<!-- task: ([\w-]+) -->", page.read_text())


def test_the_tables_are_those_of_the_results(benchmark: Any) -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "tasks.json").read_text())
    stale = {p.name for p, text in benchmark.docs_pages(results, FOLDER).items() if text != p.read_text()}
    assert not stale, "run `python -m benchmarks.tasks`"


def test_every_task_has_a_page_and_a_line(benchmark: Any) -> None:
    assert sorted(name for page in PAGES for name in tasks_on(page)) == sorted(benchmark.TASKS)
    index = (FOLDER / "README.md").read_text()
    assert all(f"({page.name})" in index for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_job_on_a_page_is_that_of_the_figures(page: Path, benchmark: Any, tmp_path: Path) -> None:
    [block] = re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL)
    (tmp_path / "fleet.toml").write_text(block)
    config = parse_config(read_toml(tmp_path / "fleet.toml", ConfigError), tmp_path)
    task = benchmark.TASKS[tasks_on(page)[0]]
    assert (config.job.recipe, config.job.rounds, config.job.strategy) == (task.recipe, task.rounds, "fedprune")
    named = re.findall(r'"((?:benchmarks|examples)\.\S+):(\w+)"', block)
    expected_names = set() if page.name == OWN_MODEL else {task.net, *task.own.values()}
    assert {getattr(import_user_module(module), name) for module, name in named} == expected_names
