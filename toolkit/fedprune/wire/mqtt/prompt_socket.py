"""A socket on which little waits: small packets aren't gathered, and messages can pass what isn't sent."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any

_KERNEL_BYTES = 128 * 1024
"""Bytes that wait in the kernel to be sent; by default it takes several MiB."""


def prompt(sock: Any) -> None:
    """Send at once, and let little wait in the kernel, where nothing can pass it."""
    for option, value in (("TCP_NODELAY", 1), ("TCP_NOTSENT_LOWAT", _KERNEL_BYTES)):
        with suppress(OSError, AttributeError):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def acknowledge(sock: Any) -> None:
    """Let Linux acknowledge at once what comes next: a broker that gathers small packets (Nagle) waits for that."""
    with suppress(OSError, AttributeError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
