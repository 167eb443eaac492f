"""What a service tells systemd: that it is ready, that it is alive, what it does (sd_notify(3)).

The launcher is made of this module, so that it imports the standard library only.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

_SOCKET, _WATCHDOG = "NOTIFY_SOCKET", "WATCHDOG_USEC"

READY, WATCHDOG, STOPPING = "READY=1", "WATCHDOG=1", "STOPPING=1"

START_S = 900
"""How long a start may take in which nothing is said: the unit's TimeoutStartSec."""

_AGAIN_S = 60.0


def notify(text: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Send a datagram to the service manager.

    Args:
        text: Assignments such as `READY`, one per line.
        environment: Where the manager says that it listens.

    Returns:
        Whether it was sent; False where nobody listens.
    """
    address = environment.get(_SOCKET, "")
    if address[:1] not in ("/", "@"):  # vsock addresses are for virtual machines
        return False
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        out.setblocking(False)  # a full queue of the manager must not stop a board
        out.sendto(text.encode(), "\0" + address[1:] if address[0] == "@" else address)
        return True
    return False


def status(text: str) -> str:
    """An assignment that shows a text in `systemctl status`."""
    return "STATUS=" + " ".join(text.split())


def more_time(seconds: float) -> str:
    """An assignment that lets a start take so many seconds from now on."""
    return f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}"


@contextmanager
def starting(what: str, tell: Callable[[str], object] = notify, again: float = _AGAIN_S) -> Iterator[None]:
    """While the body runs, the start goes on for as long as it takes; afterwards it has nearly `START_S` seconds again.

    The manager would end a start that waits for a network, or for somebody's approval, and begin it anew. It is not
    told that the service is ready: then its watchdog would begin to count.

    Args:
        what: What the start waits for.
        tell: Tells the service manager.
        again: Seconds between two messages.
    """
    with repeating(lambda: tell(f"{status(what)}\n{more_time(START_S)}"), again, "fedprune-starting"):
        yield


@contextmanager
def repeating(say: Callable[[], object], again: float, name: str) -> Iterator[None]:
    """While the body runs, something is said at once and every so often, by a thread of its own.

    Args:
        say: Says it.
        again: Seconds between two times.
        name: The thread's.
    """
    over = threading.Event()

    def run() -> None:
        while True:
            say()
            if over.wait(again):
                return

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def watchdog_seconds(environment: Mapping[str, str] = os.environ) -> float | None:
    """Within which time the manager expects `WATCHDOG`; None if it doesn't watch.

    Its process number is not looked at: the launcher's child feeds the watchdog of the whole service.
    """
    microseconds = environment.get(_WATCHDOG, "")
    return int(microseconds) / 1e6 if microseconds.isdigit() and int(microseconds) > 0 else None
