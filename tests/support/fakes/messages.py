"""Messages of the protocol for tests: any valid one, and an example of each."""

from hypothesis import strategies as st

from fedprune.blobs.blob_ref import BlobRef
from fedprune.model.recipe import Recipe
from fedprune.wire.fleet_messages import (
    MAX_BOARD_AWAY_S,
    MAX_FRAMES,
    RELEASE_STATES,
    CrashReport,
    CrashStored,
    JoinAnswer,
    JoinRequest,
    Reconnect,
    ReleaseOffer,
    ReleaseReport,
    ReleaseWithdrawn,
    ServerPresence,
    ServerQuery,
)
from fedprune.wire.messages import (
    MAX_REQUEST,
    PHASES,
    SECURE_STEPS,
    Accepted,
    Alive,
    Birth,
    BlobNotFound,
    BlobRequest,
    Cancelled,
    Death,
    Finished,
    Hello,
    Message,
    Offer,
    Refusal,
    RoundProgress,
    SecureStep,
    TrainingDone,
    UpdateAnnouncement,
    UploadRequest,
    UploadResult,
)
from fedprune.wire.urls import BlobUrl, UploadUrl

UPLOAD_URLS = ("https://models.example:8443/x/y.0?X-Amz-Signature=a%2F1&b", "http://127.0.0.1:80/ab/cd")

names = st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True).filter(lambda n: n not in (".", "..", "all", "-"))
counts = st.integers(0, 2**63 - 1)
hexes = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
refs = st.builds(BlobRef, hexes, st.integers(0, 2**40), hexes)
texts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=50)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
objects = st.dictionaries(
    texts,
    st.recursive(
        scalars | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
    ),
    max_size=3,
)
held_task = st.none() | st.fixed_dictionaries({"job": names, "round": counts, "attempt": counts})
metrics = st.dictionaries(
    st.from_regex(r"[a-z_]{1,20}", fullmatch=True), st.floats(allow_nan=False, allow_infinity=False), max_size=5
)
frames = st.lists(
    st.fixed_dictionaries({"module": texts, "line": st.integers(0, 2**31 - 1), "function": texts}), max_size=MAX_FRAMES
).map(tuple)
reals = st.none() | st.floats(-1e12, 1e12)
messages = st.one_of(
    st.builds(
        Birth, names, counts, texts, counts, texts, st.none() | objects, held_task,
        codecs=st.lists(names, max_size=3).map(tuple), answer_s=st.none() | st.floats(0, 3600),
        abilities=st.lists(names, max_size=3).map(tuple),
    ),
    st.builds(Death, names, counts),
    st.builds(Alive, names, counts),
    st.builds(RoundProgress, names, names, counts, counts, st.sampled_from(PHASES), counts, counts),
    st.builds(Refusal, names, names, counts, counts, texts, st.integers(0, 255)),
    st.builds(UpdateAnnouncement, names, names, counts, counts, hexes, refs, counts, counts, metrics),
    st.builds(Hello, st.none() | st.integers(0, 2**32)),
    st.builds(
        Offer, names, counts, counts, counts, hexes, hexes, st.lists(st.integers(1, 4096), max_size=9).map(tuple),
        st.integers(1, 1000), refs, refs, refs, objects, st.none() | refs, st.none() | hexes,
        lowered=st.none() | st.dictionaries(names, refs, max_size=2),
        codec=st.none() | texts, coded=st.none() | refs, held=st.none() | hexes, moved_from=st.none() | hexes,
        blobs_at=st.sampled_from([None, "https://models.example:8443/fleet", "http://127.0.0.1:80"]).map(
            lambda at: None if at is None else str(BlobUrl.parse(at))
        ),
    ),
    st.builds(TrainingDone, names, names, counts, counts, hexes, counts, counts, metrics),
    st.builds(
        SecureStep.of, names, counts, counts, hexes.map(lambda h: h[:32]), st.sampled_from(SECURE_STEPS),
        st.binary(max_size=99),
    ),
    st.builds(Accepted, names, counts, counts, hexes),
    st.builds(Cancelled, names, counts, counts, texts),
    st.builds(Finished, names),
    st.builds(
        BlobRequest, hexes, st.sampled_from(["data", "leaves"]), st.integers(0, 2**31 - 1), st.integers(1, MAX_REQUEST),
        st.none() | st.integers(1, MAX_REQUEST), st.none() | st.integers(0, 2**31 - 1),
    ),
    st.builds(BlobNotFound, hexes),
    st.builds(
        UploadRequest, hexes, st.sampled_from(UPLOAD_URLS).map(lambda url: "{0}{0.query}".format(UploadUrl.parse(url))),
        st.none() | st.integers(0, 2**31 - 1),
    ),
    st.builds(UploadResult, hexes, st.none() | texts),
    st.builds(
        JoinRequest, names, names, hexes, texts, hexes.map(lambda h: h[:32]), st.none() | hexes.map(lambda h: h[:10]),
        st.none() | hexes, hexes.map(lambda h: 2 * h),
    ),
    st.builds(
        JoinAnswer, hexes, st.sampled_from(["approved", "waiting", "refused"]), texts, st.integers(0, 2**40), texts,
        st.none() | texts, st.none() | hexes, hexes,
    ),
    st.builds(
        ReleaseOffer, st.integers(0, 2**31 - 1), texts, hexes.map(lambda h: 2 * h),
        st.lists(hexes, min_size=1, max_size=5).map(tuple), st.integers(1, 100), st.floats(1, 3600),
    ),
    st.builds(ReleaseWithdrawn, st.integers(0, 2**31 - 1), texts),
    st.builds(
        CrashReport, names, counts, counts, texts, texts, frames, texts, texts, reals, reals, st.none() | counts,
        st.none() | counts,
    ),
    st.builds(Reconnect, st.floats(0, 3600), st.none() | st.floats(1, MAX_BOARD_AWAY_S)),
    st.builds(CrashStored, counts),
    st.builds(
        ReleaseReport, names, st.integers(0, 2**31 - 1), st.sampled_from(RELEASE_STATES), texts, counts, counts,
        st.none() | hexes,
    ),
    st.builds(
        ServerQuery, hexes.map(lambda h: h[:32]), hexes.map(lambda h: h[:32]), counts,
        st.none() | hexes.map(lambda h: h[:32]),
    ),
    st.builds(
        ServerPresence, hexes.map(lambda h: h[:32]), hexes.map(lambda h: h[:32]), texts, texts, counts,
        st.none() | hexes.map(lambda h: h[:32]),
    ),
)  # fmt: skip

