"""The script that a Jetson's owner runs, on a board of doubles: all of it but CUDA's share can pass here."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.core.errors import ExitCode
from fedprune.runtime.bundle import open_bundle
from fedprune.runtime.precision import lowered_weights, unpacked
from fedprune.runtime.precision_files import weights_file
from fedprune.runtime.tensorrt_config import EnginePlan
from support.fakes.engine_board import EngineBoard
from support.fakes.hidden_board import FEATURES, HIDDEN, hidden_weights
from support.paths import ROOT

pytestmark = pytest.mark.board

SCRIPT = ROOT / "examples" / "jetson_acceptance.py"


def run(bundle: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--bundle", str(bundle)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def promised() -> list[str]:
    """What docs/jetson.md says that it prints."""
    page = (ROOT / "docs" / "jetson.md").read_text()
    assert "**This has not run on a Jetson yet.**" in page
    return re.findall(r"^    ok    (.*)$", page, re.MULTILINE)


def test_it_prints_what_the_page_promises(board: EngineBoard, bundle: Path) -> None:
    done = run(bundle)
    lines = done.stdout.splitlines()
    wanted = promised()
    assert [line[6:].partition(":")[0] for line in lines[:-1]] == [w.partition(":")[0] for w in wanted], done.stderr
    for line, words in zip(lines, wanted, strict=False):
        name = words.partition(":")[0]
        if name == "training with CUDA":
            assert line.startswith("FAIL  training with CUDA: it ran on the CPU: onnxruntime")
            assert "no CUDA provider" in line
        elif name == "time-out":
            assert line.startswith("ok    time-out:")
        elif name not in ("board", "speed"):  # these name the board
            assert re.fullmatch("ok    " + re.escape(words).replace(r"\.\.\.", ".+"), line), line
    assert lines[-1] == "8 of 9 checks passed"
    assert done.returncode == 1


def test_an_engine_that_computes_something_else_is_no_success(board: EngineBoard, bundle: Path) -> None:
    board.set(wrong=True)
    lines = run(bundle).stdout.splitlines()
    assert any(line.startswith("FAIL  build: the engine contradicts onnxruntime") for line in lines)


def test_a_machine_without_tensorrt_is_one_line(board: EngineBoard, bundle: Path) -> None:
    (board.site / "tensorrt.py").unlink()
    done = run(bundle)
    assert done.returncode == ExitCode.ENGINE
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


def test_the_bundle_is_looked_at_before_the_machine(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == ExitCode.BUNDLE
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_engines_of_a_lowered_graph_get_its_weights(
    board: EngineBoard, bundle: Path, graphs: Path, tmp_path: Path, precision: str
) -> None:
    tensors = hidden_weights(HIDDEN // 2, seed=1)
    files = unpacked((graphs / f"hidden_half_{precision}.safetensors").read_bytes(), precision)
    files["inference.onnx"] = (graphs / "hidden_half.onnx").read_bytes()
    files["weights.safetensors"] = tensorfile.encode(tensors)
    lowered = tmp_path / "lowered"
    lowered.mkdir()
    for name, raw in files.items():
        (lowered / name).write_bytes(raw)
    x = np.random.default_rng(0).standard_normal((64, FEATURES)).astype(np.float32)
    (lowered / weights_file(precision)).write_bytes(lowered_weights(lowered, precision, tensors, x))
    plan = EnginePlan(graph=f"{precision}.onnx", precision="float16")
    known = replace(open_bundle(bundle), folder=lowered, engine=plan, precisions=(precision,))
    acceptance = runpy.run_path(str(SCRIPT))["Acceptance"](known, tmp_path)
    assert acceptance.build().startswith("build in ")
    assert acceptance.new_weights().startswith("refit in ")
    made = [(tmp_path / f"model-{seed}" / weights_file(precision)).read_bytes() for seed in (0, 1)]
    assert made[0] == (lowered / weights_file(precision)).read_bytes() != made[1]
