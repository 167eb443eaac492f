from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import fields, replace

from fedprune.core.errors import FedpruneError, JoinError, ProtocolError, SignatureError
from fedprune.security.authority import Authority
from fedprune.security.certificates import PIN_BYTES, make_tls_key
from fedprune.security.certificates import make_request as make_csr
from fedprune.security.join_claim import CLAIM_ID_BYTES, CLAIM_SECRET_BYTES, JoinClaim, claim_mac, is_same
from fedprune.security.joining import (
    check_answer,
    check_request,
    holds_claim,
    make_join_request,
    request_digest,
    signed_answer_bytes,
)
from fedprune.security.keys import SigningKey, transcript
from fedprune.wire.fleet_messages import APPROVED, REFUSED, WAITING, JoinAnswer, JoinRequest
from fedprune.wire.messages import parse_message

pytestmark = pytest.mark.board

KEY, SERVER = SigningKey.make(), SigningKey.make()
CSR = make_csr(make_tls_key(), "pi-1")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("authority"), "lab")


@pytest.fixture
def claim(authority: Authority) -> JoinClaim:
    return JoinClaim.make(authority.pin)


def genuine_answer(
    authority: Authority, request: JoinRequest, status: str = APPROVED, **replaced_fields: str | None
) -> JoinAnswer:
    """A genuine answer; `replaced_fields` replaces fields before it is signed."""
    certificate = authority.issue_device("lab", request.device, request.csr) if status == APPROVED else None
    key = SERVER.verifying_key.hex if status == APPROVED else None
    body = {
        "request": request_digest(request), "status": status, "reason": "", "time": authority.now(),
        "authority": authority.pem, "certificate": certificate, "server_key": key, **replaced_fields,
    }  # fmt: skip
    return JoinAnswer(**body, signature=authority.sign(signed_answer_bytes(**body)).hex())  # type: ignore[arg-type]


def test_with_nothing_but_a_claim_device_and_server_know_each_other(authority: Authority, claim: JoinClaim) -> None:
    request = parse_message(make_join_request("lab", "pi-1", KEY, CSR, JoinClaim.parse(claim.text)).to_bytes())
    assert isinstance(request, JoinRequest)

    assert check_request(request) == KEY.verifying_key
    assert holds_claim(request, claim.key)
    assert claim.secret.hex() not in request.to_bytes().decode()
    answer = parse_message(genuine_answer(authority, request).to_bytes())
    assert isinstance(answer, JoinAnswer)
    admission = check_answer(answer, request, claim.pin)
    assert admission is not None
    assert admission.server == SERVER.verifying_key
    assert admission.authority == authority.pem


@pytest.mark.parametrize("with_claim", [True, False])
def test_no_part_of_a_request_can_be_changed_by_somebody_in_between(claim: JoinClaim, with_claim: bool) -> None:
    request = make_join_request("lab", "pi-1", KEY, CSR, claim if with_claim else None)
    thief = make_join_request(
        "lab", "pi-2", SigningKey.make(), make_csr(make_tls_key(), "pi-2"), JoinClaim.make(claim.pin)
    )
    for field in fields(JoinRequest):
        changes = {field.name: getattr(thief, field.name)}
        if field.name == "site":
            changes = {"site": "other"}
        if not with_claim and field.name in ("claim", "mac"):
            changes = {"claim": thief.claim, "mac": thief.mac}
        with pytest.raises(ProtocolError):
            check_request(replace(request, **changes))
    check_request(request)


def test_a_claim_can_t_be_used_for_another_s_key_though_that_one_signs_well(claim: JoinClaim) -> None:
    mine = make_join_request("lab", "pi-1", KEY, CSR, claim)
    stolen = make_join_request("lab", "pi-1", SigningKey.make(), CSR, JoinClaim.make(claim.pin))
    stolen = replace(stolen, claim=mine.claim, mac=mine.mac, nonce=mine.nonce)
    assert not holds_claim(stolen, claim.key)
    with pytest.raises(SignatureError):
        check_request(stolen)


def test_a_claim_comes_with_its_proof(claim: JoinClaim) -> None:
    request = make_join_request("lab", "pi-1", KEY, CSR, claim)
    for field_name in ("claim", "mac"):
        with pytest.raises(ProtocolError, match="both or neither"):
            check_request(replace(request, **{field_name: None}))


def test_no_part_of_an_answer_can_be_changed(authority: Authority, claim: JoinClaim) -> None:
    request = make_join_request("lab", "pi-1", KEY, CSR, claim)
    answer = genuine_answer(authority, request)
    for change in (
        {"request": "ab" * 32}, {"status": WAITING}, {"status": REFUSED}, {"reason": "x"}, {"time": answer.time + 1},
        {"certificate": None}, {"certificate": authority.pem}, {"server_key": KEY.verifying_key.hex},
        {"signature": answer.signature[:-2] + ("00" if answer.signature[-2:] != "00" else "01")},
    ):  # fmt: skip
        with pytest.raises(SignatureError):
            check_answer(replace(answer, **change), request, claim.pin)


def test_another_server_can_t_answer(authority: Authority, claim: JoinClaim, tmp_path: Path) -> None:
    request = make_join_request("lab", "pi-1", KEY, CSR, claim)
    foreign = Authority.make(tmp_path / "foreign", "lab")
    with pytest.raises(SignatureError, match="comes from another server"):
        check_answer(genuine_answer(foreign, request), request, claim.pin)
    posing = replace(genuine_answer(foreign, request), authority=authority.pem)
    with pytest.raises(SignatureError, match="authority"):
        check_answer(posing, request, claim.pin)