REF = BlobRef.of(b"abc")
DIGEST = "ab" * 32
CRASH = CrashReport(
    "pi-1",
    2,
    3,
    "exception",
    "ValueError: no",
    ({"module": "fedprune_device.cli.main", "line": 1, "function": "f"},),
    "fedprune 0.1",
    "a",
    3.5,
    60.0,
    1,
    2,
)
EXAMPLES: list[Message] = [
    Birth("pi-1", 3, "raspberry-pi-4", 100, "fedprune 0.1", {"cpu": [1, 2.5]}, {"job": "j", "round": 1, "attempt": 0}),
    Death("pi-1", 3),
    RoundProgress("pi-1", "j", 1, 0, "train", 3, 10),
    Refusal("pi-1", "j", 1, 0, "no room", 30),
    UpdateAnnouncement("pi-1", "j", 1, 0, REF.sha256, REF, 100, 40, {"loss": 0.5}),
    Hello(1_800_000_000),
    Offer(*("j", 1, 0, 7, DIGEST, DIGEST, (4, 8), 10, REF, REF, REF, Recipe().to_dict(), REF, DIGEST), {"int8": REF}),
    TrainingDone("pi-1", "j", 1, 0, DIGEST, 100, 40, {"loss": 0.5}),
    SecureStep.of("j", 1, 0, DIGEST[:32], "keys", b"abc"),
    Accepted("j", 1, 0, DIGEST),
    Cancelled("j", 1, 1, "late"),
    Finished("j"),
    BlobRequest(DIGEST, "data", 0, 4, 2, 17),
    BlobNotFound(DIGEST),
    UploadRequest(DIGEST, "https://models.example/x/y%20z?X-Amz-Signature=0&b", 17),
    UploadResult(DIGEST, "no route"),
    JoinRequest("lab", "pi-1", DIGEST, "request", DIGEST[:32], DIGEST[:10], DIGEST, 2 * DIGEST),
    JoinAnswer(DIGEST, "approved", "", 1, "authority", "certificate", DIGEST, DIGEST),
    ReleaseOffer(7, "{}", 2 * DIGEST, (DIGEST,), 3, 600.0),
    ReleaseWithdrawn(7, "stopped"),
    ReleaseReport("pi-1", 7, "rolled back", "killed by SIGILL", 1, 2, DIGEST),
    Alive("pi-1", 3),
    CRASH,
    CrashStored(7),
    Reconnect(50.0, 3600.0),
    ServerQuery(DIGEST[:32], DIGEST[:32], 0, None),
    ServerPresence(DIGEST[:32], DIGEST[:32], "yard", "/var/lib/fedprune", 1_800_000_000, None),
]
