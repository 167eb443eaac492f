"""Opens blobs over HTTP as configured: this server's own web server, or the address of another one, for boards."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedprune.core.errors import IdentityError
from fedprune.security.tls import check_local_host
from fedprune.wire.urls import BlobUrl
from fedprune_server.config.network_settings import HTTPS, S3, WebSettings
from fedprune_server.enrollment.host_names import listener_names, own_addresses
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.transfer.s3_sync import BucketSync
from fedprune_server.transfer.s3_uploads import S3Uploads
from fedprune_server.transfer.served_job import ServedJob
from fedprune_server.transfer.upload_place import UploadPlace
from fedprune_server.transfer.web_uploads import HttpUploads

if TYPE_CHECKING:
    from fedprune_server.transfer.http_server import BlobServer

log = logging.getLogger("fedprune.server")


@dataclass(frozen=True)
class WebBlobs:
    """Blobs over HTTP: the address under which boards find blobs (None if they get them over MQTT only), this server's
    own web server, if it has one, and a function that makes the place to which a job's updates are uploaded. That is
    nowhere by default; the function raises `ConfigError` if the job has no such place."""

    url: str | None = None
    server: BlobServer | None = None
    uploads: Callable[[BucketSync], UploadPlace] = lambda sync: UploadPlace()

    def serve(self, jobs: Sequence[ServedJob]) -> None:
        """Begin to serve these jobs."""
        if self.server is not None:
            self.server.jobs = jobs


NO_BLOBS = WebBlobs()


@contextmanager
def web_blobs(
    config: WebSettings, identity: IdentityFolder | None, wake: Callable[[], None] = lambda: None
) -> Iterator[WebBlobs]:
    """Blobs over HTTP as configured, with a web server that runs until the end if one is configured.

    Without an identity it is for this machine alone. `wake` is called from another thread when the loop has an upload
    to collect.

    Raises:
        ConfigError: The web server's address can't be listened on, or is open to others without an identity.
        IdentityError: The identity's files can't be used.
        StorageError: The disk fails or is full.
    """
    uploads: Callable[[BucketSync], UploadPlace] = S3Uploads if config.uploads == S3 else NO_BLOBS.uploads
    listen_address = config.web_address
    if listen_address is None:
        yield WebBlobs(config.public_blob_url, None, uploads)
        return
    from fedprune_server.transfer.http_server import BlobServer  # uvicorn takes a moment to import

    host, port = listen_address
    context = None
    if identity is None:
        check_local_host(host, "server.serve_blobs")
    else:
        configured_hosts = () if config.public_blob_url is None else (BlobUrl.parse(config.public_blob_url).host,)
        context = _context_factory(
            identity, identity.listener_files("web", sorted({*listener_names(host), *configured_hosts}))
        )
        context()  # a damaged file ends the start, not the first board's connection
    with BlobServer(host, port, context) as server:
        url = config.public_blob_url or str(BlobUrl.parse(_own_url(host, server.port, tls=identity is not None)))
        log.info("blobs are given out on %s:%d, and boards are told that they are at %s", host, server.port, url)
        if config.uploads == HTTPS:
            log.info("boards upload updates there, too")

            def uploads(sync: BucketSync) -> UploadPlace:
                return HttpUploads(sync.local_store, url, wake)

        yield WebBlobs(url, server, uploads)
        log.info("the web server gave out %d bytes of blobs, and took in %d updates", server.sent, server.received)


def _context_factory(identity: IdentityFolder, files: tuple[Path, Path, Path]) -> Callable[[], ssl.SSLContext]:
    """A function that returns TLS for the next connection, with the list of revoked certificates as it is then. `files`
    are the paths of the certificate, its key and the authority."""
    certificate, key, authority = files
    cached: list[tuple[tuple[int, int], ssl.SSLContext]] = []

    def context() -> ssl.SSLContext:
        crl = identity.authority.crl_path
        try:
            file_stat = crl.stat()
            state = (file_stat.st_ino, file_stat.st_mtime_ns)
            if not cached or cached[0][0] != state:
                cached[:] = [(state, _server_context(certificate, key, authority, crl))]
        except OSError as error:
            raise IdentityError(f"can't use the certificate {certificate} ({error})") from error
        return cached[0][1]

    return context


def _server_context(certificate: Path, key: Path, authority: Path, crl: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # No resumption: a resumed session shows no certificate, so that a revocation in between would go unnoticed.
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(cafile=str(authority))
    context.load_verify_locations(cafile=str(crl))
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_CRL_CHECK_LEAF
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _own_url(host: str, port: int, *, tls: bool) -> str:
    """The address at which boards reach a port of this machine, as far as it can tell."""
    if host in ("0.0.0.0", "::"):  # noqa: S104  # nosec B104  # compared with, not listened on
        name = socket.gethostname()
        addresses = sorted(a for a in own_addresses(name) if not a.startswith("127."))
        host = addresses[0] if addresses else name.lower()
    url_host = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{url_host}:{port}"
