"""Messages between devices and server: small JSON objects with a type and strictly checked fields.

Messages are checked when they are written as well as when they are read, so that whatever was sent can be received.
Unknown keys are ignored; an unknown type is an error. Any message may arrive twice, late or never.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Annotated, TypedDict, get_args

import msgspec
from msgspec.structs import force_setattr

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core import records
from fedprune.core.errors import ProtocolError, UnknownMessageError, value_text
from fedprune.core.records import Digest, check_free_form, hex_text, item_count, number_range, printable_text, word_of
from fedprune.wire import fleet_messages
from fedprune.wire.fields import (
    MAX_MESSAGE_BYTES,
    Attempt,
    CheckedMessage,
    Count,
    Device,
    FreeObject,
    Job,
    MessageHeader,
    Metrics,
    Name,
    Round,
    UploadAddress,
    WebAddress,
    base64_text,
)
from fedprune.wire.urls import BlobUrl, UploadUrl

_MAX_PRECISIONS = 8
_MAX_INCREMENTS = 64


class Offer(CheckedMessage, frozen=True, tag="offer"):
    """An offer of a round to a device."""

    job: Job
    round: Round
    attempt: Count
    """Number of this offer to this device in this round."""
    seed: Count
    """The job's seed."""
    architecture: Digest
    """Digest of the architecture."""
    selection: Digest
    """Digest of the device's selection."""
    widths: Annotated[tuple[Annotated[int, number_range(1, 2**24)], ...], item_count(65536)]
    """Kept channels per group."""
    classes: Annotated[int, number_range(1, 2**24)]
    """Number of classes."""
    weights: BlobRef
    """The submodel's weights."""
    training: BlobRef
    """The training graph, for all widths."""
    inference: BlobRef
    """The inference graph, whose external data the weights are."""
    recipe: FreeObject
    """The recipe, as `fedprune.model.recipe.Recipe.to_offer` gives it."""
    mask: BlobRef | None = None
    """Which elements are active (`element_mask.mask_to_bits`): of masked tensors `weights` has the active values alone,
    and so has the update. None where all are."""
    ranking: Digest | None = None
    """Digest of the order of channels that the selection is the beginning of. Selections of other widths with the same
    digest are nested. None where nothing is known of it."""
    lowered: Annotated[dict[Name, BlobRef], item_count(_MAX_PRECISIONS)] | None = None
    """By precision, the graphs with which the board can serve at it (`fedprune.runtime.precision.pack_graphs`). None
    where there are none."""
    codec: Annotated[str, printable_text(256)] | None = None
    """How the update is to be encoded (`fedprune.updates.Codec`); None for a plain tensor file."""
    weights_codec: Annotated[str, printable_text(256)] | None = None
    """How weights come where they come encoded; a board keeps those that it has until the next offer."""
    coded: BlobRef | None = None
    """The weights, encoded by `weights_codec` as the difference to the blob `held`: a board that has that blob may pull
    these bytes in place of `weights`."""
    held: Digest | None = None
    """sha256 of the blob that `coded` is the difference to; None for the difference to 0."""
    increments: Annotated[tuple[BlobRef, ...], item_count(_MAX_INCREMENTS)] = ()
    """The blobs that make `weights` and `mask` (`fedprune.updates.increments`), which other boards' offers name, too: a
    board may pull them in place of both. Empty where there are none."""
    moved: BlobRef | None = None
    """Where the channels are that a device was sent last (`fedprune.updates.relocation`); None where they are as they
    were, or where that is unknown."""
    moved_from: Digest | None = None
    """Digest of the selection that those were sent in."""
    secure: FreeObject | None = None
    """How the update becomes the vector that the board masks: `tensors`
    (`fedprune.secure_aggregation.vector_form.VectorForm`) and its size. None where updates aren't masked; the recipe
    says so, too, so that a board that doesn't know of masks refuses."""
    base: BlobRef | None = None
    """Frozen weights in low precision, which both graphs read and no round changes. None where there are none."""
    blobs_at: WebAddress | None = None
    """A web server that has these blobs, too (`fedprune.wire.urls`); None for MQTT alone."""
    drift: BlobRef | None = None
    """What is added to gradients, a tensor file by names of trained tensors, packed by the mask. None for nothing."""

    def check(self) -> None:
        check_free_form(self.recipe, "offer: recipe", ProtocolError)
        if self.secure is not None:
            check_free_form(self.secure, "offer: secure", ProtocolError)
        if self.blobs_at is not None:
            # Normalised once, so that equal addresses are equal texts.
            force_setattr(self, "blobs_at", str(BlobUrl.parse(self.blobs_at, "offer: blobs_at")))

    @property
    def graphs(self) -> tuple[BlobRef, ...]:
        base = () if self.base is None else (self.base,)
        return (self.training, self.inference, *(self.lowered or {}).values(), *base)

    def blobs(self) -> tuple[BlobRef, ...]:
        """The blobs that it needs, graphs first."""
        optional_blobs = [blob for blob in (self.mask, self.drift, self.moved) if blob is not None]
        return (*self.graphs, self.weights, *optional_blobs)

    @property
    def encoded(self) -> tuple[BlobRef, ...]:
        """The blobs that may be pulled in place of others."""
        return self.increments if self.coded is None else (self.coded,)

    def blobs_to_pull(self, has: Callable[[str], bool]) -> tuple[BlobRef, ...]:
        """The blobs to pull, with the encoded weights in place of plain ones if these are missing and can be decoded.

        `has` tells whether a blob of a digest is here.
        """
        if not self.encoded or has(self.weights.sha256) or not (self.held is None or has(self.held)):
            return self.blobs()
        replaced = (self.weights,) if self.coded is not None else (self.weights, self.mask)
        return (*(r for r in self.blobs() if r not in replaced), *self.encoded)


