"""What a service tells systemd: that it is ready, that it is alive, what it does (sd_notify(3)).

The launcher is made of this module, so that it imports the standard library only.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress

_SOCKET, _WATCHDOG = "NOTIFY_SOCKET", "WATCHDOG_USEC"

READY, WATCHDOG, STOPPING = "READY=1", "WATCHDOG=1", "STOPPING=1"


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


def watchdog_seconds(environment: Mapping[str, str] = os.environ) -> float | None:
    """Within which time the manager expects `WATCHDOG`; None if it doesn't watch.

    Its process number is not looked at: the launcher's child feeds the watchdog of the whole service.
    """
    microseconds = environment.get(_WATCHDOG, "")
    return int(microseconds) / 1e6 if microseconds.isdigit() and int(microseconds) > 0 else None
