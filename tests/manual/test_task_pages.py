"""The pages of tasks show the results that there are, and jobs with the recipes that gave them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedprune.core.errors import ConfigError
from fedprune.core.imports import own_module
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
    return re.findall(r"<!-- figures of ([\w-]+) -->", page.read_text())


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
    config = parse_config(read_toml(tmp_path / "fleet.toml", ConfigError), "fleet.toml", tmp_path)
    task = benchmark.TASKS[tasks_on(page)[0]]
    assert (config.job.recipe, config.job.rounds, config.job.strategy) == (task.recipe, task.rounds, "fedprune")
    named = re.findall(r'"(benchmarks\.\S+):(\w+)"', block)
    wanted = set() if page.name == OWN_MODEL else {task.net, *task.own.values()}
    assert {getattr(own_module(module), name) for module, name in named} == wanted


def fleet_run(at: list[float], curve: list[float], costs: list[int]) -> dict[str, Any]:
    return {"at": at, "curve": curve, "macs": costs, "bytes": costs, "served": curve[-1]}


def test_a_budget_pays_for_rounds_of_what_a_round_costs(benchmark: Any) -> None:
    from benchmarks.tasks import runs

    task = benchmark.TASKS["detection"]  # ten rounds with a core, then two that cost five times as much
    default = fleet_run([], [0.0], [*range(1, 11), 15, 20])
    reference = {"macs": [100], "bytes": [100]}

    rounds = runs.affordable_rounds(task, reference, default)

    core = runs.compose(runs.job_of(task, runs.DEFAULT, devices=1, seed=0)).core
    assert core is not None
    spent = [sum(1 if core.shared_in(n, r, spent=0) else 5 for n in range(1, r + 1)) for r in (rounds, rounds + 1)]
    assert spent[0] <= runs.BYTES_SHARE * 100 < spent[1]


def test_methods_are_compared_when_the_first_is_through(benchmark: Any) -> None:
    slow = fleet_run([4.0, 8.0, 12.0], [0.1, 0.2, 0.9], [1, 2, 3])
    fast = fleet_run([3.0, 6.0, 9.0], [0.3, 0.4, 0.5], [1, 2, 3])
    runs = {"fedavg int8": {"0": fast}, "fedprune": {"0": slow}}

    lines = benchmark.table(benchmark.TASKS["detection"], runs)

    [row] = [line for line in lines if line.startswith("| fedprune")]
    assert row.endswith("| 0.2 / 0.5 |")
