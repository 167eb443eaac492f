"""Messages between devices and server: small JSON objects with a version, a type and strictly checked fields.

A message is checked when it is made as well as when it is read, so what was sent can be received. Unknown keys are
ignored (a newer peer may say more); an unknown type or version is an error. Any message may arrive twice, late or
never.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, get_args

from fedprune.errors import ProtocolError, UnknownMessageError, shown
from fedprune.wire import fields as check
from fedprune.wire.blob_ref import BlobRef
from fedprune.wire.blob_url import check_blob_url
from fedprune.wire.checked_message import MAX_MESSAGE, VERSION, CheckedMessage
from fedprune.wire.fields import Check
from fedprune.wire.join_messages import JoinAnswer, JoinRequest
from fedprune.wire.release_messages import ReleaseFromServer, ReleaseReport

MAX_WANT = 1024
"""Leaves or pieces that one `Want` may ask for."""

_MOST_PRECISIONS = 8
_MOST_BLOCKS = 8
_MOST_SLABS = 32
_MOST_CODECS = 64
_MOST_ABILITIES = 64

TO = "to"
"""Ability of a board: it sends the chunks that a want asks for to the receiver that the want names."""

PHASES = ("download", "train", "evaluate")
PARTS = ("data", "leaves")

_COUNT = check.whole()
_SHORT = check.text(256)
_LONG = check.text(4096)
_CODING = ("codec", "weights_codec", "coded", "held", "moved", "moved_from")
_ASSIGNMENT: dict[str, Check] = {"job": check.job, "round": _COUNT, "attempt": _COUNT}


@dataclass(frozen=True)
class Birth(CheckedMessage):
    """A device is there.

    Attributes:
        device: The device's name.
        session: Number of this connection, larger than that of every earlier one.
        profile: Name of the hardware profile.
        samples: Local training samples.
        software: What runs there, with versions.
        probe: What the board measured of itself.
        held: The job, round and attempt that it works on or whose update it still has to deliver.
        codecs: Names of the codecs in which it can send updates (`fedprune.codec`); None where it knows none.
        answer_s: Seconds that answers take on its way, as far as it knows.
        abilities: What else it knows of the protocol, such as `TO`; None where it says nothing of that.
    """

    device: str
    session: int
    profile: str
    samples: int
    software: str
    probe: dict[str, Any] | None = None
    held: dict[str, Any] | None = None
    codecs: tuple[str, ...] | None = None
    answer_s: float | None = field(default=None, compare=False)
    abilities: tuple[str, ...] | None = None

    kind: ClassVar[str] = "birth"
    newer: ClassVar[frozenset[str]] = frozenset({"codecs", "answer_s", "abilities"})
    checks: ClassVar[Mapping[str, Check]] = {
        "device": check.device,
        "session": _COUNT,
        "profile": _SHORT,
        "samples": _COUNT,
        "software": _SHORT,
        "probe": check.optional(check.plain),
        "held": check.optional(check.assignment),
        "codecs": check.optional(check.names(_MOST_CODECS)),
        "answer_s": check.optional(check.number(0.0, 3600.0)),
        "abilities": check.optional(check.names(_MOST_ABILITIES)),
    }


@dataclass(frozen=True)
class Death(CheckedMessage):
    """A device is gone; the broker says so in its name (a will), or the device itself as it leaves.

    Attributes:
        device: The device's name.
        session: The connection that ended; deaths of older connections than the last birth's mean nothing.
    """

    device: str
    session: int

    kind: ClassVar[str] = "death"
    checks: ClassVar[Mapping[str, Check]] = {"device": check.device, "session": _COUNT}


@dataclass(frozen=True)
class Alive(CheckedMessage):
    """A device is still there, and has said nothing else for minutes.

    Attributes:
        device: The device's name.
        session: Its connection.
    """

    device: str
    session: int

    kind: ClassVar[str] = "alive"
    checks: ClassVar[Mapping[str, Check]] = {"device": check.device, "session": _COUNT}


@dataclass(frozen=True)
class Progress(CheckedMessage):
    """How far a device is.

    Attributes:
        device: The device's name.
        job: The job.
        round: The round.
        attempt: The attempt.
        phase: What it is doing.
        done: Units done in this phase.
        total: Units of this phase.
    """

    device: str
    job: str
    round: int
    attempt: int
    phase: str
    done: int
    total: int

    kind: ClassVar[str] = "progress"
    checks: ClassVar[Mapping[str, Check]] = {
        "device": check.device,
        **_ASSIGNMENT,
        "phase": check.choice(*PHASES),
        "done": _COUNT,
        "total": _COUNT,
    }


@dataclass(frozen=True)
class Refusal(CheckedMessage):
    """A device can't or won't do what it was offered.

    Attributes:
        device: The device's name.
        job: The job.
        round: The round.
        attempt: The attempt.
        reason: Why, in words.
        exit_code: The code of the error behind it, see `fedprune.errors.ExitCode`.
    """

    device: str
    job: str
    round: int
    attempt: int
    reason: str
    exit_code: int

    kind: ClassVar[str] = "refusal"
    checks: ClassVar[Mapping[str, Check]] = {
        "device": check.device,
        **_ASSIGNMENT,
        "reason": _LONG,
        "exit_code": check.whole(0, 255),
    }


@dataclass(frozen=True)
class Update(CheckedMessage):
    """A device has trained; the server pulls the weights.

    Attributes:
        device: The device's name.
        job: The job.
        round: The round.
        attempt: The attempt.
        base: sha256 of the weights that training started from; an update of an earlier run of a job of the same name is
            known by it.
        weights: The trained weights.
        samples: Local samples behind them.
        steps: Optimiser steps taken.
        metrics: What was measured, by name; finite numbers, at most 64.
    """

    device: str
    job: str
    round: int
    attempt: int
    base: str
    weights: BlobRef
    samples: int
    steps: int
    metrics: dict[str, float] = field(default_factory=dict)

    kind: ClassVar[str] = "update"
    checks: ClassVar[Mapping[str, Check]] = {
        "device": check.device,
        **_ASSIGNMENT,
        "base": check.digest,
        "weights": check.blob,
        "samples": _COUNT,
        "steps": _COUNT,
        "metrics": check.metrics,
    }


@dataclass(frozen=True)
class Hello(CheckedMessage):
    """The server is up: devices answer with a birth and repeat an update that is not yet accepted.

    Attributes:
        time: The server's, in seconds since 1970, by which boards with a wrong clock know which certificates are over.
    """

    time: int | None = None

    kind: ClassVar[str] = "hello"
    checks: ClassVar[Mapping[str, Check]] = {"time": check.optional(_COUNT)}
    newer: ClassVar[frozenset[str]] = frozenset({"time"})


@dataclass(frozen=True)
class Offer(CheckedMessage):
    """What a device is asked to train.

    Attributes:
        job: The job.
        round: The round.
        attempt: Number of this offer to this device in this round.
        seed: The job's seed.
        architecture: Digest of the architecture.
        selection: Digest of the device's selection.
        widths: Kept channels per group.
        classes: Number of classes.
        weights: The submodel's weights.
        training: The training graph of standard operators, which every board runs.
        inference: The inference graph, whose external data the weights are.
        recipe: The recipe, as `fedprune.recipe.Recipe.to_offer` gives it.
        mask: Which elements are active (`ElementMask.to_tensors`): of masked tensors `weights` has the active
            values alone, and so has the update. None where all are.
        ranking: Digest of the order of channels that the selection is the beginning of. Selections of other widths
            with the same digest are nested. None where nothing is known of it.
        lowered: By precision, the graphs with which the board can serve at it (`fedprune.precision.packed`). None
            where there are none.
        blocked: By channels of a block, training graphs for boards that compute so many at once (`fedprune.blocks`),
            at these widths alone. A board pulls the one that it can use instead of `training`. None where there are
            none.
        slabs: What `weights` can be made of instead of being pulled (`fedprune.slabs`): the narrowest submodel's file,
            and what each wider one adds to it, up to this one. Other devices pull the same blobs. None where there are
            none.
        codec: How the update is to be encoded (`fedprune.codec.Codec`); None for a plain tensor file.
        weights_codec: How weights come where they come encoded; a board keeps those that it has until the next offer.
        coded: The weights so encoded: a board that has what they are the difference to may pull this instead.
        held: sha256 of what they are the difference to; None for the difference to 0.
        moved: Where channels lie that a device was sent last (`fedprune.codec.relocation`); None where they lie as
            they did, or where nothing is known of that.
        moved_from: Digest of the selection that those were sent in.
        blobs_at: A web server that has these blobs, too (`fedprune.wire.blob_url`); None for MQTT alone.
    """

    job: str
    round: int
    attempt: int
    seed: int
    architecture: str
    selection: str
    widths: tuple[int, ...]
    classes: int
    weights: BlobRef
    training: BlobRef
    inference: BlobRef
    recipe: dict[str, Any]
    mask: BlobRef | None = None
    ranking: str | None = None
    lowered: dict[str, BlobRef] | None = None
    blocked: dict[str, BlobRef] | None = None
    slabs: tuple[BlobRef, ...] | None = None
    codec: str | None = None
    weights_codec: str | None = None
    coded: BlobRef | None = None
    held: str | None = None
    moved: BlobRef | None = None
    moved_from: str | None = None
    blobs_at: str | None = None

    kind: ClassVar[str] = "offer"
    newer: ClassVar[frozenset[str]] = frozenset(
        {"mask", "ranking", "lowered", "blocked", "slabs", "blobs_at", *_CODING}
    )
    checks: ClassVar[Mapping[str, Check]] = {
        **_ASSIGNMENT,
        "seed": _COUNT,
        "architecture": check.digest,
        "selection": check.digest,
        "widths": check.wholes(65_536, 1, 2**24),
        "classes": check.whole(1, 2**24),
        "weights": check.blob,
        "training": check.blob,
        "inference": check.blob,
        "recipe": check.plain,
        "mask": check.optional(check.blob),
        "ranking": check.optional(check.digest),
        "lowered": check.optional(check.blobs(_MOST_PRECISIONS)),
        "blocked": check.optional(check.blobs(_MOST_BLOCKS)),
        "slabs": check.optional(check.blob_list(_MOST_SLABS)),
        "codec": check.optional(_SHORT),
        "weights_codec": check.optional(_SHORT),
        "coded": check.optional(check.blob),
        "held": check.optional(check.digest),
        "moved": check.optional(check.blob),
        "moved_from": check.optional(check.digest),
        "blobs_at": check.optional(check_blob_url),
    }

    @property
    def graphs(self) -> tuple[BlobRef, ...]:
        """The graphs that are used: a device leaves in `blocked` what it can use, at most one."""
        more = (*(self.blocked or {}).values(), *(self.lowered or {}).values())
        return (self.training, self.inference, *more)

    def blobs(self) -> tuple[BlobRef, ...]:
        """What must be there for it, graphs first."""
        more = [blob for blob in (self.mask, self.moved) if blob is not None]
        return (*self.graphs, self.weights, *more)

    def shorter(self, has: Callable[[str], bool]) -> tuple[BlobRef, ...]:
        """What must be pulled for it where weights that are lacking can be decoded instead.

        Args:
            has: Whether a blob is there, by its digest.
        """
        if self.coded is None or has(self.weights.sha256) or not (self.held is None or has(self.held)):
            return self.blobs()
        return tuple(self.coded if r == self.weights else r for r in self.blobs())


@dataclass(frozen=True)
class Accepted(CheckedMessage):
    """An update is durable at the server; the device may forget it.

    Attributes:
        job: The job.
        round: The round.
        attempt: The attempt.
        weights: sha256 of the update's weights.
    """

    job: str
    round: int
    attempt: int
    weights: str

    kind: ClassVar[str] = "accepted"
    checks: ClassVar[Mapping[str, Check]] = {**_ASSIGNMENT, "weights": check.digest}


@dataclass(frozen=True)
class Cancelled(CheckedMessage):
    """A device's part in a round is void; what it does for it is in vain.

    Attributes:
        job: The job.
        round: The round.
        attempt: The attempt; a later one is not meant.
        reason: Why, in words.
    """

    job: str
    round: int
    attempt: int
    reason: str

    kind: ClassVar[str] = "cancelled"
    checks: ClassVar[Mapping[str, Check]] = {**_ASSIGNMENT, "reason": _LONG}


@dataclass(frozen=True)
class Finished(CheckedMessage):
    """A job has ended.

    Attributes:
        job: The job.
    """

    job: str

    kind: ClassVar[str] = "finished"
    checks: ClassVar[Mapping[str, Check]] = {"job": check.job}


@dataclass(frozen=True)
class Want(CheckedMessage):
    """Please send pieces of a blob.

    Attributes:
        sha256: The blob.
        part: `data` for its leaves, `leaves` for 32 KiB pieces of its leaf table.
        first: First leaf or piece.
        count: How many.
        shared: True where a device listens to the topic that all who pull this blob share, so that the answer may come
            there; None where it doesn't.
        most: How many leaves or pieces a chunk may hold; None where the sender's own limit will do.
        number: Drawn anew for every want: one that comes with the same number again is the same, doubled on its way.
        to: Tag of the server's receiver that the chunks are for; None for the server itself. Only for boards whose
            births name the ability `TO`.
    """

    sha256: str
    part: str
    first: int
    count: int
    shared: bool | None = None
    most: int | None = None
    number: int | None = field(default=None, compare=False)
    to: str | None = None

    kind: ClassVar[str] = "want"
    newer: ClassVar[frozenset[str]] = frozenset({"shared", "most", "number", "to"})
    checks: ClassVar[Mapping[str, Check]] = {
        "sha256": check.digest,
        "part": check.choice(*PARTS),
        "first": check.whole(0, 2**31 - 1),
        "count": check.whole(1, MAX_WANT),
        "shared": check.optional(check.true),
        "most": check.optional(check.whole(1, MAX_WANT)),
        "number": check.optional(check.whole(0, 2**31 - 1)),
        "to": check.optional(check.tag),
    }


@dataclass(frozen=True)
class Gone(CheckedMessage):
    """The wanted blob is not here (any more).

    Attributes:
        sha256: The blob.
    """

    sha256: str

    kind: ClassVar[str] = "gone"
    checks: ClassVar[Mapping[str, Check]] = {"sha256": check.digest}


FromDevice = Birth | Death | Alive | Progress | Refusal | Update | Want | Gone | JoinRequest | ReleaseReport
FromServer = Hello | Offer | Accepted | Cancelled | Finished | Want | Gone | JoinAnswer | ReleaseFromServer
Message = FromDevice | FromServer

_TYPES: dict[str, type[Any]] = {c.kind: c for c in get_args(Message)}


def parse(raw: bytes) -> Message:
    """Read and check a message.

    Raises:
        ProtocolError: Too long, not JSON, of an unknown version or type, or a field is missing or wrong; the error
            names the field.
    """
    if len(raw) > MAX_MESSAGE:
        raise ProtocolError("message is too long", expected=f"at most {MAX_MESSAGE} bytes", got=len(raw))
    try:
        body = json.loads(raw, parse_constant=_constant)
    except RecursionError as error:
        raise ProtocolError("message is nested too deeply") from error
    except ValueError as error:
        raise ProtocolError("message is not JSON", got=shown(bytes(raw))) from error
    if not isinstance(body, dict):
        raise ProtocolError("message", expected="a JSON object", got=shown(body))
    version = body.get("v")
    if version != VERSION or isinstance(version, bool):
        raise UnknownMessageError(
            "version of a message",
            expected=VERSION,
            got=shown(version),
            hint="Run the same major version of fedprune on server and devices.",
        )
    kind = body.get("type")
    cls = _TYPES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise UnknownMessageError("type of a message", expected=", ".join(_TYPES), got=shown(kind))
    values = {}
    for f in fields(cls):
        if f.name in body:
            values[f.name] = body[f.name]
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ProtocolError(f"{kind}: field {f.name}", expected="a value", got="nothing")
    message: Message = cls(**values)
    return message


def _constant(word: str) -> float:
    raise ValueError(word)
