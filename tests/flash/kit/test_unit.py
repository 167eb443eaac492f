"""Units that systemd accepts, and a sandbox that onnxruntime and training really run in."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedprune.core.errors import ConfigError
from fedprune_flash.kit.unit import unit_text

pytestmark = pytest.mark.board

ANALYZE = shutil.which("systemd-analyze")
analyzed = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")


def analyze(*arguments: str) -> str:
    done = subprocess.run([str(ANALYZE), *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@analyzed
@pytest.mark.parametrize("jetson", [False, True])
def test_systemd_knows_every_word_of_a_unit(tmp_path: Path, jetson: bool) -> None:
    unit = tmp_path / "fedprune.service"
    unit.write_text(unit_text(["run", "--data", "/srv/my samples%$.npz"], jetson=jetson, condition="/srv/samples.npz"))
    warnings = [line for line in analyze("verify", "--man=no", str(unit)).splitlines() if "fedprune.service" in line]
    assert [line for line in warnings if "is not executable" not in line] == []


@analyzed
@pytest.mark.parametrize(("jetson", "limit"), [(False, 2.0), (True, 4.0)])
def test_the_exposure_that_systemd_sees_is_low(tmp_path: Path, jetson: bool, limit: float) -> None:
    unit = tmp_path / "fedprune.service"
    unit.write_text(unit_text(jetson=jetson))
    exposure = re.search(
        r"exposure level for fedprune\.service: ([0-9.]+)", analyze("security", "--offline=yes", str(unit))
    )
    assert float(exposure[1]) <= limit


def test_what_would_break_out_of_its_line_is_refused() -> None:
    with pytest.raises(ConfigError):
        unit_text(["run\nUser=root"])
    for path in ("samples.npz", "/opt/../etc", "/srv/a\nUser=root"):
        with pytest.raises(ConfigError):
            unit_text(condition=path)


def test_onnxruntime_computes_and_trains_where_memory_is_never_writable_and_executable() -> None:
    """What MemoryDenyWriteExecute does, by the kernel's own switch (PR_SET_MDWE, since Linux 6.3)."""
    code = """
import ctypes, mmap, sys
if ctypes.CDLL(None, use_errno=True).prctl(65, 1, 0, 0, 0):
    sys.exit(77)
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    sys.exit("memory may still be both")
except PermissionError:
    pass
import numpy as np
from pathlib import Path
from fedprune_device.hardware.probe import _measure_rates
from fedprune_device.hardware.runtime_process import _check_model
_check_model(None)
train, infer, *_ = _measure_rates(2, 0.1, cuda=False)
assert train > 0 and infer > 0
import paho.mqtt.client, cryptography.hazmat.primitives.asymmetric.ed25519 as ed
ed.Ed25519PrivateKey.generate().sign(b"x")
print("computed")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("this kernel has no PR_SET_MDWE")
    assert done.stdout.strip() == "computed", done.stderr
