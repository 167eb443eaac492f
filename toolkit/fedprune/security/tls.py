"""TLS connections of devices and server to a broker: one authority, host names checked, the clock ignored.

OpenSSL compares certificates with the machine's clock, and a board whose clock says 1970 or 2090 would be locked out.
Its own check of times is therefore switched off (X509_V_FLAG_NO_CHECK_TIME) and replaced: right after the handshake,
before a byte of MQTT is sent, the broker's certificate must not have ended by the *time floor*
(`fedprune.security.trusted_time`). Everything else stays: the chain, the purpose (serverAuth), the host name.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

from cryptography import x509

from fedprune.core.errors import ConfigError, IdentityError
from fedprune.security.certificates import seconds_of

NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME (x509_vfy.h), since 1.1.0; Python has no name for it."""


class PinnedContext(ssl.SSLContext):
    """A client's context that trusts one authority. Made by `pinned_context`."""

    floor: Callable[[], int]


class _CheckedSocket(ssl.SSLSocket):
    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        context = self.context
        if isinstance(context, PinnedContext):
            try:
                check_peer(self.getpeercert(binary_form=True), context.floor())
            except ssl.SSLCertVerificationError:
                self.close()  # the caller wouldn't, and nothing must be sent
                raise


SYSTEM = Path("system")
"""Instead of an authority: all that the system trusts, for hosted brokers."""


def pinned_context(
    authority: Path, certificate: Path | None, key: Path | None, floor: Callable[[], int]
) -> PinnedContext:
    """A client's context for its fleet's broker (`paho.mqtt.client.Client.tls_set_context`).

    Args:
        authority: The certificate of the only trusted authority; `SYSTEM` for the system's authorities.
        certificate: The client's certificate; None to join without one.
        floor: Returns the time floor in seconds since 1970.

    Raises:
        IdentityError: A file is missing or damaged, or key and certificate don't belong together.
    """
    context = PinnedContext(ssl.PROTOCOL_TLS_CLIENT)  # which checks certificate and host name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VERIFY_X509_STRICT | NO_CHECK_TIME
    context.sslsocket_class = _CheckedSocket
    context.floor = floor
    try:
        if authority == SYSTEM:
            context.load_default_certs()
        else:
            context.load_verify_locations(cafile=str(authority))
    except OSError as error:
        raise IdentityError(f"can't use the authority's certificate {authority} ({error})") from error
    if certificate is not None:
        try:
            context.load_cert_chain(str(certificate), str(key) if key is not None else None)
        except OSError as error:
            raise IdentityError(f"can't use the certificate {certificate} with the key {key} ({error})") from error
    return context


def unpinned_context() -> ssl.SSLContext:
    """A context without authentication, for a board that joins with a claim alone.

    Only for joining: a request holds no secret, and its answer is authenticated by the claim. The peer must get no user
    name and password (`fedprune_device.enrollment.enrollment`).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def insecure_allowed(host: str) -> None:
    """Make sure that a connection without TLS, or without an identity, stays on this machine. Raises `ConfigError`
    if it would leave it."""
    if host not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigError(
            "a broker without TLS and identity", expected="127.0.0.1, ::1 or localhost", got=repr(host)[:80],
            hint="Use mqtts://, with the certificates that `fedprune-server init` and joining give.",
        )  # fmt: skip


def check_peer(der: bytes | None, floor: int) -> None:
    """Make sure that a broker's certificate, which OpenSSL has verified except for its times, has not ended before the
    floor. Raises `ssl.SSLCertVerificationError`."""
    if der is None:
        raise _refused("it has no certificate")
    certificate = x509.load_der_x509_certificate(der)
    ended = seconds_of(certificate.not_valid_after_utc)
    if ended < floor:
        day = certificate.not_valid_after_utc.date().isoformat()
        raise _refused(f"its certificate ended on {day}")


def _refused(why: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(why)
    error.reason = why  # shown by `fedprune.wire.broker_url.failure`
    return error
