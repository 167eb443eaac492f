"""Freed memory goes back to the system, and threads share it."""

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
    def remaining_bytes(tuned: bool) -> int:
        command = [sys.executable, "-c", RESIDENT + program, str(tuned)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert abs(remaining_bytes(True)) < 5e6
    assert remaining_bytes(False) > 20e6


HEAPS = """
import ctypes, sys, threading
from fedprune_device.hardware.allocator import share_heaps

if sys.argv[1] == "True":
    share_heaps()
together = threading.Barrier(6)

def work():
    together.wait()
    block = bytearray(2000)
    together.wait()

threads = [threading.Thread(target=work) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


def test_threads_share_two_heaps() -> None:
    def heaps(shared: bool) -> int:
        command = [sys.executable, "-c", HEAPS, str(shared)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.count("<heap nr=")

    assert heaps(True) <= 2
    assert heaps(False) > 2
