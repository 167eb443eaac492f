"""The notebooks run as they stand, without a network, and what they give to other tools is what they show."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import fedprune_export as fx
from support.paths import ROOT

NOTEBOOKS = ROOT / "examples" / "notebooks"
MOST_LINES = 80
"""Lines of code of a notebook."""

pytestmark = [
    pytest.mark.soak,
    # What a library warns of within itself is its own business.
    pytest.mark.filterwarnings("ignore::Warning"),
]


def executed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Run a notebook in a kernel of its own; the outputs of its cells of code."""
    for variable in ("MPLBACKEND", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(variable, str(folder / variable))
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells)
    assert sum(bool(line.strip()) for cell in cells for line in cell.source.splitlines()) < MOST_LINES
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return [cell.outputs for cell in cells]


def text(outputs: list[Any], kind: str = "text/plain") -> str:
    """The value of a cell's last expression."""
    return next(str(output.data[kind]) for output in outputs if "data" in output and kind in output.data)


def rows(table: str) -> list[str]:
    """The first column of a table in Markdown."""
    return [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]


def test_every_notebook_is_run_here() -> None:
    assert sorted(path.name for path in NOTEBOOKS.iterdir()) == [
        "own_board.ipynb",
        "own_strategy.ipynb",
        "quickstart.ipynb",
    ]


@pytest.mark.torch
def test_from_a_module_to_a_tracked_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = executed("quickstart.ipynb", tmp_path, monkeypatch)

    assert "g0: 32 channels" in text(shown[1])
    assert "bundle: bundle (report.html says more)" in text(shown[2])
    rounds = ast.literal_eval(text(shown[3]))
    assert [row["round"] for row in rounds] == [1, 2, 3, 4, 5]
    assert rounds[-1]["accuracy"] > 0.8
    assert rows(text(shown[4])) == ["fedprune", "heterofl"]
    assert text(shown[5], "image/png")
    assert float(text(shown[6])) > 0.8
    saved = tmp_path / "digits-on-boards"
    assert fx.from_pretrained(saved).architecture.name == "digits"
    assert "| raspberry-pi-zero-2w | 3 |" in (saved / "README.md").read_text()
    assert in_tensorboard(tmp_path / "events") == in_mlflow(tmp_path / "mlflow.db")
    assert in_tensorboard(tmp_path / "events")["fedprune"] == [
        (row["round"], pytest.approx(row["accuracy"])) for row in rounds
    ]


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """The global model's accuracy per round of each run, as TensorBoard reads the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for place in folder.iterdir():
        events = EventAccumulator(str(place)).Reload()
        found[place.name.rpartition("-")[0]] = [(e.step, pytest.approx(e.value)) for e in events.Scalars("accuracy")]
    return found


def in_mlflow(store: Path) -> dict[str, list[tuple[int, Any]]]:
    """The same, as MLflow reads its store."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{store}")
    experiment = client.get_experiment_by_name("fedprune")
    assert experiment is not None
    return {
        run.info.run_name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "accuracy")]
        for run in client.search_runs([experiment.experiment_id])
    }


def test_a_strategy_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = executed("own_strategy.ipynb", tmp_path, monkeypatch)

    assert rows(text(shown[2])) == ["loudest", "heterofl"]


def test_a_board_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = executed("own_board.ipynb", tmp_path, monkeypatch)

    assert "link: 0.15 MB of 0.15 MB (99%)  <- binds" in text(shown[1])
    density = {name: value for name, (value, _) in ast.literal_eval(text(shown[2])).items()}
    assert density["box-001"] == density["box-003"] < density["pi5"] == 1.0
    assert "doctype html" in text(shown[3], "text/html")
