"""When each round ended, and how much work a side's processes had done by then."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Stamps:
    """Seconds since the epoch and CPU seconds of this process and all below it, one of each per round."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.cpu_s: list[float] = []

    def add(self) -> None:
        """A round has ended."""
        self.at.append(time.time())
        self.cpu_s.append(tree_cpu_s())

    def result(self) -> dict[str, list[float]]:
        return {"stamps": self.at, "cpu_s": self.cpu_s}


def tree_cpu_s() -> float:
    """User and system seconds of this process and its descendants, with those that have ended."""
    ticks, children = dict[int, int](), dict[int, list[int]]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name, which may hold blanks and brackets: proc(5) counts the state as field 3.
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        number = int(path.parent.name)
        ticks[number] = sum(map(int, fields[11:15]))
        children.setdefault(int(fields[1]), []).append(number)
    below = [os.getpid()]
    for number in below:
        below += children.get(number, [])
    return sum(ticks.get(number, 0) for number in below) / os.sysconf("SC_CLK_TCK")
