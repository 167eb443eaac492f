from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from fedprune.core.errors import FedpruneError, JoinError, ProtocolError, SignatureError
from fedprune.security.authority import Authority
from fedprune.security.certificates import make_request as make_csr
from fedprune.security.certificates import make_tls_key
from fedprune.security.joining import (
    Claim,
    answer_text,
    check_answer,
    check_request,
    digest_of,
    holds_claim,
    make_request,
)
from fedprune.security.keys import SigningKey
from fedprune.wire.fleet_messages import APPROVED, REFUSED, WAITING, JoinAnswer, JoinRequest
from fedprune.wire.messages import parse

pytestmark = pytest.mark.board

KEY, SERVER = SigningKey.make(), SigningKey.make()
CSR = make_csr(make_tls_key(), "pi-1")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("authority"), "lab")


@pytest.fixture
def claim(authority: Authority) -> Claim:
    return Claim.make(authority.pin)


def answered(authority: Authority, request: JoinRequest, status: str = APPROVED, **other: str | None) -> JoinAnswer:
    """A genuine answer; `other` replaces fields before it is signed."""
    certificate = authority.issue_device("lab", request.device, request.csr) if status == APPROVED else None
    key = SERVER.verifying.hex if status == APPROVED else None
    body = {
        "request": digest_of(request), "status": status, "reason": "", "time": authority.now(),
        "authority": authority.pem, "certificate": certificate, "server_key": key, **other,
    }  # fmt: skip
    return JoinAnswer(**body, signature=authority.sign(answer_text(**body)).hex())  # type: ignore[arg-type]


def test_with_nothing_but_a_claim_device_and_server_know_each_other(authority: Authority, claim: Claim) -> None:
    request = parse(make_request("lab", "pi-1", KEY, CSR, Claim.parse(claim.text)).to_bytes())
    assert isinstance(request, JoinRequest)

    assert check_request(request) == KEY.verifying
    assert holds_claim(request, claim.key)
    assert claim.secret.hex() not in request.to_bytes().decode()
    answer = parse(answered(authority, request).to_bytes())
    assert isinstance(answer, JoinAnswer)
    admission = check_answer(answer, request, claim.pin)
    assert admission is not None
    assert admission.server == SERVER.verifying
    assert admission.authority == authority.pem


@pytest.mark.parametrize("with_claim", [True, False])
def test_no_part_of_a_request_can_be_changed_by_somebody_in_between(claim: Claim, with_claim: bool) -> None:
    request = make_request("lab", "pi-1", KEY, CSR, claim if with_claim else None)
    thief = make_request("lab", "pi-2", SigningKey.make(), make_csr(make_tls_key(), "pi-2"), Claim.make(claim.pin))
    for field in fields(JoinRequest):
        changes = {field.name: getattr(thief, field.name)}
        if field.name == "site":
            changes = {"site": "other"}
        if not with_claim and field.name in ("claim", "mac"):
            changes = {"claim": thief.claim, "mac": thief.mac}
        with pytest.raises(ProtocolError):
            check_request(replace(request, **changes))
    check_request(request)


def test_a_claim_can_t_be_used_for_another_s_key_though_that_one_signs_well(claim: Claim) -> None:
    mine = make_request("lab", "pi-1", KEY, CSR, claim)
    thief = SigningKey.make()
    stolen = make_request("lab", "pi-1", thief, CSR, Claim.make(claim.pin))
    stolen = replace(stolen, claim=mine.claim, mac=mine.mac, nonce=mine.nonce)
    assert not holds_claim(stolen, claim.key)
    with pytest.raises(SignatureError):
        check_request(stolen)


def test_a_claim_comes_with_its_proof(claim: Claim) -> None:
    request = make_request("lab", "pi-1", KEY, CSR, claim)
    for part in ("claim", "mac"):
        with pytest.raises(ProtocolError, match="both or neither"):
            check_request(replace(request, **{part: None}))


def test_a_device_that_waits_asks_again(authority: Authority) -> None:
    request = make_request("lab", "pi-1", KEY, CSR)
    assert check_answer(answered(authority, request, WAITING), request, authority.pin) is None


def test_a_refusal_says_why(authority: Authority) -> None:
    request = make_request("lab", "pi-1", KEY, CSR)
    with pytest.raises(JoinError, match="refuses pi-1: the claim is used"):
        check_answer(answered(authority, request, REFUSED, reason="the claim is used"), request, authority.pin)


def test_no_part_of_an_answer_can_be_changed(authority: Authority, claim: Claim) -> None:
    request = make_request("lab", "pi-1", KEY, CSR, claim)
    answer = answered(authority, request)
    for change in (
        {"request": "ab" * 32}, {"status": WAITING}, {"status": REFUSED}, {"reason": "x"}, {"time": answer.time + 1},
        {"certificate": None}, {"certificate": authority.pem}, {"server_key": KEY.verifying.hex},
        {"signature": answer.signature[:-2] + ("00" if answer.signature[-2:] != "00" else "01")},
    ):  # fmt: skip
        with pytest.raises(SignatureError):
            check_answer(replace(answer, **change), request, claim.pin)


def test_another_server_can_t_answer(authority: Authority, claim: Claim, tmp_path: Path) -> None:
    request = make_request("lab", "pi-1", KEY, CSR, claim)
    foreign = Authority.make(tmp_path / "foreign", "lab")
    with pytest.raises(SignatureError, match="comes from another server"):
        check_answer(answered(foreign, request), request, claim.pin)
    posing = replace(answered(foreign, request), authority=authority.pem)
    with pytest.raises(SignatureError, match="not signed by the server's authority"):
        check_answer(posing, request, claim.pin)


def test_what_an_authority_signs_must_make_sense(authority: Authority, claim: Claim, tmp_path: Path) -> None:
    request = make_request("lab", "pi-1", KEY, CSR, claim)
    other = authority.issue_device("lab", "pi-9", make_csr(make_tls_key(), "pi-9"))
    foreign = Authority.make(tmp_path / "foreign", "lab").issue_device("lab", "pi-1", CSR)
    named = authority.issue_device("lab", "pi-3", (csr := make_csr(make_tls_key(), "x")))
    cases: list[tuple[JoinRequest, dict[str, str | None], str]] = [
        (request, {"certificate": None}, "expected a certificate"),
        (request, {"server_key": None}, "expected a certificate"),
        (request, {"certificate": other}, "for another key"),
        (request, {"certificate": foreign}, "not by the server's authority"),
        (request, {"certificate": "nonsense"}, "a certificate in PEM"),
        (make_request("lab", "pi-1", KEY, csr, claim), {"certificate": named}, "expected pi-1"),
    ]
    for asked, change, match in cases:
        body = {
            "request": digest_of(asked), "status": APPROVED, "reason": "", "time": 1, "authority": authority.pem,
            "certificate": other, "server_key": SERVER.verifying.hex, **change,
        }  # fmt: skip
        answer = JoinAnswer(**body, signature=authority.sign(answer_text(**body)).hex())  # type: ignore[arg-type]
        with pytest.raises(FedpruneError, match=match):
            check_answer(answer, asked, claim.pin)
