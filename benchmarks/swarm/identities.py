"""Identities of a signed swarm: the server has a site's, as `fedprune-server init` makes it, and every device a key.

A device's key is made of the seed and its name, so that the processes of a swarm need no files of each other. What a
real board keeps on its disk, epochs and its server's key, is kept in memory; all else is a board's own `SignedChannel`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedprune.security.device_identity import DeviceIdentity
from fedprune.security.epoch_file import EpochFile
from fedprune.security.keys import SigningKey, VerifyingKey
from fedprune_device.network.membership import SignedChannel
from fedprune_server.enrollment.pki import IdentityFolder

_BLOCK_LENGTH = 256
"""Epochs that are skipped after a hello to one device, as many as `EpochFile` reserves at a time."""


class _Epochs(EpochFile):
    """A device's epochs without a file."""

    def __init__(self) -> None:
        self._last = time.time_ns() // 1_000_000

    def next(self) -> int:
        self._last += 1
        return self._last

    def skip_block(self) -> None:
        self._last += _BLOCK_LENGTH


def make_site(state: Path, site: str, devices: Iterable[str], seed: int, database: str | None) -> str:
    """Make a server's identity in the folder `state`, with certificates for its broker, and members of all devices,
    with keys of the seed, in PostgreSQL if there is a `database`. Returns the server's verifying key, as hex."""
    with IdentityFolder.make(state, site, database=database) as identity:
        identity.listener_files("broker", ["127.0.0.1"])
        for device in devices:
            identity.store.approve(device, _signing_key(seed, device).verifying_key.hex, identity.authority.now())
        return identity.key.verifying_key.hex


def signed_channel(site: str, device: str, seed: int, server_key: str) -> SignedChannel:
    """The channel by which a device signs its messages and verifies its server's."""
    identity = SimpleNamespace(
        site=site,
        device=device,
        key=_signing_key(seed, device),
        epochs=_Epochs(),
        server=VerifyingKey.from_hex(server_key),
        server_epochs=dict,
        store_server_epoch=lambda stream, epoch: None,
        trusted_time=SimpleNamespace(note_time=lambda seconds: None),
    )
    return SignedChannel(cast(DeviceIdentity, identity))


def _signing_key(seed: int, device: str) -> SigningKey:
    secret = hashlib.sha256(f"swarm {seed} {device}".encode()).digest()
    return SigningKey(Ed25519PrivateKey.from_private_bytes(secret))
