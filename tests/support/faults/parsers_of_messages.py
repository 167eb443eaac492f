"""Parsers of what comes over the network: messages, chunks, envelopes, requests to join, and what they hold."""

import base64
import io
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedprune.blobs.blob_ref import LEAF_BYTES, BlobRef, leaf_table
from fedprune.blobs.blob_store import BlobStore
from fedprune.blobs.tensor_reader import read_tensors
from fedprune.core import tensorfile
from fedprune.core.tensorfile import float32_array
from fedprune.model.element_mask import mask_from_bits, mask_to_bits, pack_active
from fedprune.model.recipe import Recipe
from fedprune.planning.latency_model import typical_table
from fedprune.releases.release import Release, ReleaseFile, sign_manifest, verified_release
from fedprune.runtime.precision import pack_graphs, unpack_graphs
from fedprune.runtime.precision_files import INT8, precision_graphs
from fedprune.secure_aggregation.keys import ADVERTISEMENT_BYTES, SEALED_BYTES, SHARE_BYTES, Advertisement
from fedprune.secure_aggregation.masks import Vector
from fedprune.secure_aggregation.messages import (
    decode_delivery,
    decode_roster,
    decode_unmasking,
    encode_delivery,
    encode_roster,
)
from fedprune.secure_aggregation.session import SecureSumSession
from fedprune.security.authority import Authority
from fedprune.security.certificates import (
    certificate_name,
    key_digest,
    make_tls_key,
    pem_of,
    pin_of,
    read_certificate,
    request_key,
)
from fedprune.security.certificates import make_request as make_csr
from fedprune.security.join_claim import JoinClaim
from fedprune.security.joining import (
    check_answer,
    check_request,
    make_join_request,
    request_digest,
    signed_answer_bytes,
)
from fedprune.security.keys import VerifyingKey
from fedprune.security.signed_channel import Opener
from fedprune.security.signed_envelope import SignedEnvelope, seal
from fedprune.updates import Codec, decode, encode
from fedprune.wire import messages as m
from fedprune.wire.chunk import Chunk
from fedprune.wire.fleet_messages import (
    APPROVED,
    CrashStored,
    JoinAnswer,
    JoinRequest,
    Reconnect,
    ReleaseOffer,
    ReleaseReport,
    ReleaseWithdrawn,
)
from fedprune.wire.messages import Offer
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import Pull
from fedprune.wire.urls import BlobUrl, BrokerUrl, UploadUrl
from fedprune_device.training.received_weights import unpack_weights as offered
from fedprune_server.web.state.order_queue import read_order
from support.fakes.messages import CRASH
from support.fakes.runtime_releases import KEY, PUBLIC
from support.fakes.tiny_job import ARCHITECTURE
from support.faults.parser_target import Target, as_text, scratch

TOPIC = Topics("lab").up("a")
BLOB = np.random.default_rng(0).bytes(3 * LEAF_BYTES + 100)
REF = BlobRef.of(BLOB)
SMALL = BlobRef.of(b"small")
ZERO = "0" * 64

PROBE = {
    "cores": 4,
    "memory_total": 2**33,
    "memory_available": 2**32,
    "seconds": 1.0,
    "latency": typical_table(1e9).to_dict(),
}


@cache
def wire_targets() -> tuple[Target, ...]:
    """All of them."""
    messages = tuple(message.to_bytes() for message in _messages())
    chunks = (
        Chunk(REF.sha256, "data", 0, BLOB[:LEAF_BYTES]).to_bytes(),
        Chunk(REF.sha256, "data", 2, BLOB[2 * LEAF_BYTES :]).to_bytes(),
        Chunk(SMALL.sha256, "leaves", 1, b"x").to_bytes(),
    )
    return (
        Target("wire.message", m.parse_message, messages, text=True, share=6),
        Target("wire.order", as_text(_order), _orders(), text=True, share=2),
        Target("wire.chunk", lambda raw: list(Chunk.parse(raw).leaves()), chunks, factor=8, share=4),
        Target("wire.pull", _pull_chunk, chunks, factor=16, constant=4 * 2**20, share=0.2),
        Target("wire.topic", as_text(_topic), _topics(), text=True, share=2),
        Target("wire.broker address", as_text(BrokerUrl.parse), _urls(), text=True, share=2),
        Target("wire.blobs' address", as_text(BlobUrl.parse), _web_urls(), text=True, share=2),
        Target("wire.upload's address", as_text(UploadUrl.parse), _upload_urls(), text=True, share=2),
        Target("wire.array", lambda raw: float32_array(raw, (2, 3), "it"), _arrays(), constant=2**20),
        *_signed(messages),
        *_joining(),
        *_blobs(),
        *_secure_sums(),
    )