# Leaves or pieces of one `BlobRequest`: 32 MiB, far more than a window.
MAX_REQUEST = 1024

_MAX_CODECS = 64
_MAX_ABILITIES = 64

# Ability of a board: it uploads an update to the address that the server names.
PUT_ABILITY = "put"

PHASES = ("download", "train", "evaluate")
BLOB_PARTS = ("data", "leaves")

ShortText = Annotated[str, printable_text(256)]
Reason = Annotated[str, printable_text(4096)]
RequestNumber = Annotated[int, number_range(0, 2**31 - 1)]


class Assignment(TypedDict):
    """The job, round and attempt that a device works on."""

    job: Job
    round: Count
    attempt: Count


MAX_TROUBLE_LENGTH = 500
# Of a birth: warnings, and characters of each. Ten thousand boards may announce themselves at once.
MAX_WARNINGS, MAX_WARNING_TEXT = 8, 300


class BoardWarning(TypedDict):
    """A warning or error of a board's log."""

    at: Count
    """Time of its last line in seconds since 1970, by the board's clock."""
    text: Annotated[str, printable_text(MAX_WARNING_TEXT)]
    """What it says, without private data of the board's owner."""


class Birth(CheckedMessage, frozen=True, tag="birth"):
    """A device is online."""

    device: Device
    session: Count
    """Number of this connection, larger than that of every earlier one."""
    profile: ShortText
    """Name of the hardware profile."""
    samples: Count
    """Local training samples."""
    software: ShortText
    """Software on the device, with versions."""
    probe: FreeObject | None = None
    """The board's measurements of itself."""
    held: Assignment | None = None
    """The job, round and attempt that it works on or whose update it still has to deliver."""
    codecs: Annotated[tuple[Name, ...], item_count(_MAX_CODECS)] = ()
    """Names of the codecs in which it can send updates (`fedprune.updates`)."""
    answer_s: Annotated[float, number_range(0.0, 3600.0)] | None = None
    """Its estimate of response times on its link, in seconds."""
    abilities: Annotated[tuple[Name, ...], item_count(_MAX_ABILITIES)] = ()
    """Optional parts of the protocol that it supports, such as `put`."""
    trouble: Annotated[str, printable_text(MAX_TROUBLE_LENGTH)] | None = None
    """Why its program can't start, and ends after this message; None where it works."""
    warnings: Annotated[tuple[BoardWarning, ...], item_count(MAX_WARNINGS)] = ()
    """The last warnings of this run's log, the latest last."""

    def check(self) -> None:
        if self.probe is not None:
            check_free_form(self.probe, "birth: probe", ProtocolError)