def test_what_an_authority_signs_must_make_sense(authority: Authority, claim: JoinClaim, tmp_path: Path) -> None:
    request = make_join_request("lab", "pi-1", KEY, CSR, claim)
    foreign_certificate = authority.issue_device("lab", "pi-9", make_csr(make_tls_key(), "pi-9"))
    foreign = Authority.make(tmp_path / "foreign", "lab").issue_device("lab", "pi-1", CSR)
    named = authority.issue_device("lab", "pi-3", (csr := make_csr(make_tls_key(), "x")))
    cases: list[tuple[JoinRequest, dict[str, str | None], str]] = [
        (request, {"certificate": None}, "expected a certificate"),
        (request, {"server_key": None}, "expected a certificate"),
        (request, {"certificate": foreign_certificate}, "for another key"),
        (request, {"certificate": foreign}, "not by the server's authority"),
        (request, {"certificate": "nonsense"}, "a certificate in PEM"),
        (make_join_request("lab", "pi-1", KEY, csr, claim), {"certificate": named}, "expected pi-1"),
    ]
    for asked, change, match in cases:
        body = {
            "request": request_digest(asked), "status": APPROVED, "reason": "", "time": 1, "authority": authority.pem,
            "certificate": foreign_certificate, "server_key": SERVER.verifying_key.hex, **change,
        }  # fmt: skip
        answer = JoinAnswer(**body, signature=authority.sign(signed_answer_bytes(**body)).hex())  # type: ignore[arg-type]
        with pytest.raises(FedpruneError, match=match):
            check_answer(answer, asked, claim.pin)


claims = st.builds(
    JoinClaim, st.binary(min_size=CLAIM_ID_BYTES, max_size=CLAIM_ID_BYTES),
    st.binary(min_size=CLAIM_SECRET_BYTES, max_size=CLAIM_SECRET_BYTES),
    st.binary(min_size=PIN_BYTES, max_size=PIN_BYTES),
)  # fmt: skip


@given(claims)
@settings(deadline=None)
def test_a_claim_is_read_back_however_it_is_typed(claim: JoinClaim) -> None:
    assert len(claim.text) == 66
    for typed in (claim.text, claim.text.lower(), claim.text.replace("-", ""), claim.text.replace("-", " ") + "\n"):
        assert JoinClaim.parse(typed) == claim
    assert JoinClaim.parse("FP1" + claim.text[3:].replace("O", "0").replace("B", "8")) == claim


@given(claims, st.data())
@settings(deadline=None)
def test_one_wrong_character_or_two_that_are_swapped_are_noticed(claim: JoinClaim, data: st.DataObject) -> None:
    text = claim.text
    at = data.draw(st.sampled_from([i for i in range(4, len(text)) if text[i] != "-"]))
    replacement = data.draw(st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567".replace(text[at], "")))
    for wrong in (text[:at] + replacement + text[at + 1 :], text[:at] + text[at + 1 :], text + replacement):
        with pytest.raises(JoinError, match="the claim is mistyped"):
            JoinClaim.parse(wrong)


def test_a_claim_names_its_device_and_is_found_among_those_of_others() -> None:
    attic, barn, anyone = (JoinClaim.make(bytes(PIN_BYTES), device) for device in ("attic", "Barn-2", None))
    lines = "\n".join(claim.text for claim in (attic, barn, anyone))

    assert JoinClaim.parse(lines, device="Barn-2") == barn
    assert [JoinClaim.parse(c.text, device="attic") for c in (attic, anyone)] == [attic, anyone]
    assert JoinClaim.parse(barn.text.replace("-", " ", 7) + "\n") == barn
    double_line = f"{barn.text} {attic.text}"
    for text, device in (
        (barn.text, "attic"), (lines, "shed"), (lines, None), (f"{lines}\n{barn.text}", "Barn-2"),
        (double_line, "Barn-2"), (double_line, None),
    ):  # fmt: skip
        with pytest.raises(JoinError) as refusal:
            JoinClaim.parse(text, device=device)
        assert refusal.value.hint
        assert not any(claim.text[:12] in str(refusal.value) for claim in (attic, barn, anyone))


@pytest.mark.parametrize("text", ["", "FP2-AAAA", "FP1", "FP1-" + "1" * 56])
def test_what_is_no_claim_is_one_clear_error(text: str) -> None:
    with pytest.raises(JoinError, match="claim"):
        JoinClaim.parse(text)


def test_a_claim_keeps_its_secret_where_it_is_logged_and_its_key_is_another_thing() -> None:
    one, two = JoinClaim.make(bytes(PIN_BYTES)), JoinClaim.make(bytes(PIN_BYTES))

    assert repr(one.secret) not in repr(one)
    assert one.key not in (one.secret, two.key)
    assert JoinClaim(two.id, one.secret, one.pin).key != one.key
    assert not is_same(claim_mac(one.key, b"x"), claim_mac(two.key, b"x"))


field_lists = st.lists(st.none() | st.integers() | st.text(max_size=5) | st.binary(max_size=5), max_size=4)


@given(field_lists, field_lists)
def test_two_lists_never_make_the_same_transcript(one: list[object], two: list[object]) -> None:
    exact = [(type(v), v) for v in one] == [(type(v), v) for v in two]
    assert (transcript("a", *one) == transcript("a", *two)) == exact  # type: ignore[arg-type]
    assert transcript("a", *one) != transcript("b", *one)  # type: ignore[arg-type]
