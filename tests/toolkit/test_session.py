"""Sessions of onnxruntime: what comes in, what goes out, and what must not leave the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedprune.errors import ModelError
from fedprune.session import Session

pytestmark = pytest.mark.board

GRAPH = next((Path(__file__).resolve().parents[2] / "device_runtime" / "fedprune_device" / "assets").glob("*.onnx"))


def test_a_graph_says_its_inputs_and_outputs() -> None:
    session = Session(GRAPH)

    assert "x" in session.inputs
    assert session.outputs


def test_a_file_that_is_no_graph_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"nothing of the kind")

    with pytest.raises(ModelError, match=r"bad\.onnx"):
        Session(path)


def test_feeds_that_do_not_fit_are_one_clear_error() -> None:
    with pytest.raises(ModelError, match="couldn't run"):
        Session(GRAPH).run({"x": np.zeros(3, np.float32)})


def test_onnxruntime_leaves_no_trace_of_telemetry(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from fedprune.session import Session; Session(Path({str(GRAPH)!r}))"
    kept = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    subprocess.run([sys.executable, "-c", code], env={**kept, "HOME": str(tmp_path)}, check=True)

    assert list(tmp_path.rglob("*")) == []
