"""Messages to systemd: the service is ready, alive, or busy with something (sd_notify(3)).

The launcher includes this module, so it imports only the standard library.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

_SOCKET_VARIABLE, _WATCHDOG_VARIABLE = "NOTIFY_SOCKET", "WATCHDOG_USEC"

READY, WATCHDOG, STOPPING = "READY=1", "WATCHDOG=1", "STOPPING=1"

START_TIMEOUT_S = 900  # how long a start may take without a message: the unit's TimeoutStartSec

_EXTEND_INTERVAL_S = 60.0  # between two extensions of a start, each of which lasts START_TIMEOUT_S


def notify(text: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Send assignments such as `READY`, one per line, to the service manager; False if none listens."""
    address = environment.get(_SOCKET_VARIABLE, "")
    if address[:1] not in ("/", "@"):  # vsock addresses are for virtual machines
        return False
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        out.setblocking(False)  # a full queue of the manager must not block a board
        out.sendto(text.encode(), "\0" + address[1:] if address[0] == "@" else address)
        return True
    return False


def status_line(text: str) -> str:
    """An assignment whose text `systemctl status` shows."""
    return "STATUS=" + " ".join(text.split())


@contextmanager
def extend_start(
    description: str, tell: Callable[[str], object] = notify, interval_s: float = _EXTEND_INTERVAL_S
) -> Iterator[None]:
    """Keep systemd from ending a start that waits for a network or an approval, while the body runs.

    The manager isn't told that the service is ready, because its watchdog would begin to count. After the body the
    start has nearly `START_TIMEOUT_S` seconds again.
    """
    text = f"{status_line(description)}\nEXTEND_TIMEOUT_USEC={int(START_TIMEOUT_S * 1e6)}"
    with repeat_call(lambda: tell(text), interval_s, "fedprune-starting"):
        yield


@contextmanager
def repeat_call(call: Callable[[], object], interval_s: float, name: str) -> Iterator[None]:
    """Call a function at once and every `interval_s` seconds, in a thread of this name, while the body runs."""
    ended = threading.Event()

    def run() -> None:
        while True:
            call()
            if ended.wait(interval_s):
                return

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def watchdog_seconds(environment: Mapping[str, str] = os.environ) -> float | None:
    """Within how many seconds the manager expects `WATCHDOG`; None if it has no watchdog.

    WATCHDOG_PID is ignored, because the launcher's child feeds the watchdog of the whole service.
    """
    microseconds = environment.get(_WATCHDOG_VARIABLE, "")
    return int(microseconds) / 1e6 if microseconds.isdigit() and int(microseconds) > 0 else None
