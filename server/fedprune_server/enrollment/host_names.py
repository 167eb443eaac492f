"""Names and addresses by which other machines reach this one."""

from __future__ import annotations

import socket
from contextlib import suppress

# Hosts by which a listener listens on all addresses of this machine.
_ALL_ADDRESSES = ("0.0.0.0", "::", "")  # noqa: S104  # nosec B104  # compared with, not listened on


def listener_names(host: str) -> list[str]:
    """Names for a listener's certificate: its host, or all names of this machine if it listens on all addresses."""
    names = {"127.0.0.1", "localhost"}
    if host in _ALL_ADDRESSES:
        name = socket.gethostname()
        # Boards in a network without DNS find the machine by mDNS, as NAME.local.
        names |= {name, f"{name.partition('.')[0]}.local", *own_addresses(name)}
    else:
        names.add(host)
    return sorted(n for n in names if n)


def own_addresses(name: str) -> set[str]:
    """Addresses of this machine, from its name and from its route to other networks."""
    addresses = set()
    with suppress(OSError):
        addresses |= set(socket.gethostbyname_ex(name)[2])
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # A datagram socket's `connect` sends nothing; it makes the kernel choose the address towards other networks.
        probe.connect(("192.0.2.1", 9))
        addresses.add(probe.getsockname()[0])
    return addresses
