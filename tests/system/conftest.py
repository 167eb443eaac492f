import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT
from support.processes.real_site import write_material


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier, and samples of two boards."""
    return write_material(tmp_path_factory.mktemp("material"), {"north": 200, "south": 200})


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("fedprune-*.whl"))
