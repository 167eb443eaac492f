"""`fedprune.flower` against the real Flower: every case of `flower_adapter.py`, which runs in Flower's own environment.

torch, onnx and onnxruntime are this environment's, behind all that Flower brings itself.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON = Path(os.environ.get("FEDPRUNE_FLOWER", ROOT / "build/flower/bin/python"))

CASES = re.findall(r"^def (case_\w+)", (HERE / "flower_adapter.py").read_text(), re.MULTILINE)

WINGS = ("toolkit", "export", "device_runtime", "server", "examples/flower", "tests/peers")

START = "import sys; sys.path.append(sys.argv[1]); import flower_adapter; flower_adapter.main(sys.argv[2])"


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of every case."""
    if not PYTHON.exists():
        pytest.skip(f"Flower is not installed: no {PYTHON} (`make build/flower/installed`)")
    version = subprocess.run(
        [PYTHON, "-c", "import sys; print(sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    if version.stdout.strip() != str(sys.version_info[:2]):
        pytest.skip(f"Flower's Python is {version.stdout.strip()}, which can't load this one's packages")
    out = tmp_path_factory.mktemp("flower") / "out.json"
    paths = os.pathsep.join(str(ROOT / w) for w in WINGS)
    env = {**os.environ, "PYTHONPATH": paths, "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [PYTHON, "-c", START, sysconfig.get_path("purelib"), out], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_all_cases_ran(cases: dict[str, Any]) -> None:
    assert list(cases) == CASES


@pytest.mark.parametrize("case", CASES, ids=[c.removeprefix("case_") for c in CASES])
def test_flower(cases: dict[str, Any], case: str) -> None:
    assert cases[case]["ok"], cases[case]["error"]