def _secure_sums() -> tuple[Target, ...]:
    """Messages of a secure sum, to a board with four neighbours and to the server."""
    session, names = SecureSumSession(b"toy", 4, 3, 2, 1), ("a", "b", "c", "d")
    keys = {n: Advertisement.from_bytes(bytes([i]) * ADVERTISEMENT_BYTES) for i, n in enumerate(names)}
    sealed = {n: bytes([i]) * SEALED_BYTES for i, n in enumerate(names)}
    shares = bytes(4 * SHARE_BYTES)
    deliveries = (encode_delivery(names, sealed), encode_delivery(names, {n: sealed[n] for n in "abd"}))
    return (
        Target("wire.secure sum: roster", lambda raw: decode_roster(raw, session), (encode_roster(keys),)),
        Target("wire.secure sum: delivery", lambda raw: decode_delivery(raw, names, session), deliveries),
        Target("wire.secure sum: vector", lambda raw: Vector.from_bytes(raw, session), (bytes(16),), share=0.2),
        Target("wire.secure sum: shares", lambda raw: decode_unmasking(raw, names), (shares,)),
    )


def _arrays() -> tuple[bytes, ...]:
    """An array in NumPy's format, as Flower sends it, in either order and with either end first."""
    out = []
    for value in (np.zeros((2, 3), "<f4"), np.asfortranarray(np.ones((2, 3), ">f4"))):
        file = io.BytesIO()
        np.save(file, value)
        out.append(file.getvalue())
    return tuple(out)


def _messages() -> list[Any]:
    place = {"job": "toy", "round": 3, "attempt": 1}
    offer = Offer(
        **place, seed=1, architecture=ZERO, selection=ZERO, widths=(4, 8), classes=3, weights=REF, training=SMALL,
        inference=SMALL, recipe=Recipe().to_offer(), mask=SMALL, drift=SMALL, ranking=ZERO, lowered={"int8": SMALL},
        blobs_at="https://models.example:8443/lab",
    )  # fmt: skip
    return [
        m.Birth("a", 1, "raspberry-pi-5", 10, "fedprune 1", PROBE, {**place}, abilities=("put",)),
        m.Death("a", 1),
        m.Alive("a", 1),
        m.RoundProgress("a", **place, phase="train", done=1, total=2),
        m.Refusal("a", **place, reason="no room", exit_code=30),
        m.UpdateAnnouncement(
            "a", **place, base=ZERO, weights=REF, samples=10, steps=5, metrics={"accuracy_after": 0.5, "loss": 1.0}
        ),
        m.TrainingDone("a", **place, base=ZERO, samples=10, steps=5, metrics={"loss": 1.0}),
        m.SecureStep.of("toy", 3, 1, ZERO[:32], "shares", bytes(96)),
        m.Hello(1_700_000_000),
        offer,
        m.Accepted(**place, weights=ZERO),
        m.Cancelled(**place, reason="the round is over"),
        m.Finished("toy"),
        m.BlobRequest(ZERO, "data", 0, 1024),
        m.BlobNotFound(ZERO),
        m.UploadRequest(ZERO, "https://models.example:8443/ab/cd?x=%2F", 7),
        m.UploadResult(ZERO, "no route"),
        ReleaseOffer(1, _release().to_bytes().decode(), "0" * 128, (ZERO,), 3, 300.0),
        ReleaseReport("a", 1, "downloading", "", 1, 2),
        ReleaseWithdrawn(1, "a mistake"),
        CRASH,
        CrashStored(7),
        Reconnect(50.0, 3600.0),
    ]


def _orders() -> tuple[bytes, ...]:
    return (
        b'{"job": "toy"}',
        b'{"release": "r-1", "groups": [0.1, 1.0], "devices": ["a", "b"], "reason": "a trial"}',
        b'{"device": "a", "key": "ab12-cd34"}',
    )


def _order(text: str) -> object:
    return read_order({"number": 1, "operator": "ann", "kind": "rollout_start", "what": text, "until": 1e9})


