"""An aggregator's connection to its parent, which it makes, and makes again whenever it is lost."""

from __future__ import annotations

import json
import logging
import queue
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from secrets import SystemRandom
from typing import Any

from websockets.exceptions import InvalidHandshake, InvalidMessage, InvalidURI
from websockets.sync.client import connect

from fedprune import __version__
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import events as on
from fedprune.core.closing import Closing
from fedprune.core.errors import BrokerError, FedpruneError, IdentityError, ProtocolError
from fedprune.wire.messages import Birth
from fedprune_server.aggregators.channel import (
    MAX_TEXT,
    PING_TIMEOUT_S,
    QUIET,
    BlobWanted,
    Channel,
    Message,
    ParentLostError,
    drained,
)
from fedprune_server.aggregators.messages import Steered, event_body, read_steered, whole_of
from fedprune_server.messaging.second_server import OtherServerError

log = logging.getLogger("fedprune.server")

_JOBS, _AGAIN_S = "jobs.json", 10.0
"""The file with the parent's latest jobs, and the seconds to wait for the parent if there is one."""

FIRST_S, MOST_S = 0.5, 30.0
"""Seconds between two attempts to connect: the first pause, doubled each time, and the longest."""

_SEARCHES = 16
"""Threads that look for a blob at this aggregator's own aggregators, which may have to be waited for."""

_OTHER_AUTHORITY = (18, 19, 20, 21)
"""OpenSSL's X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT to X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE (x509_vfy.h)."""

_OTHER_HOST = (62, 64)
"""OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH."""


@dataclass(frozen=True)
class Members:
    """Members of the fleet, name and key: all of them, or changes."""

    added: Mapping[str, str]
    removed: tuple[str, ...]
    whole: bool


@dataclass(frozen=True)
class Register:
    """Lines of the register of issued and revoked certificates."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class ParentUp:
    """The parent is connected, and doesn't know this region's boards yet.

    Attributes:
        away_s: Seconds for which it has waited for this aggregator.
    """

    away_s: float = 0.0


Item = Steered | Members | Register | ParentUp


class RefusedByParentError(BrokerError):
    """The parent doesn't accept this aggregator, at least for now."""


