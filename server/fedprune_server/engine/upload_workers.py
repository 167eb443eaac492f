"""Receivers as a configuration wants them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import ConfigError
from fedprune.security.tls import SYSTEM
from fedprune_server.config.config import ServerConfig
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.messaging.connection import Connection
from fedprune_server.transfer.upload_workers.messages import Begin
from fedprune_server.transfer.upload_workers.receivers import Receivers


def alone_receives(config: ServerConfig) -> None:
    """Make sure that the server takes in updates by itself, as one of several jobs does.

    Raises:
        ConfigError: It has receivers.
    """
    if config.receivers:
        raise ConfigError(
            "server: receivers", expected="0 where a server has several jobs", got=config.receivers,
            hint="Leave out --job and [[jobs]], or --receivers.",
        )  # fmt: skip


@contextmanager
def receiving(
    config: ServerConfig, reached: Connection, identity: IdentityFolder | None, store: BlobStore
) -> Iterator[Receivers | None]:
    """The receivers of a server, which end with the context; None where it has none.

    Args:
        config: The configuration.
        reached: The server's connection, not up yet.
        identity: The server's identity, or None.
        store: Where updates end up.
    """
    if not config.receivers:
        yield None
        return

    def begin(tag: str) -> Begin:
        files = (None, None, None) if identity is None else identity.client(config.ca)
        authority, certificate, key = (
            None if path is None else str(path if path == SYSTEM else path.absolute()) for path in files
        )
        floor = 0 if identity is None else identity.authority.now()
        return Begin(
            reached.url, reached.site, tag, str(store.root.absolute()), config.pulls, config.max_packet,
            authority, certificate, key, floor, os.getpid(),
        )  # fmt: skip

    with Receivers(
        store, begin, config.receivers, reached.link.wake, time.monotonic, config.pulls, config.max_packet
    ) as receivers:
        yield receivers