class Death(CheckedMessage, frozen=True, tag="death"):
    """A device is offline: sent by the broker as its will, or by the device itself as it disconnects."""

    device: Device
    session: Count
    """The connection that ended; a death of an older connection than the last birth's is ignored."""


class Alive(CheckedMessage, frozen=True, tag="alive"):
    """A device is still online, after minutes without another message."""

    device: Device
    session: Count
    """Its connection."""


class RoundProgress(CheckedMessage, frozen=True, tag="progress"):
    """Progress of a device in a round."""

    device: Device
    job: Job
    round: Round
    attempt: Attempt
    phase: Annotated[str, word_of(PHASES)]
    """The current phase."""
    done: Count
    """Units done in this phase."""
    total: Count
    """Units of this phase."""
    temperature_c: Annotated[float, number_range(-100.0, 300.0)] | None = None
    """The board's temperature, if it can be read."""


class Refusal(CheckedMessage, frozen=True, tag="refusal"):
    """A device can't or won't accept an offer."""

    device: Device
    job: Job
    round: Round
    attempt: Attempt
    reason: Reason
    """The reason, for people."""
    exit_code: Annotated[int, number_range(0, 255)]
    """Exit code of the underlying error (`fedprune.core.errors.ExitCode`)."""


class UpdateAnnouncement(CheckedMessage, frozen=True, tag="update"):
    """A device has trained; the server pulls the weights."""

    device: Device
    job: Job
    round: Round
    attempt: Attempt
    base: Digest
    """sha256 of the weights that training started from, which tells updates of an earlier job of the same name
    apart."""
    weights: BlobRef
    """The trained weights."""
    samples: Count
    """Local samples that they were trained on."""
    steps: Count
    """Optimiser steps taken."""
    metrics: Metrics = msgspec.field(default_factory=dict)
    """Measurements by name; finite numbers, at most 64."""


class TrainingDone(CheckedMessage, frozen=True, tag="trained"):
    """A device has trained, and waits to mask its update."""

    device: Device
    job: Job
    round: Round
    attempt: Attempt
    base: Digest
    """As of `UpdateAnnouncement`."""
    samples: Count
    """Local samples that it was trained on."""
    steps: Count
    """Optimiser steps taken."""
    metrics: Metrics = msgspec.field(default_factory=dict)
    """As of `UpdateAnnouncement`."""


# Steps of a secure sum in their order; between delivery and survivors the device sends its masked vector as an
# `UpdateAnnouncement`.
SECURE_STEPS = ("session", "keys", "roster", "shares", "delivery", "survivors", "unmasking")

MAX_STEP_BYTES = 128 * 1024


class SecureStep(CheckedMessage, frozen=True, tag="secure"):
    """A step of a secure sum (`fedprune.secure_aggregation`). `keys`, `shares` and `unmasking` are a device's, the
    others the server's."""

    job: Job
    round: Round
    attempt: Attempt
    sum: Annotated[str, hex_text(32)]
    """Random number of the sum: steps of an earlier one are ignored."""
    step: Annotated[str, word_of(SECURE_STEPS)]
    """The step."""
    payload: Annotated[str, base64_text(MAX_STEP_BYTES)]
    """The content of the step: `session`, the settings as JSON; `keys`, the identity key and the advertisement;
    `roster`, the number of neighbours in two bytes, their identity keys and the roster; otherwise a message of
    `fedprune.secure_aggregation.messages`."""

    @classmethod
    def of(cls, job: str, round_: int, attempt: int, sum_: str, step: str, content: bytes) -> SecureStep:
        return cls(job, round_, attempt, sum_, step, base64.b64encode(content).decode())

    @property
    def content(self) -> bytes:
        return base64.b64decode(self.payload)


class Hello(CheckedMessage, frozen=True, tag="hello"):
    """The server is online: devices answer with a birth and repeat an update that is not yet accepted."""

    time: Count | None = None
    """The server's time in seconds since 1970, by which boards with a wrong clock recognise expired certificates."""