def _release() -> Release:
    files = (ReleaseFile("app-1-py3-none-any.whl", ZERO, 1000), ReleaseFile("b-1.whl", "1" * 64, 10))
    return Release(
        1, "0.1", "cp311", "aarch64", "app:main", 10**6, files, ZERO, created="2026-01-01", system=("numpy",)
    )


def _topics() -> tuple[bytes, ...]:
    site = Topics("lab")
    return tuple(
        t.encode() for t in (site.up("a"), site.up_blob("b", "toy"), site.broadcast(), site.join_request("0" * 32))
    )


def _topic(text: str) -> object:
    site = Topics("lab")
    return site.parse_join(text) if text.endswith("/join") else site.parse(text)


def _urls() -> tuple[bytes, ...]:
    return b"mqtts://user:pass%20word@broker.example:8883", b"mqtt://127.0.0.1", b"mqtts://[::1]:1883/"


def _web_urls() -> tuple[bytes, ...]:
    return b"https://models.example:8443/a-lab/~b/", b"http://127.0.0.1:8080", b"https://[2001:db8::1]"


def _upload_urls() -> tuple[bytes, ...]:
    return b"https://models.example:8443/a%20b/c.d?X-Amz-Signature=0%2F1&b=c", b"http://127.0.0.1:8080/ab/cd"


def _pull_chunk(raw: bytes) -> object:
    """A chunk that comes in the middle of a transfer of which one leaf is here."""
    pull = Pull(REF, BlobStore(scratch() / "pull", durable=False).partial(REF))
    pull.start(0.0)
    pull.on_chunk(Chunk(REF.sha256, "leaves", 0, leaf_table(BLOB)), 0.0)
    wants = pull.on_chunk(Chunk.parse(raw), 1.0)
    if pull.outstanding > 32 or len(wants) > 32:
        raise ValueError(f"{pull.outstanding} leaves are asked for by {len(wants)} wants")
    return wants


def _signed(messages: tuple[bytes, ...]) -> tuple[Target, ...]:
    small = [raw for raw in messages if len(raw) < 4000]
    envelopes = tuple(seal(KEY, TOPIC, 1000 + i, i, raw) for i, raw in enumerate(small))
    manifest = _release().to_bytes()
    return (
        Target("trust.envelope", SignedEnvelope.parse, envelopes, share=2),
        Target("trust.signed message", lambda raw: _opener().open(TOPIC, raw), envelopes, share=0.5),
        # What is inside is damaged before it is sealed: a member of the fleet says it.
        Target(
            "trust.message of a member",
            lambda raw: m.parse_message(_opener().open(TOPIC, raw)),
            small,
            text=True,
            share=0.5,
            frame=lambda body: seal(KEY, TOPIC, 1, 1, body[: 256 * 1024]),
        ),
        Target("release.manifest", Release.from_bytes, (manifest,), text=True, share=2),
        Target(
            "release.signed manifest",
            lambda raw: verified_release(raw[64:], raw[:64], PUBLIC),
            (manifest,),
            text=True,
            share=0.5,
            frame=lambda body: sign_manifest(body, KEY) + body,
        ),
        Target("trust.key", as_text(VerifyingKey.from_hex), (PUBLIC.hex.encode(),), text=True),
        Target(
            "trust.claim",
            as_text(JoinClaim.parse),
            (JoinClaim(b"i" * 5, b"s" * 15, b"p" * 12).text.encode(),),
            text=True,
        ),
    )


def _opener() -> Opener:
    return Opener(PUBLIC, {}, lambda stream, epoch: None)


