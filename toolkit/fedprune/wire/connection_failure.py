"""Why a broker can't be reached, and what to do about it, in words for people."""

from __future__ import annotations

import socket
import ssl

from fedprune.core.errors import FedpruneError

_TLS_FAILED = "TLS failed"
REFUSED_CONNECTION = "it refuses the connection"
SILENT_END = "it ends the TLS connection without an answer"

_ADDRESS_ERROR_CODES = frozenset({62, 64})  # OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH
_DATE_ERROR_CODES = frozenset({9, 10})  # X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED


def connection_failure(error: OSError | FedpruneError) -> str:
    """The reason why a broker can't be reached, for people."""
    if isinstance(error, FedpruneError):
        return str(error)
    if isinstance(error, socket.gaierror):
        return f"the host name is unknown ({error.strerror})"
    if isinstance(error, ssl.SSLCertVerificationError) and error.reason == "CERTIFICATE_VERIFY_FAILED":
        return f"{_TLS_FAILED} ({_distrust_reason(error)})"
    if isinstance(error, ssl.SSLError):
        return f"{_TLS_FAILED} ({error.reason or error})"
    if isinstance(error, TimeoutError):
        return "no answer"
    return (error.strerror or str(error) or type(error).__name__).lower()


def connection_remedy(reason: str) -> str:
    """What to do about a connection that failed for this reason; empty if the reason says it."""
    if reason.startswith(REFUSED_CONNECTION):
        return "Is it the right broker, and do user name and password fit?"
    if reason.startswith(SILENT_END):
        return "`fedprune-server devices` lists revoked boards; if this one isn't, see the broker's log."
    if reason.startswith(_TLS_FAILED):
        return ""
    return "Is a broker running there, is the port right, and does a firewall let it through?"


def _distrust_reason(error: ssl.SSLCertVerificationError) -> str:
    """The reason why a certificate isn't trusted, with the remedy for that reason."""
    reason = (error.verify_message or "unknown authority").rstrip(".")
    if error.verify_code in _ADDRESS_ERROR_CODES:
        return (
            f"its certificate is for another address: {reason}. Connect to an address that it names, or give the "
            "broker a certificate for this one: docs/runbook.md#the-server-has-another-address"
        )
    if error.verify_code in _DATE_ERROR_CODES:
        return f"{reason}: see the clock of this machine, and the certificate's dates (docs/runbook.md)"
    return f"its certificate is not trusted: {reason}; --ca names the authorities to trust"
