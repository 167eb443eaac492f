"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.board,
    pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"),
]

RESIDENT = """
import os, sys
from pathlib import Path
from fedprune_device.hardware.allocator import return_freed_blocks, trim_heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

tuned = sys.argv[1] == "True"
"""

LARGE = """
if tuned:
    return_freed_blocks()
bytearray(16 << 20)  # glibc's threshold rises to this size
before, pins, large = resident(), [], []
for _ in range(64):
    large.append(bytearray(1 << 20))
    pins.append(bytearray(100_000))  # between two large blocks
large.clear()
print(resident() - before - 100_000 * len(pins))
"""

SMALL = """
before = resident()
blocks = [bytearray(60_000) for _ in range(500)]
pin = bytearray(60_000)  # above them in the heap
blocks.clear()
if tuned:
    trim_heap()
print(resident() - before)
"""


@pytest.mark.parametrize("program", [LARGE, SMALL], ids=["large", "small"])
def test_freed_blocks_are_returned_although_others_lie_between(program: str) -> None:
    def left(tuned: bool) -> int:
        command = [sys.executable, "-c", RESIDENT + program, str(tuned)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert abs(left(True)) < 5e6
    assert left(False) > 20e6
