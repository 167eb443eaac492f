from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.board

PEAKS = """
import numpy as np
from fedprune_device.hardware.readings import own_memory, peak_memory, restart_peak
from fedprune_device.hardware.probe import process_memory
large = np.ones(50_000_000, np.uint8)
held = own_memory()
del large
first = peak_memory()
restart_peak()
second = peak_memory()
np.ones(20_000_000, np.uint8)
print(held, first - second, peak_memory() - second, process_memory(), process_memory())
"""


def test_a_peak_can_begin_again_and_a_process_knows_what_it_takes() -> None:
    run = subprocess.run([sys.executable, "-c", PEAKS], check=True, capture_output=True, text=True)
    held, fell, rose, first, again = map(float, run.stdout.split())
    assert held > 50e6
    assert fell > 45e6
    assert 15e6 < rose < 30e6
    assert 30e6 < first < 200e6
    assert abs(again - first) < 5e6
