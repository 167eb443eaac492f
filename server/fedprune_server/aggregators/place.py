"""A server's place in the tier, as configured: the parent above it, and the aggregators below."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.core.disk import storage_errors
from fedprune.core.errors import ConfigError, StorageError
from fedprune.jobs.job import Job
from fedprune.security.tls import insecure_allowed
from fedprune_server.aggregators.connections import RegionConnections
from fedprune_server.aggregators.parent import Members, ParentLink, Register
from fedprune_server.config.server_config import ServerConfig, is_loopback
from fedprune_server.enrollment.host_names import ANY, names_of
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.storage.s3.bucket import FOLDER as BLOBS_FOLDER
from fedprune_server.storage.state_folder import FOLDER
from fedprune_server.storage.storage import Storage
from fedprune_server.transfer.http import contexts

log = logging.getLogger("fedprune.server")

LANDING = "tier"
"""Folder of the state folder in which blobs of other servers of the tier arrive."""


@contextmanager
def parent_of(config: ServerConfig, identity: IdentityFolder | None) -> Iterator[ParentLink]:
    """The connection to the configured parent, once its jobs are known.

    Raises:
        ConfigError: The parent refuses this aggregator, is this server itself, or would be reached without TLS.
        BrokerError: No parent answers.
        IdentityError: The parent's certificate is of another authority, or doesn't name its host.
        StorageError: The disk fails or is full.
    """
    if _is_own(config):
        raise ConfigError(
            "server: parent", expected="another server", got=f"{config.parent}, where this server's aggregators connect"
        )
    if identity is None:
        insecure_allowed(_parents_host(config), "server: parent")
    elif config.parent.startswith("ws://"):
        raise ConfigError("server: parent", expected="wss://host:port, for a fleet with an identity", got=config.parent)
    context = None if identity is None else identity.context
    with ParentLink(config.parent, config.region, context, _landing(config)) as link:
        link.start()
        yield link


def configurations(config: ServerConfig, parent: ParentLink) -> list[ServerConfig]:
    """An aggregator's configuration of each job of its parent, whose models are fetched. Raises `StorageError` if a
    model can't be had, and `ConfigError` if a job is of another version."""
    landing, found = _landing(config), []
    known = Storage.settings_in(config.state, config.database)
    own = None if known is None else str(known["job"]["name"])
    for i, (name, about) in enumerate(parent.jobs.items()):
        folder = landing.root / "models" / _plain(name)
        path = folder / f"{_plain(about['name'])}.onnx"
        with storage_errors(f"can't use {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            there = path.exists() and tensorfile.digest(path.read_bytes()) == about["model"]
        if not there:
            data = parent.fetch(name, str(about["model"]))
            if data is None:
                raise StorageError(f"the parent has no model of its job {name}", hint="See its log.")
            landing.write_file(path, data)
        changes: dict[str, Any] = {"job": Job.from_dict(about["job"]), "model": str(path)}
        if name != own and (i or own is not None):
            blobs = config.blobs if config.blobs == BLOBS_FOLDER else f"{config.blobs}/{name}"
            changes |= {"state": config.state / FOLDER / name, "blobs": blobs}
        if "state" in changes and config.database is not None:
            raise ConfigError(
                "server: database", expected="none, at an aggregator of several jobs", got=f"{len(parent.jobs)} jobs",
                hint="A database has one job: leave it out, or run an aggregator for each job's server.",
            )  # fmt: skip
        found.append(replace(config, **changes))
    return found


def description(job: Job, model: str, name: str) -> dict[str, Any]:
    """A job in the message to aggregators: its settings, its model's digest and name."""
    return {"job": job.to_dict(), "model": model, "name": name}


@contextmanager
def regions_of(config: ServerConfig, identity: IdentityFolder | None) -> Iterator[RegionConnections | None]:
    """The connections of aggregators, as configured; None without. Raises `ConfigError` if the address can't be
    listened on or is open to others without an identity, and `IdentityError` if the identity's files can't be used."""
    place = config.aggregators_place
    if place is None:
        yield None
        return
    host, port = place
    context, names = None, [host]
    if identity is None:
        insecure_allowed(host, "server: aggregators")
    else:
        names = names_of(host)
        context = contexts(identity, identity.tier(names))
        context()  # so that an error shows at the start, not when an aggregator connects
    with RegionConnections(host, port, context, _landing(config), config.aggregator_patience_s) as regions:
        log.info("aggregators connect to port %d of one of: %s", regions.port, ", ".join(names))
        yield regions


def admit(identity: IdentityFolder | None, members: Members) -> None:
    """Store the members that the parent has sent. Raises `StorageError` if the database fails."""
    if identity is not None:
        identity.store.mirror(members.added, members.removed, whole=members.whole, now=identity.authority.now())


def adopt(identity: IdentityFolder | None, register: Register) -> None:
    """Store the certificates that the parent has issued and revoked. Raises `StorageError` if the disk fails."""
    if identity is not None:
        identity.authority.adopt(list(register.lines))


def models(jobs: Mapping[str, tuple[Job, str, bytes]], config: ServerConfig) -> dict[str, dict[str, Any]]:
    """Jobs in the message to aggregators, by name. Their models are stored where aggregators fetch them."""
    landing = _landing(config)
    return {n: description(job, landing.put(raw).sha256, name) for n, (job, name, raw) in jobs.items()}


def _parents_host(config: ServerConfig) -> str:
    return config.parent.partition("://")[2].rpartition(":")[0].strip("[]")


def _is_own(config: ServerConfig) -> bool:
    """Whether the parent's address is the one where this server's own aggregators connect."""
    place, parent = config.aggregators_place, _parents_host(config)
    if place is None or place[1] != int(config.parent.rpartition(":")[2]):
        return False
    host = place[0]
    if is_loopback(parent):
        return host in ANY or is_loopback(host)
    return parent in (names_of(host) if host in ANY else [host])


def _landing(config: ServerConfig) -> BlobStore:
    return BlobStore(config.state / LANDING)


def _plain(name: object) -> str:
    """A model's name as a file's name. Raises `ConfigError` if it can't be one."""
    text = str(name)
    if not text or Path(text).name != text or text.startswith("."):
        raise ConfigError("name of the parent's model", expected="a plain name", got=text[:80])
    return text
