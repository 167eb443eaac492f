"""Asks the server to let a board into its fleet: with a one-time claim, or with an operator's approval.

It asks on a connection of its own that needs no certificate. Its messages contain no secret and are signed, so an
attacker in between can only block them. A user and a password of the broker are secrets: they go only to a broker that
has proved its identity.
"""

from __future__ import annotations

import logging
import math
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedprune.core.disk import read_file
from fedprune.core.errors import BrokerError, IdentityError, JoinError, ProtocolError, path_remedy
from fedprune.core.text import decode_text, one_line
from fedprune.security.device_identity import DeviceIdentity
from fedprune.security.join_claim import JoinClaim
from fedprune.security.joining import Admission
from fedprune.security.tls import pinned_context, unpinned_context
from fedprune.security.trusted_time import BUILD_TIME
from fedprune.wire.fleet_messages import JoinAnswer
from fedprune.wire.link import BrokerLink
from fedprune.wire.messages import parse_message
from fedprune.wire.topics import Topics
from fedprune.wire.urls import BrokerUrl

_LOG = logging.getLogger("fedprune.device")

_REQUEST_INTERVAL_S = 5.0  # between two requests without an answer
_APPROVAL_INTERVAL_S = 20.0  # while an operator's approval is awaited, which takes minutes at least


def join_urls(broker: str) -> list[str]:
    """URLs at which a board may ask to join, likeliest first: brokers that fedprune sets up have a listener for it on
    the port after that for members, such as 8884 and 8883. Raises `ConfigError` if `broker` isn't a URL."""
    url = BrokerUrl.parse(broker)
    if not url.tls:
        return [broker]
    scheme, _, rest = broker.rstrip("/").partition("://")
    return [f"{scheme}://{rest.removesuffix(f':{url.port}')}:{url.port + 1}", broker]


class ForeignAnswerError(JoinError):
    """Answers to a request to join came, and none of them was by the server that claim or pin name."""


@dataclass(frozen=True)
class JoinRoute:
    """A way to ask: a broker's URL, and the TLS settings of the connection to it."""

    url: str
    tls: Callable[[], ssl.SSLContext]


def join_routes(identity: DeviceIdentity, urls: Sequence[str], authority: Path | None) -> list[JoinRoute]:
    """The brokers and TLS settings to ask over, likeliest first. By default the fleet's own authority vouches for them,
    once it is known.
    """
    if not identity.has_joined:
        if authority is None:
            return [JoinRoute(BrokerUrl.parse(url).without_credentials, unpinned_context) for url in urls]
        return [JoinRoute(url, lambda: pinned_context(authority, None, None, lambda: BUILD_TIME)) for url in urls]
    without_certificate = [
        JoinRoute(url, lambda: identity.tls_context(authority, with_certificate=False)) for url in urls
    ]
    # First without a certificate, since the board's own may have expired; but some brokers require one.
    return [*without_certificate, JoinRoute(urls[-1], lambda: identity.tls_context(authority))]


