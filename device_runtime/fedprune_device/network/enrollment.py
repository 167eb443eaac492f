"""How a board becomes a member of its fleet and stays one: it joins with a claim or waits for approval, and renews.

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

from fedprune.core.errors import BrokerError, IdentityError, JoinError, ProtocolError, remedy
from fedprune.core.text import decode_text, one_line
from fedprune.security.device_identity import DeviceIdentity
from fedprune.security.joining import Admission, Claim
from fedprune.security.tls import BUILT, pinned_context, unpinned_context
from fedprune.wire.fleet_messages import JoinAnswer
from fedprune.wire.link import Link
from fedprune.wire.messages import parse
from fedprune.wire.topics import Topics
from fedprune.wire.urls import BrokerUrl

_LOG = logging.getLogger("fedprune.device")

JOIN_PORT = 8884  # of brokers that `fedprune-server broker-config` sets up, in addition to 8883 for members

_MEMBERS_PORT = 8883
_AGAIN_S = 5.0
_WAITING_S = 20.0
_LOOK_S = 600.0
_DAY_S = 24 * 3600.0
_PATIENCE_S = 60.0


def join_urls(broker: str) -> list[str]:
    """URLs at which a board may ask to join, likeliest first; raises `ConfigError` if `broker` isn't a URL."""
    url = BrokerUrl.parse(broker)
    if not url.tls or url.port != _MEMBERS_PORT:
        return [broker]
    scheme, _, rest = broker.rstrip("/").partition("://")
    return [f"{scheme}://{rest.removesuffix(f':{_MEMBERS_PORT}')}:{JOIN_PORT}", broker]


class ForeignAnswerError(JoinError):
    """Answers to a request to join came, and none of them was by the server that claim or pin name."""


@dataclass(frozen=True)
class JoinRoute:
    url: str
    tls: Callable[[], ssl.SSLContext]


def join_routes(identity: DeviceIdentity, urls: Sequence[str], authority: Path | None) -> list[JoinRoute]:
    """The brokers and TLS settings to ask over, likeliest first. By default the fleet's own authority vouches for them,
    once it is known.
    """
    if not identity.joined and authority is None:
        return [JoinRoute(BrokerUrl.parse(url).bare, unpinned_context) for url in urls]
    if not identity.joined:
        return [
            JoinRoute(url, lambda: pinned_context(authority, None, None, lambda: BUILT)) for url in urls if authority
        ]
    without = [JoinRoute(url, lambda: identity.context(authority, certificate=False)) for url in urls]
    # Its own certificate may have ended; but there are brokers that refuse connections without one.
    return [*without, JoinRoute(urls[-1], lambda: identity.context(authority))]


def enrol(
    identity: DeviceIdentity,
    urls: Sequence[str],
    claim: Claim | None,
    pin: bytes | None = None,
    *,
    authority: Path | None = None,
    patience_s: float | None = None,
    stopped: threading.Event | None = None,
    tell: Callable[[str], None] = _LOG.info,
) -> Admission:
    """Ask until an answer comes; afterwards the identity has `joined`.

    Without a claim, `pin` must be that of the fleet's authority, and an operator must approve. `patience_s` limits the
    whole wait; None waits for ever. Raises `IdentityError` without claim and pin, `JoinError` if the server refuses or
    every answer was foreign, `BrokerError` if no answer came in time or it was stopped.
    """
    known = claim.pin if claim is not None else pin
    if known is None:
        raise IdentityError(
            f"{identity.device} can't tell its server from another without a claim",
            hint="Give it one of `fedprune-server claim`: --claim FILE. Or the pin that `init` showed: --pin HEX.",
        )
    stopped = stopped or threading.Event()
    until = None if patience_s is None else time.monotonic() + patience_s
    last: BrokerError | ForeignAnswerError | None = None
    said: list[str] = []
    while not stopped.is_set() and (until is None or time.monotonic() < until):
        failed: list[BrokerError | ForeignAnswerError] = []
        for way in join_routes(identity, urls, authority):
            try:
                return _asked(identity, way, claim, known, until, stopped, tell)
            except (BrokerError, ForeignAnswerError) as error:  # noqa: PERF203 - each may be tried again
                failed.append(error)
        # Not every broker has a port for joining: what fails is told when all have failed.
        lines = [one_line(str(error)) for error in failed]
        over = until is not None and time.monotonic() >= until  # then the last one is the command's error
        for line in lines[: len(lines) - over] if lines != said else ():
            tell(line)
        said = lines
        last = next((e for e in failed if isinstance(e, ForeignAnswerError)), failed[-1] if failed else last)
        left = math.inf if until is None else until - time.monotonic()
        stopped.wait(max(0.0, min(_AGAIN_S, left)))
    raise last or BrokerError(f"no server was asked to let {identity.device} in")


