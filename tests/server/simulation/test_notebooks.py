"""The notebooks run as they stand, without a network."""

import ast
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import fedprune_export as fx
from support.paths import ROOT

NOTEBOOKS = ROOT / "examples" / "notebooks"

pytestmark = [
    pytest.mark.soak,
    # What a library warns of within itself is its own business.
    pytest.mark.filterwarnings("ignore::Warning"),
]


def run_notebook(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Run a notebook in a kernel of its own; the outputs of its cells of code."""
    for variable in ("MPLBACKEND", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(variable, str(folder / variable))
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells)
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return [cell.outputs for cell in cells]


def text(outputs: list[Any], kind: str = "text/plain") -> str:
    """The value of a cell's last expression."""
    return next(str(output.data[kind]) for output in outputs if "data" in output and kind in output.data)


@pytest.mark.torch
def test_from_a_module_to_a_tracked_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = run_notebook("quickstart.ipynb", tmp_path, monkeypatch)

    rounds = ast.literal_eval(text(outputs[3]))
    assert [row["round"] for row in rounds] == [1, 2, 3, 4, 5]
    assert rounds[-1]["accuracy"] > 0.8
    assert text(outputs[5], "image/png")
    assert float(text(outputs[6])) > 0.8
    assert fx.from_pretrained(tmp_path / "digits-on-boards").architecture.name == "digits"


def test_a_strategy_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "| loudest |" in text(run_notebook("own_strategy.ipynb", tmp_path, monkeypatch)[2])


def test_a_board_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = run_notebook("own_board.ipynb", tmp_path, monkeypatch)

    density = {name: value for name, (value, _) in ast.literal_eval(text(outputs[2])).items()}
    assert density["box-001"] == density["box-003"] < density["pi5"] == 1.0