def enrol(
    identity: DeviceIdentity,
    urls: Sequence[str],
    claim: JoinClaim | None,
    pin: bytes | None = None,
    *,
    authority: Path | None = None,
    patience_s: float | None = None,
    stopped: threading.Event | None = None,
    report: Callable[[str], None] = _LOG.info,
) -> Admission:
    """Ask until an answer comes; afterwards the identity `has_joined`.

    Without a claim, `pin` must be that of the fleet's authority, and an operator must approve. `patience_s` limits the
    whole wait; None waits for ever. Raises `IdentityError` without claim and pin, `JoinError` if the server refuses or
    every answer was foreign, `BrokerError` if no answer came in time or it was stopped.
    """
    authority_pin = claim.pin if claim is not None else pin
    if authority_pin is None:
        raise IdentityError(
            f"{identity.device} can't tell its server from another without a claim",
            hint="Give it one of `fedprune-server claim`: --claim FILE. Or the pin that `init` showed: --pin HEX.",
        )
    stopped = stopped or threading.Event()
    deadline = math.inf if patience_s is None else time.monotonic() + patience_s
    last_error: BrokerError | ForeignAnswerError | None = None
    reported_lines: list[str] = []
    while not stopped.is_set() and time.monotonic() < deadline:
        errors: list[BrokerError | ForeignAnswerError] = []
        for route in join_routes(identity, urls, authority):
            try:
                return _ask_over(identity, route, claim, authority_pin, deadline, stopped, report)
            except (BrokerError, ForeignAnswerError) as error:  # noqa: PERF203 - each may be tried again
                errors.append(error)
        # Not every broker has a port for joining: errors are reported only when all routes have failed.
        lines = [one_line(str(error)) for error in errors]
        is_over = time.monotonic() >= deadline  # then the last one is the command's error
        for line in lines[: len(lines) - is_over] if lines != reported_lines else ():
            report(line)
        reported_lines = lines
        foreign = [error for error in errors if isinstance(error, ForeignAnswerError)]
        last_error = foreign[0] if foreign else errors[-1] if errors else last_error
        stopped.wait(max(0.0, min(_REQUEST_INTERVAL_S, deadline - time.monotonic())))
    raise last_error or BrokerError(f"no server was asked to let {identity.device} in")


def _ask_over(
    identity: DeviceIdentity,
    route: JoinRoute,
    claim: JoinClaim | None,
    pin: bytes,
    deadline: float,
    stopped: threading.Event,
    report: Callable[[str], None],
) -> Admission:
    """Ask over one broker until the server admits or refuses the board.

    Raises `BrokerError` when time is up, `ForeignAnswerError` if answers came and none was the server's.
    """
    request, topics, is_waiting = identity.request(claim), Topics(identity.site), False
    foreign_answer: ProtocolError | None = None
    with BrokerLink(route.url, request.nonce, tls=route.tls) as link:
        link.subscribe([topics.join_answer(request.nonce)])
        link.start()
        next_request_at = 0.0
        while not stopped.is_set() and time.monotonic() < deadline:
            if time.monotonic() >= next_request_at:
                link.publish(topics.join_request(request.nonce), request.to_bytes())
                next_request_at = time.monotonic() + (_APPROVAL_INTERVAL_S if is_waiting else _REQUEST_INTERVAL_S)
            item = link.get(0.2)
            if not isinstance(item, tuple):
                continue
            try:
                answer = parse_message(item[1])
                admission = identity.admit(answer, pin) if isinstance(answer, JoinAnswer) else None
            except ProtocolError as error:  # a forged answer must not end the wait for the server's own
                if foreign_answer is None:
                    report(f"an answer doesn't count: {one_line(str(error))}")
                foreign_answer = error
                continue
            if admission is not None:
                return admission
            if not is_waiting:
                is_waiting = True
                report(
                    f"waiting for the operator: compare the key's fingerprint, "
                    f"{identity.key.verifying_key.fingerprint}, with `fedprune-server devices`, then `fedprune-server "
                    f"devices approve {identity.device} --key {identity.key.verifying_key.fingerprint}`"
                )
    if foreign_answer is not None and not is_waiting and not stopped.is_set():
        raise ForeignAnswerError(
            f"the only answers to {identity.device}'s request to join didn't count: {one_line(str(foreign_answer))}",
            hint="Is the claim or pin of the server that runs there?",
        )
    raise BrokerError(
        f"no answer to {identity.device}'s request to join site {identity.site} by way of {BrokerUrl.parse(route.url)}",
        hint="Does the server run, with an identity, and is the site the one that `fedprune-server init` named? "
        "It is default where none was given: --site default.",
    )


def read_claim_file(path: Path, device: str) -> JoinClaim:
    try:
        return JoinClaim.parse(decode_text(read_file(path)), str(path), device)
    except OSError as error:
        raise IdentityError(f"can't read the claim in {path}: {error.strerror}", hint=path_remedy(error)) from error
    except UnicodeError as error:
        raise JoinError(f"{path} holds no claim", hint="`fedprune-server claim --out FILE` writes one.") from error