def _asked(
    identity: DeviceIdentity,
    way: JoinRoute,
    claim: Claim | None,
    pin: bytes,
    until: float | None,
    stopped: threading.Event,
    tell: Callable[[str], None],
) -> Admission:
    """Ask over one broker until it is settled or time is up (`BrokerError`; `ForeignAnswerError` if the answers weren't
    the server's).
    """
    request, topics, told = identity.request(claim), Topics(identity.site), False
    doubt: ProtocolError | None = None
    with Link(way.url, request.nonce, tls=way.tls) as link:
        link.subscribe([topics.joined(request.nonce)])
        link.start()
        again = 0.0
        while not stopped.is_set() and (until is None or time.monotonic() < until):
            if time.monotonic() >= again:
                link.publish(topics.join(request.nonce), request.to_bytes())
                again = time.monotonic() + (_WAITING_S if told else _AGAIN_S)
            item = link.get(0.2)
            if not isinstance(item, tuple):
                continue
            try:
                answer = parse(item[1])
                admission = identity.admit(answer, pin) if isinstance(answer, JoinAnswer) else None
            except ProtocolError as error:  # not by the server: it must not keep the server's answer from coming
                if doubt is None:
                    tell(f"an answer doesn't count: {one_line(str(error))}")
                doubt = error
                continue
            if admission is not None:
                return admission
            if not told:
                told = True
                tell(
                    f"waiting for the operator: compare the key's fingerprint, {identity.key.verifying.fingerprint}, "
                    f"with `fedprune-server devices`, then `fedprune-server devices approve "
                    f"{identity.device} --key {identity.key.verifying.fingerprint}`"
                )
    if doubt is not None and not told and not stopped.is_set():
        raise ForeignAnswerError(
            f"the only answers to {identity.device}'s request to join didn't count: {one_line(str(doubt))}",
            hint="Is the claim or pin of the server that runs there?",
        )
    raise BrokerError(
        f"no answer to {identity.device}'s request to join site {identity.site} by way of {BrokerUrl.parse(way.url)}",
        hint="Does the server run, with an identity, and is the site the one that `fedprune-server init` named? "
        "It is default where none was given: --site default.",
    )


class Renewal:
    """Requests a new certificate in time, in a thread; it counts from the next connection.

    It is also requested at most once a day while the broker refuses the board, because the clock of a board that was
    switched off may be wrong.
    """

    def __init__(
        self,
        identity: DeviceIdentity,
        urls: Sequence[str],
        connected: Callable[[], bool],
        authority: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._identity = identity
        self._urls = urls
        self._connected = connected
        self._authority = authority
        self._clock = clock
        self._renewed_at = -_DAY_S
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="renewal", daemon=True)

    def __enter__(self) -> Renewal:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stopped.wait(_LOOK_S):
            try:
                if self.due():
                    self.renew()
            except Exception as error:  # noqa: BLE001, PERF203 - nothing may end what keeps the board a member
                _LOG.warning("no new certificate yet: %s", error)

    def due(self) -> bool:
        if self._connected():
            return self._identity.renewal_due()
        return self._clock() - self._renewed_at >= _DAY_S

    def renew(self, patience_s: float = _PATIENCE_S) -> None:
        """Request a new certificate; if none comes, an error is raised and the old one stays."""
        enrol(
            self._identity, self._urls, None, self._identity.pin, authority=self._authority,
            patience_s=patience_s, stopped=self._stopped, tell=_LOG.debug,
        )  # fmt: skip
        self._renewed_at = self._clock()
        _LOG.info("a new certificate: it counts from the next connection on")


def read_claim(path: Path) -> Claim:
    try:
        return Claim.parse(decode_text(path.read_bytes()), str(path))
    except OSError as error:
        raise IdentityError(f"can't read the claim in {path}: {error.strerror}", hint=remedy(error)) from error
    except UnicodeError as error:
        raise JoinError(f"{path} holds no claim", hint="`fedprune-server claim --out FILE` writes one.") from error
