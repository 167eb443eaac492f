"""The benchmark of a GPU, where there is none: a machine that is lent for minutes must not find its faults."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from support.paths import ROOT

pytestmark = [pytest.mark.system, pytest.mark.torch]

COMMAND = [sys.executable, "-m", "benchmarks.gpu"]


def test_a_dry_run_goes_through_all_of_it() -> None:
    done = subprocess.run([*COMMAND, "--dry"], capture_output=True, text=True, check=True, timeout=300, cwd=ROOT)
    row = json.loads(done.stdout)
    assert set(row["ms"]) == {"ours", "torch"}
    assert row["away"]["ours"] < 1e-4
    assert set(row) >= {"placement", "prediction"}


def test_a_machine_without_a_gpu_is_told_what_it_lacks() -> None:
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: this machine lacks")