def _joining() -> tuple[Target, ...]:
    authority = Authority.make(scratch() / "authority", "lab")
    csr = make_csr(make_tls_key(), "pi-1")
    request = make_join_request("lab", "pi-1", KEY, csr, JoinClaim.make(authority.pin))
    certificate = authority.issue_device("lab", "pi-1", csr)
    body = {
        "request": request_digest(request), "status": APPROVED, "reason": "", "time": authority.now(),
        "authority": authority.pem, "certificate": certificate, "server_key": PUBLIC.hex,
    }  # fmt: skip
    answer = JoinAnswer(**body, signature=authority.sign(signed_answer_bytes(**body)).hex())

    def parse_request(raw: bytes) -> object:
        message = m.parse_message(raw)
        return check_request(message) if isinstance(message, JoinRequest) else message

    def parse_answer(raw: bytes) -> object:
        message = m.parse_message(raw)
        return check_answer(message, request, authority.pin) if isinstance(message, JoinAnswer) else message

    def pem(what: str) -> Callable[[bytes], bytes]:
        return lambda der: f"-----BEGIN {what}-----\n{base64.encodebytes(der).decode()}-----END {what}-----\n".encode()

    def inspect_certificate(raw: bytes) -> object:
        """What is looked at in a certificate, before and after it is believed."""
        x509_certificate = read_certificate(raw, "it")
        return (
            pin_of(x509_certificate),
            certificate_name(x509_certificate),
            key_digest(x509_certificate.public_key()),
            x509_certificate.not_valid_after_utc,
            pem_of(x509_certificate),
        )

    content = x509.load_pem_x509_certificate(certificate.encode()).public_bytes(serialization.Encoding.DER)
    asks = x509.load_pem_x509_csr(csr.encode()).public_bytes(serialization.Encoding.DER)
    return (
        Target("join.certificate's content", inspect_certificate, (content,), share=2, frame=pem("CERTIFICATE")),
        Target(
            "join.content of a certificate request",
            as_text(lambda text: request_key(text, "pi-1")),
            (asks,),
            frame=pem("CERTIFICATE REQUEST"),
        ),
        Target("join.request", parse_request, (request.to_bytes(),), text=True, share=0.5),
        Target("join.answer", parse_answer, (answer.to_bytes(),), text=True, share=0.5),
        Target(
            "join.certificate", lambda raw: read_certificate(raw, "it"), (authority.pem.encode(), certificate.encode())
        ),
        Target("join.certificate request", as_text(lambda text: request_key(text, "pi-1")), (csr.encode(),), share=0.5),
    )


def _blobs() -> tuple[Target, ...]:
    """Blobs that are whole, as their digests say, and still anything at all."""
    tensors = {"w": np.ones((8, 4), np.float32), "head": np.ones((3, 8), np.float32)}
    mask = {"w": np.arange(32).reshape(8, 4) % 3 == 0}
    bits = tensorfile.encode(mask_to_bits(mask))
    weights = tensorfile.encode(tensors)
    graphs = pack_graphs(dict.fromkeys(precision_graphs(INT8), b"graph"))
    shapes = {n: v.shape for n, v in tensors.items()}
    masked = tensorfile.encode(pack_active(mask, tensors))

    def header(text: bytes) -> bytes:
        """A header that says how long it is, before sound data."""
        return len(text).to_bytes(8, "little") + text + weights[-(8 * 4 + 3 * 8) * 4 :]

    (length,) = (int.from_bytes(weights[:8], "little"),)
    table = weights[8 : 8 + length].rstrip()
    recipe = Recipe.from_dict({"mask": "hard"})
    return (
        Target("blob.tensors", tensorfile.decode, (weights, bits, graphs), share=4),
        Target("blob.tensors by header", tensorfile.decode, (table,), text=True, share=4, frame=header),
        Target("blob.some tensors", _some, (weights, bits), share=0.2),
        Target("blob.lowered graphs", lambda raw: unpack_graphs(raw, INT8), (graphs,)),
        Target("blob.mask", lambda raw: mask_from_bits(tensorfile.decode(raw), shapes), (bits,)),
        Target("blob.weights of an offer", lambda raw: _check_offer(raw, recipe), (weights, masked)),
        *map(_codec_target, ("int8", "int4", "top-k:0.25")),
    )


def _codec_target(text: str) -> Target:
    """An update in a codec."""
    codec = Codec.parse(text)
    assert codec is not None
    sent = {"w": np.zeros((30, 10), np.float32), "b": np.zeros(7, np.float32), "mean": np.ones(7, np.float32)}
    trained = {n: v + np.linspace(-1, 1, v.size, dtype=np.float32).reshape(v.shape) for n, v in sent.items()}
    seed, _ = encode(codec, trained, sent, {"w", "b"})
    return Target(f"blob.update in {text}", lambda raw: decode(codec, raw, sent, {"w", "b"}), (seed,), share=0.5)


def _some(raw: bytes) -> object:
    store = BlobStore(scratch() / "blobs", durable=False)
    ref = store.put(raw)
    try:
        return read_tensors(store, ref, {"w"})
    finally:
        store.delete(ref.sha256)


def _check_offer(raw: bytes, recipe: Recipe) -> object:
    return offered(raw, None, recipe, None, ARCHITECTURE.sizes, ("w", "head"))
