"""Waiting for what another thread or process does: one way to wait, and one limit."""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

# Only a test that fails waits as long. It is far more than anything takes, so that a machine with ten times as much to
# do as it has cores for makes a test slow, not red; and less than a test's own limit in pyproject.toml.
PATIENCE_S = 240.0

PAUSE_S = 0.01


def until(condition: Callable[[], T], what: str = "it", explain: Callable[[], str] | None = None) -> T:
    """Ask for a condition until it is true, and return its answer.

    Raises `AssertionError` with `what` and what `explain` returns, such as a process's log, when patience ends.
    """
    for _ in attempts(what, explain):
        if answer := condition():
            return answer
    raise AssertionError  # `attempts` has raised its own


def attempts(what: str = "it", explain: Callable[[], str] | None = None, pause_s: float = PAUSE_S) -> Iterator[None]:
    """Turns of a loop that is left once something has happened; raises `AssertionError` when patience ends."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        yield
        time.sleep(pause_s)
    raise AssertionError(f"{what} did not happen within {PATIENCE_S:.0f} s. {explain() if explain else ''}")