class Accepted(CheckedMessage, frozen=True, tag="accepted"):
    """An update is durable at the server; the device may delete it."""

    job: Job
    round: Round
    attempt: Attempt
    weights: Digest
    """sha256 of the update's weights."""


class Cancelled(CheckedMessage, frozen=True, tag="cancelled"):
    """A device's part in a round is cancelled."""

    job: Job
    round: Round
    attempt: Attempt
    """The cancelled attempt; later ones are not affected."""
    reason: Reason
    """The reason, for people."""


class Finished(CheckedMessage, frozen=True, tag="finished"):
    """A job has ended."""

    job: Job


class BlobRequest(CheckedMessage, frozen=True, tag="want"):
    """A request for leaves of a blob, or for pieces of its leaf table."""

    sha256: Digest
    """The blob."""
    part: Annotated[str, word_of(BLOB_PARTS)]
    """`data` for its leaves, `leaves` for 32 KiB pieces of its leaf table."""
    first: Annotated[int, number_range(0, 2**31 - 1)]
    """First leaf or piece."""
    count: Annotated[int, number_range(1, MAX_REQUEST)]
    """How many."""
    most: Annotated[int, number_range(1, MAX_REQUEST)] | None = None
    """Leaves or pieces that a chunk may hold; None for the sender's own limit."""
    number: RequestNumber | None = None
    """Random number of the request: another delivery with the same number is a duplicate."""


class BlobNotFound(CheckedMessage, frozen=True, tag="gone"):
    """The requested blob is not, or no longer, available."""

    sha256: Digest
    """The blob."""


class UploadRequest(CheckedMessage, frozen=True, tag="upload"):
    """A request to PUT an update's weights to a web address. Only for boards whose births name the ability `put`."""

    sha256: Digest
    """The weights."""
    url: UploadAddress
    """Where to, for this upload alone."""
    number: RequestNumber | None = None
    """As of `BlobRequest`."""

    def check(self) -> None:
        UploadUrl.parse(self.url, "upload: url")

    def __repr__(self) -> str:
        return f"UploadRequest({self.sha256}, {UploadUrl.parse(self.url)})"


class UploadResult(CheckedMessage, frozen=True, tag="uploaded"):
    """An upload has ended. The server requests in chunks what could not be uploaded."""

    sha256: Digest
    """The weights."""
    reason: Annotated[str, printable_text(400)] | None = None
    """Why it failed, for people; None if the web server has taken it."""


FromDevice = (
    Birth
    | Death
    | Alive
    | RoundProgress
    | Refusal
    | UpdateAnnouncement
    | TrainingDone
    | SecureStep
    | BlobRequest
    | BlobNotFound
    | UploadResult
    | fleet_messages.JoinRequest
    | fleet_messages.ReleaseReport
    | fleet_messages.CrashReport
)
FromServer = (
    Hello
    | Offer
    | Accepted
    | Cancelled
    | Finished
    | SecureStep
    | BlobRequest
    | BlobNotFound
    | UploadRequest
    | fleet_messages.JoinAnswer
    | fleet_messages.ReleaseFromServer
    | fleet_messages.CrashStored
    | fleet_messages.Reconnect
)
BetweenServers = fleet_messages.ServerQuery | fleet_messages.ServerPresence
Message = FromDevice | FromServer | BetweenServers

_TYPES: dict[str, type[Message]] = {c.kind: c for c in get_args(Message)}


def parse_message(raw: bytes) -> Message:
    """Read and check a message; unknown keys are ignored. Raises `UnknownMessageError` for an unknown type, and
    `ProtocolError` if it is too long or no JSON, or a field is missing or wrong; the error names the field."""
    if len(raw) > MAX_MESSAGE_BYTES:
        raise ProtocolError("message is too long", expected=f"at most {MAX_MESSAGE_BYTES} bytes", got=len(raw))
    # Decoded twice: the type decides the class, and messages are small.
    kind = records.decode_record(MessageHeader, raw, "message", ProtocolError).type
    cls = _TYPES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise UnknownMessageError(
            "type of a message",
            expected=", ".join(_TYPES),
            got=value_text(kind),
            hint="Run the same version of fedprune on server and devices.",
        )
    return records.decode_record(cls, raw, cls.kind, ProtocolError)
