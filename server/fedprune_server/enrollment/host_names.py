"""Names and addresses by which other machines reach this one."""

from __future__ import annotations

import socket
from contextlib import suppress

# Hosts of a listener at all addresses of this machine.
_ANY = ("0.0.0.0", "::", "")  # noqa: S104  # nosec B104  # compared with, not listened on


def names_of(host: str) -> list[str]:
    """Host names for a listener's certificate: its address, or all names of this machine if it listens on any."""
    names = {"127.0.0.1", "localhost"}
    if host in _ANY:
        name = socket.gethostname()
        names |= {name, f"{name.partition('.')[0]}.local", *addresses_of(name)}
    else:
        names.add(host)
    return sorted(n for n in names if n)


def addresses_of(name: str) -> set[str]:
    """Addresses of this machine, from its name and from its route to other networks."""
    addresses = set()
    with suppress(OSError):
        addresses |= set(socket.gethostbyname_ex(name)[2])
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it chooses the address towards other networks
        addresses.add(probe.getsockname()[0])
    return addresses
