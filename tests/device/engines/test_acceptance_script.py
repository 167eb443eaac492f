"""The script that a Jetson's owner runs, on a board of doubles: all of it but CUDA's share can pass here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.fakes.engine_board import EngineBoard
from support.paths import ROOT

pytestmark = pytest.mark.board


def run(bundle: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "jetson_acceptance.py"), "--bundle", str(bundle)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_prints_what_the_page_promises(board: EngineBoard, bundle: Path) -> None:
    done = run(bundle)
    lines = done.stdout.splitlines()
    page = (ROOT / "docs" / "jetson.md").read_text()
    assert "**This has not run on a Jetson yet.**" in page
    promises = re.findall(r"^    ok    (.*)$", page, re.MULTILINE)
    assert [line[6:].partition(":")[0] for line in lines[:-1]] == [w.partition(":")[0] for w in promises], done.stderr
    for line, words in zip(lines, promises, strict=False):
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
