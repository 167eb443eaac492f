"""TLS connections to a broker: one trusted authority, host names checked, the machine's clock ignored.

OpenSSL compares certificates with the machine's clock, and a board whose clock shows 1970 or 2090 would be locked out.
Its own check of times is therefore switched off (X509_V_FLAG_NO_CHECK_TIME) and replaced: right after the handshake,
before a byte of MQTT is sent, the broker's certificate must not have ended by the board's time floor
(`security.trusted_time`). Everything else stays: the chain, the purpose (serverAuth), the host name.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509

from fedprune.core.errors import ConfigError, IdentityError
from fedprune.security.certificates import seconds_of
from fedprune.wire.urls import SYSTEM_AUTHORITIES

# OpenSSL's X509_V_FLAG_NO_CHECK_TIME (x509_vfy.h), since 1.1.0; Python has no name for it.
NO_CHECK_TIME = 0x200000

# OpenSSL's X509_V_ERR_* for a chain that ends at no trusted authority. An authority of the same name and another key,
# as `fedprune-server init` makes one when it is run again, shows as a wrong signature (7) or key identifier (30).
_FOREIGN_CODES = frozenset({2, 7, 18, 19, 20, 21, 30})


class PinnedContext(ssl.SSLContext):
    """A client's context that trusts one authority. Made by `pinned_context`.

    Attributes:
        foreign_message: What a certificate of another authority means, in words; empty to say that it isn't trusted.
    """

    floor: Callable[[], int]
    foreign_message: str = ""


class _CheckedSocket(ssl.SSLSocket):
    def do_handshake(self, block: bool = False) -> None:
        context = self.context
        try:
            super().do_handshake(block)
        except ssl.SSLCertVerificationError as error:
            if isinstance(context, PinnedContext) and context.foreign_message and error.verify_code in _FOREIGN_CODES:
                raise _verification_error(context.foreign_message) from error
            raise
        if isinstance(context, PinnedContext):
            try:
                check_peer(self.getpeercert(binary_form=True), context.floor())
            except ssl.SSLCertVerificationError:
                self.close()  # the caller wouldn't, and nothing must be sent
                raise


def peer_name(connection: ssl.SSLSocket) -> str:
    """The common name in the peer's certificate, which OpenSSL has verified; empty if it has none or several."""
    subject: Any = (connection.getpeercert() or {}).get("subject", ())
    names = [value for name_part in subject for key, value in name_part if key == "commonName"]
    return str(names[0]) if len(names) == 1 else ""


def pinned_context(
    authority: Path, certificate: Path | None, key: Path | None, floor: Callable[[], int]
) -> PinnedContext:
    """A client's context for its fleet's broker (`paho.mqtt.client.Client.tls_set_context`).

    Raises `IdentityError` if a file is missing or damaged, or key and certificate don't belong together.

    Args:
        authority: The certificate of the only trusted authority; `SYSTEM_AUTHORITIES` for the system's authorities.
        certificate: The client's certificate; None to join without one.
        floor: Returns the time floor in seconds since 1970.
    """
    context = PinnedContext(ssl.PROTOCOL_TLS_CLIENT)  # this protocol's default is to check certificate and host name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VERIFY_X509_STRICT | NO_CHECK_TIME
    context.sslsocket_class = _CheckedSocket
    context.floor = floor
    try:
        if authority == SYSTEM_AUTHORITIES:
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
    name and password (`fedprune_device.network.enrollment`).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def check_local_host(host: str, setting: str = "") -> None:
    """Raise `ConfigError` if a connection without TLS, or without an identity, would leave this machine. `setting` of
    the server names the host; it is empty if the host is a broker's."""
    if host not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigError(
            f"{setting or 'a broker'} without TLS and identity", expected="127.0.0.1, ::1 or localhost",
            got=repr(host)[:80],
            hint="Leave --insecure out: a fleet has an identity from `fedprune-server init`."
            if setting
            else "Use mqtts://, with the certificates that `fedprune-server init` and joining give.",
        )  # fmt: skip


def check_peer(der: bytes | None, floor: int) -> None:
    """Raise `ssl.SSLCertVerificationError` if a broker's certificate has ended before the floor.

    OpenSSL has verified everything else about it.
    """
    if der is None:
        raise _verification_error("it has no certificate")
    certificate = x509.load_der_x509_certificate(der)
    ended_at = seconds_of(certificate.not_valid_after_utc)
    if ended_at < floor:
        day = certificate.not_valid_after_utc.date().isoformat()
        raise _verification_error(f"its certificate ended on {day}")


def _verification_error(reason: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(reason)
    error.reason = reason  # shown by `fedprune.wire.connection_failure.connection_failure`
    return error