class ParentLink(Closing):
    """Connects to the parent in a thread of its own.

    Args:
        url: The parent's, at `wss://` or, on this machine alone, `ws://`.
        region: This aggregator's name.
        context: Gives TLS for a connection; None to do without.
        landing: Where blobs of the parent arrive.

    Attributes:
        jobs: The parent's jobs by name: settings, the model's name and digest.
        lost_since: When the connection ended, or was first tried, in seconds since 1970; None while it lasts.
    """

    def __init__(
        self,
        url: str,
        region: str,
        context: Callable[[], ssl.SSLContext] | None,
        landing: BlobStore,
    ) -> None:
        self.url, self.region = url, region
        self.jobs: dict[str, dict[str, Any]] = {}
        self.lost_since: float | None = time.time()
        self._context, self._landing = context, landing
        self._process = secrets.token_hex(16)
        self._stores: dict[str, BlobStore] = {}
        self._below: Callable[[str, str, str], bytes | None] | None = None
        self._searches = ThreadPoolExecutor(_SEARCHES, "fedprune-blobs")
        self._searched: dict[BlobWanted, Channel] = {}
        self._searched_lock = threading.Lock()
        self._parts: list[Steered] = []
        self._new_members: dict[str, str] = {}
        self._wake: Callable[[], None] = lambda: None
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._channel: Channel | None = None
        self._connection: Channel | None = None  # its channel, before the parent's welcome too
        self._welcomed, self._stopping, self._changed = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedprune-parent", daemon=True)
        self._greeted = False
        self._error: FedpruneError | None = None
        self._replaced: OtherServerError | None = None

    @property
    def connected(self) -> bool:
        return self._channel is not None

    @property
    def outdated(self) -> bool:
        """Whether the parent runs other jobs, or with other settings, than it did when this aggregator started."""
        return self._changed.is_set()

    def start(self, patience_s: float = 30.0) -> None:
        """Connect, and wait for the parent's jobs. If they are known from an earlier start, don't wait long. Raises
        `BrokerError` if no parent answers in time or it refuses this aggregator, `IdentityError` if its certificate is
        not to be trusted, and `OtherServerError` if it has another process of this aggregator."""
        known = self._stored()
        self._thread.start()
        self._welcomed.wait(min(patience_s, _AGAIN_S) if known else patience_s)
        if self.jobs:
            return
        error = self._error or self._unanswered()
        if not known or isinstance(error, RefusedByParentError | OtherServerError):
            raise error
        log.warning("boards are served by the parent's latest orders until it can be reached: %s", error)
        self.jobs = known

    def _unanswered(self, why: str = "") -> BrokerError:
        hint = "Is its server running with --aggregators at this address?"
        return BrokerError(f"no parent answers at {self.url}{why}", hint=hint)

    def _stored(self) -> dict[str, dict[str, Any]]:
        """The parent's latest jobs; none if the file can't be read."""
        try:
            found = json.loads((self._landing.root / _JOBS).read_text())
        except (OSError, ValueError):
            return {}
        return {str(name): dict(about) for name, about in found.items()}

    def serve(
        self,
        stores: Mapping[str, BlobStore],
        wake: Callable[[], None],
        below: Callable[[str, str, str], bytes | None] | None = None,
    ) -> None:
        """Give the parent blobs of these jobs when it asks for them.

        Args:
            wake: Called when items wait to be collected.
            below: Gives a blob of this aggregator's own aggregators, by job, digest and region. Raises
                `ParentLostError` if this server ends.
        """
        self._stores.update(stores)
        self._wake, self._below = wake, below

    def collect(self) -> list[Item]:
        """Items that have come since the last call. Raises `OtherServerError` if the parent has another process of this
        aggregator."""
        if self._replaced is not None:
            raise self._replaced
        return drained(self._items)

    def fetch(self, job: str, sha256: str) -> bytes | None:
        """A blob of the parent or of another of its aggregators; None if no server has it. Raises `ParentLostError`."""
        channel = self._channel
        if channel is None:
            raise ParentLostError("the parent isn't connected")
        return channel.fetch(job, sha256)

    def report(self, job: str, event: on.Event) -> None:
        self._send({"kind": "event", "job": job, "event": event_body(event)})

    def moved(self, job: str, traffic: Mapping[str, tuple[int, int]]) -> None:
        """Payload bytes to and from boards since the last call."""
        self._send({"kind": "traffic", "job": job, "devices": traffic})

    def born(self, birth: Birth, region: str = "") -> None:
        """A board is connected, here or through an aggregator `region` of this one."""
        self._send({"kind": "born", "birth": birth.to_bytes().decode(), "region": region})

    def died(self, device: str, session: int) -> None:
        """A board's connection has ended."""
        self._send({"kind": "died", "device": device, "session": session})

    def close(self) -> None:
        self._stopping.set()
        self._searches.shutdown(wait=False, cancel_futures=True)
        if self._connection is not None:
            self._connection.close()

    def _send(self, message: Message) -> None:
        channel = self._channel
        if channel is not None:
            channel.send(message)

    def _run(self) -> None:
        pause = FIRST_S
        while not self._stopping.is_set():
            try:
                if self._connect():
                    pause = FIRST_S
            except ssl.SSLCertVerificationError as error:
                self._error = _distrusted(self.url, error)
                log.log(logging.WARNING if pause == FIRST_S else logging.DEBUG, "%s", self._error)
                self._welcomed.set()
            except (OSError, TimeoutError, InvalidHandshake, InvalidMessage, InvalidURI, FedpruneError) as error:
                self._error = self._unanswered(f" ({error})")
                log.log(
                    logging.WARNING if pause == FIRST_S else logging.DEBUG,
                    "the parent at %s can't be reached: %s",
                    self.url,
                    error,
                )
            except Exception as error:  # noqa: BLE001 - the connection is tried again, whatever has ended it
                log.error("the connection to the parent at %s failed: %s: %s", self.url, type(error).__name__, error)
            share = SystemRandom().uniform(0.5, 1.0)
            self._stopping.wait(share * pause)
            pause = min(MOST_S, 2 * pause)

    def _connect(self) -> bool:
        """Connect, and read until the connection ends; returns whether the parent has welcomed this aggregator."""
        context = None if self._context is None else self._context()
        with (
            connect(
                self.url,
                ssl=context,
                max_size=MAX_TEXT,
                compression=None,
                proxy=None,
                ping_timeout=PING_TIMEOUT_S,
                logger=QUIET,
            ) as socket,
            Channel(socket, self._store, self._received, self._wanted) as channel,
        ):
            self._connection = channel
            if self._stopping.is_set():
                return False
            self._greeted = False
            self._parts, self._new_members = [], {}
            channel.send(
                {
                    "kind": "hello", "version": __version__, "region": self.region,
                    "instance": self._instance(), "process": self._process,
                }
            )  # fmt: skip
            channel.run()
            if self._channel is channel:
                self._channel, self.lost_since = None, time.time()
                log.warning("the connection to the parent at %s is lost", self.url)
        return self._greeted

    def _store(self, job: str, sha256: str) -> BlobStore | None:
        store = self._stores.get(job)
        return store if store is not None and store.has(sha256) else None

    def _instance(self) -> str:
        """An id that distinguishes this aggregator from others of its name; stored in its folder."""
        path = self._landing.root / "instance"
        if not path.exists():
            self._landing.write_file(path, secrets.token_hex(16).encode())
        return path.read_text()

    def _wanted(self, channel: Channel, request: BlobWanted) -> None:
        below, (job, sha256, _) = self._below, request
        if below is None or self._store(job, sha256) is not None:
            channel.give(request)
            return
        with self._searched_lock:
            under_way = request in self._searched
            self._searched[request] = channel  # the latest connection gets the answer
        if not under_way:
            with suppress(RuntimeError):  # this server ends
                self._searches.submit(self._search, below, request)

    def _search(self, below: Callable[[str, str, str], bytes | None], request: BlobWanted) -> None:
        data, lost = None, False
        try:
            data = below(*request)
        except ParentLostError:
            lost = True
        with self._searched_lock:
            channel = self._searched.pop(request)
        channel.give(request, data, lost=lost)

    def _received(self, channel: Channel, message: Message) -> None:
        match message["kind"]:
            case "welcome":
                self._welcome(channel, dict(message["jobs"]), float(message["away_s"]))
            case "refused":
                self._error = RefusedByParentError(
                    f"the parent at {self.url} refuses this aggregator: {message['reason']}"
                )
                if self.jobs:  # else `start` raises it
                    log.error("%s", self._error)
                self._welcomed.set()
            case "replaced":
                self._stopping.set()
                self._error = self._replaced = OtherServerError(
                    f"the parent at {self.url} has replaced this aggregator: {message['reason']}",
                    hint="Let that one serve the region's boards; or stop it, and start this one again.",
                )
                self._welcomed.set()
            case "steered":
                self._parts.append(read_steered(message))
                if not message["more"]:
                    self._items.put(whole_of(self._parts))
                    self._parts = []
            case "members":
                self._new_members |= {str(k): str(v) for k, v in message["added"].items()}
                if not message["more"]:
                    removed = tuple(map(str, message["removed"]))
                    self._items.put(Members(self._new_members, removed, bool(message["whole"])))
                    self._new_members = {}
            case "register":
                self._items.put(Register(tuple(map(str, message["lines"]))))
            case kind:
                raise ProtocolError("message of a parent", got=str(kind)[:80])
        self._wake()

    def _welcome(self, channel: Channel, jobs: dict[str, dict[str, Any]], away_s: float) -> None:
        if self.jobs and jobs != self.jobs:
            self._changed.set()
        self.jobs = self.jobs or jobs
        self._landing.write_file(self._landing.root / _JOBS, json.dumps(jobs).encode())
        self._error, self._greeted, self._channel, self.lost_since = None, True, channel, None
        self._items.put(ParentUp(away_s))
        self._welcomed.set()
        log.info("connected to the parent at %s", self.url)


def _distrusted(url: str, error: ssl.SSLCertVerificationError) -> IdentityError:
    """Why the certificate of a parent is not to be trusted, and what to do."""
    why = getattr(error, "verify_message", "") or error.reason or str(error)
    code = getattr(error, "verify_code", 0)
    if code in _OTHER_AUTHORITY:
        what = f"the certificate of the parent at {url} is of another authority than this aggregator's identity"
        hint = "Replace identity/ in this state folder by a copy of the parent's, or correct --parent."
    elif code in _OTHER_HOST:
        what = f"the certificate of the parent at {url} doesn't name this host"
        hint = "Use a name of its machine, as its log lists them, or give it --aggregators HOST:PORT with this host."
    else:
        what, hint = f"the certificate of the parent at {url} can't be used", "Start its server again, and see its log."
    return IdentityError(f"{what} ({why})", hint=hint)
