"""The setting `workers_url`: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import re

from fedprune.core.errors import ConfigError

# The default needs no cluster: workers are processes of this machine.
PROCESSES = "processes"

_AUTO, _CLIENT, _NODE = "ray:auto", "ray://", "ray:"
_HOST_AND_PORT = re.compile(r"[A-Za-z0-9._\-]{1,253}:[0-9]{1,5}|\[[0-9A-Fa-f:.]{2,45}\]:[0-9]{1,5}")


def check_cluster_url(url: str) -> str:
    """Check the setting `workers_url`, and return it. Raises `ConfigError` if it has another form."""
    place = url.removeprefix(_CLIENT) if url.startswith(_CLIENT) else url.removeprefix(_NODE)
    if url not in (PROCESSES, _AUTO) and not (url.startswith(_NODE) and _HOST_AND_PORT.fullmatch(place)):
        raise ConfigError(
            ("server", "workers_url"),
            expected=f"{PROCESSES!r}, ray:auto, ray:HOST:PORT or ray://HOST:PORT",
            got=repr(url),
        )
    return url


def ray_address(url: str) -> str:
    """The address in Ray's form."""
    return url if url.startswith(_CLIENT) else url.removeprefix(_NODE)


def needs_ray_client(url: str) -> bool:
    """Whether the cluster is reached from outside, through a Ray client server."""
    return url.startswith(_CLIENT)


def ray_endpoint(url: str) -> tuple[str, int] | None:
    """Host and port; None where Ray finds them itself."""
    if url in (PROCESSES, _AUTO):
        return None
    # rpartition, since the address of an IPv6 host has colons of its own.
    host, _, port = ray_address(url).removeprefix(_CLIENT).rpartition(":")
    return host.strip("[]"), int(port)
