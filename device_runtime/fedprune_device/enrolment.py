"""How a board becomes a member of its fleet, and stays one: it joins with a claim or waits for approval, and renews.

It asks on a connection of its own that needs no certificate. What is said there is no secret and proves itself, so
whoever is in between can only keep it from being said.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedprune.errors import BrokerError, FedpruneError, IdentityError, ProtocolError
from fedprune.trust.claim import Claim
from fedprune.trust.device_identity import DeviceIdentity
from fedprune.trust.joining import Admission
from fedprune.trust.tls import unpinned_context
from fedprune.wire.broker_url import BrokerUrl
from fedprune.wire.fields import one_line
from fedprune.wire.join_messages import JoinAnswer
from fedprune.wire.link import Link
from fedprune.wire.messages import parse
from fedprune.wire.topics import Topics

_LOG = logging.getLogger("fedprune.device")

JOIN_PORT = 8884
"""Of brokers that `fedprune-server broker-config` sets up, beside 8883 for members."""

_MEMBERS_PORT = 8883
_AGAIN_S = 5.0
_WAITING_S = 20.0
_LOOK_S = 600.0
_PATIENCE_S = 60.0


def join_urls(broker: str) -> list[str]:
    """Where a board can ask to be let in that is to use this broker, likeliest first.

    Raises:
        ConfigError: It is no URL.
    """
    url = BrokerUrl.parse(broker)
    if not url.tls or url.port != _MEMBERS_PORT:
        return [broker]
    scheme, _, rest = broker.rstrip("/").partition("://")
    return [f"{scheme}://{rest.removesuffix(f':{_MEMBERS_PORT}')}:{JOIN_PORT}", broker]


def enrol(
    identity: DeviceIdentity,
    urls: Sequence[str],
    claim: Claim | None,
    pin: bytes | None = None,
    *,
    patience_s: float | None = None,
    stopped: threading.Event | None = None,
    tell: Callable[[str], None] = _LOG.info,
) -> Admission:
    """Ask until an answer comes; afterwards the identity has `joined`.

    Args:
        identity: The board's.
        urls: Where to ask, in this order; the next one where nobody answers a connection.
        claim: Lets it in at once.
        pin: Of the authority, where there is no claim.
        patience_s: Seconds after which to give up; None for never. Waiting for approval counts.
        stopped: Ends it, too.
        tell: Takes what an operator should read.

    Raises:
        IdentityError: There is neither claim nor pin.
        JoinError: The server refuses.
        BrokerError: Nobody answered in time, or it was stopped.
        StorageError: The disk fails or is full.
    """
    known = claim.pin if claim is not None else pin
    if known is None:
        raise IdentityError(
            f"{identity.device} can't tell its server from another without a claim",
            hint="Give it one of `fedprune-server claim`: --claim FILE. Or the pin that `init` showed: --pin HEX.",
        )
    stopped = stopped or threading.Event()
    until = None if patience_s is None else time.monotonic() + patience_s
    last: BrokerError | None = None
    while not stopped.is_set() and (until is None or time.monotonic() < until):
        for url in urls:
            try:
                return _asked(identity, url, claim, known, until, stopped, tell)
            except BrokerError as error:  # noqa: PERF203 - each may be tried again
                if str(last) != str(error):
                    tell(one_line(str(error)))
                last = error
        stopped.wait(_AGAIN_S)
    raise last or BrokerError(f"nobody was asked to let {identity.device} in")


def _asked(
    identity: DeviceIdentity,
    url: str,
    claim: Claim | None,
    pin: bytes,
    until: float | None,
    stopped: threading.Event,
    tell: Callable[[str], None],
) -> Admission:
    """Ask over one broker until it is settled, or time is up.

    Raises:
        BrokerError: It isn't there, or time is up.
    """
    request, topics, told = identity.request(claim), Topics(identity.site), False
    with Link(url, request.nonce, tls=unpinned_context) as link:
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
            except ProtocolError as error:  # not by the server: whoever sent it can't keep the server's from coming
                tell(f"an answer doesn't count: {one_line(str(error))}")
                continue
            if admission is not None:
                return admission
            if not told:
                told = True
                tell(
                    f"waiting for the operator: compare the key's fingerprint, {identity.key.verifying.fingerprint}, "
                    f"with `fedprune-server devices`, then `fedprune-server devices approve {identity.device}`"
                )
    raise BrokerError(
        f"no answer to the request to join by way of {BrokerUrl.parse(url)}",
        hint="Does the server run, with this site, and with an identity?",
    )


class Renewal:
    """Asks for a new certificate when it is time, beside what the board does; at the next connection it counts.

    Also when the broker hasn't let the board in for a while: a board that lay in a drawer doesn't know what time it is.

    Args:
        identity: The board's; it has joined.
        urls: Where to ask.
        connected: Whether the board is connected.
    """

    def __init__(self, identity: DeviceIdentity, urls: Sequence[str], connected: Callable[[], bool]) -> None:
        self._identity = identity
        self._urls = urls
        self._connected = connected
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
                if not self._connected() or self._identity.renewal_due():
                    self.renew()
            except FedpruneError as error:  # noqa: PERF203 - tried again
                _LOG.warning("no new certificate yet: %s", error)

    def renew(self, patience_s: float = _PATIENCE_S) -> None:
        """Ask for a new certificate.

        Raises:
            FedpruneError: There is none; the old one stays.
        """
        enrol(
            self._identity, self._urls, None, self._identity.pin,
            patience_s=patience_s, stopped=self._stopped, tell=_LOG.debug,
        )  # fmt: skip
        _LOG.info("a new certificate: it counts from the next connection on")


def read_claim(path: Path) -> Claim:
    """A claim from a file.

    Raises:
        IdentityError: It can't be read.
        ProtocolError: It is none.
    """
    try:
        return Claim.parse(path.read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError) as error:
        raise IdentityError(f"can't read the claim in {path}: {error}") from error
