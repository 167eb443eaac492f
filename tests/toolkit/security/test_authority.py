"""The authority, with openssl as the judge of what it issues."""

from __future__ import annotations

import json
import re
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fedprune.core.errors import FedpruneError, IdentityError, ProtocolError, StorageError
from fedprune.security import authority as subject
from fedprune.security.authority import Authority
from fedprune.security.certificates import common_name, make_request, make_tls_key, pin_of, read_certificate
from fedprune.security.register import Register
from fedprune.security.tls import BUILT, TrustedTime

pytestmark = pytest.mark.board

DAY = 24 * 3600


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path / "identity", "lab")


def csr(name: str = "pi-1") -> str:
    return make_request(make_tls_key(), name)


def openssl(*arguments: str | Path, ok: bool = True) -> str:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def verified(authority: Authority, pem: str, *more: str, ok: bool = True) -> str:
    path = authority.crl_path.parent / "leaf.pem"
    path.write_text(pem)
    given = ("-CAfile", authority.crl_path.parent / subject.CERTIFICATE, "-x509_strict", *more)
    return openssl("verify", *given, path, ok=ok)


def serial_of(pem: str) -> int:
    return read_certificate(pem, "certificate").serial_number


def test_openssl_verifies_a_device_s_certificate_as_a_client_s_and_not_as_a_server_s(authority: Authority) -> None:
    pem = authority.issue_device("lab", "pi-1", csr())

    verified(authority, pem, "-purpose", "sslclient")
    assert "unsuitable certificate purpose" in verified(authority, pem, "-purpose", "sslserver", ok=False)
    text = openssl("x509", "-in", authority.crl_path.parent / "leaf.pem", "-noout", "-text")
    assert re.search(r"Subject: CN ?= ?pi-1\n", text)
    assert "URI:fedprune://lab/pi-1" in text
    assert "Not Before: Jan  1 00:00:00 1970 GMT" in text
    assert "CA:FALSE" in text
    assert "prime256v1" in text


def test_openssl_verifies_a_broker_s_certificate_for_its_hosts_alone(authority: Authority) -> None:
    pem = authority.issue_broker(["broker.example", "192.0.2.7", "::1"], csr("x"))

    for given in (("-verify_hostname", "broker.example"), ("-verify_ip", "192.0.2.7"), ("-verify_ip", "::1")):
        verified(authority, pem, "-purpose", "sslserver", *given)
    assert "hostname mismatch" in verified(authority, pem, "-verify_hostname", "other.example", ok=False)
    assert "unsuitable" in verified(authority, pem, "-purpose", "sslclient", ok=False)


def test_a_board_in_1970_and_one_in_2050_believe_the_authority(authority: Authority) -> None:
    pem = authority.issue_broker(["broker.example"], csr("x"))

    verified(authority, pem, "-attime", "60")
    assert "has expired" in verified(authority, pem, "-attime", str(BUILT + 20 * 365 * DAY), ok=False)


def test_openssl_believes_the_list_of_the_revoked_and_follows_it(authority: Authority) -> None:
    good, bad = (authority.issue_device("lab", name, csr(name)) for name in ("pi-1", "pi-2"))
    ca = authority.crl_path.parent / subject.CERTIFICATE
    crl = ("-crl_check", "-CRLfile", str(authority.crl_path))
    verified(authority, bad, *crl)  # an empty list is one, too

    authority.revoke(serial_of(bad))

    assert "verify OK" in openssl("crl", "-in", authority.crl_path, "-CAfile", ca, "-noout")
    text = openssl("crl", "-in", authority.crl_path, "-noout", "-text")
    assert f"{serial_of(bad):X}" in text.replace("Serial Number: 0", "Serial Number: ")
    verified(authority, good, *crl)
    assert "certificate revoked" in verified(authority, bad, *crl, ok=False)
    for at in ("60", str(BUILT + 10 * 365 * DAY)):  # neither too new for a broker in 1970 nor ever out of date
        assert "CRL" not in verified(authority, good, *crl, "-attime", at, ok=at == "60")


def test_what_was_issued_and_revoked_is_known_after_a_restart(authority: Authority, tmp_path: Path) -> None:
    request = csr()
    pem = authority.issue_device("lab", "pi-1", request)
    authority.issue_device("lab", "pi-2", csr())
    assert authority.revoke_device("pi-2") == 1
    folder = tmp_path / "identity"
    (folder / "crl.pem").unlink()

    again = Authority(folder)

    assert [i.pem for i in again.of_device("pi-1")] == [pem]
    assert again.is_revoked(again.of_device("pi-2")[0].serial)
    assert again.pin == authority.pin == pin_of(read_certificate(authority.pem, "x"))
    assert again.issue_device("lab", "pi-1", request) == pem  # the same key has one certificate
    crl = x509.load_pem_x509_crl((folder / "crl.pem").read_bytes())
    assert [r.serial_number for r in crl] == [again.of_device("pi-2")[0].serial]
    for name in ("authority.key", "register.jsonl"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600


def test_a_tls_key_has_one_certificate_of_one_device_and_none_once_that_is_revoked(authority: Authority) -> None:
    request = csr()
    pem = authority.issue_device("lab", "pi-1", request)
    with pytest.raises(IdentityError, match="has a certificate of device 'pi-1'"):
        authority.issue_device("lab", "pi-2", request)
    authority.revoke(serial_of(pem))
    with pytest.raises(IdentityError, match=r"is revoked\. Make a new key"):
        authority.issue_device("lab", "pi-1", request)
    assert authority.issue_device("lab", "pi-1", csr()) != pem


def test_a_renewed_certificate_lies_beside_the_old_one_until_there_are_too_many(authority: Authority) -> None:
    pems = {authority.issue_device("lab", "pi-1", csr(), days=1 + i) for i in range(subject.MAX_LIVE)}
    assert len(pems) == len({serial_of(p) for p in pems}) == subject.MAX_LIVE
    with pytest.raises(IdentityError, match="has 64 certificates"):
        authority.issue_device("lab", "pi-1", csr())


@pytest.mark.parametrize("name", ["fedprune-server", "all", "a/b", "..", "a\nb"])
def test_names_that_mean_something_else_are_not_given_away(authority: Authority, name: str) -> None:
    with pytest.raises((IdentityError, ProtocolError)):
        authority.issue_device("lab", name, csr())


def test_requests_with_other_keys_or_false_signatures_are_refused(authority: Authority) -> None:
    def request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> str:
        made = x509.CertificateSigningRequestBuilder().subject_name(common_name("x")).sign(key, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM).decode()

    for key in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)):
        with pytest.raises(ProtocolError, match="ECDSA on P-256"):
            authority.issue_device("lab", "pi-1", request(key))
    der = bytearray(x509.load_pem_x509_csr(csr().encode()).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = ssl.DER_cert_to_PEM_cert(bytes(der)).replace("CERTIFICATE", "CERTIFICATE REQUEST")
    for wrong in (forged, "", "x" * 10_000, authority.pem):
        with pytest.raises(ProtocolError, match="certificate request"):
            authority.issue_device("lab", "pi-1", wrong)
    assert authority.of_device("pi-1") == []


def test_what_a_request_asks_for_beside_its_key_is_not_given(authority: Authority) -> None:
    builder = x509.CertificateSigningRequestBuilder().subject_name(common_name("fedprune-server"))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    pem = builder.sign(make_tls_key(), hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    issued = read_certificate(authority.issue_device("lab", "pi-1", pem), "certificate")

    assert issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert issued.subject == common_name("pi-1")


def test_a_second_authority_does_not_take_the_first_one_s_place(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="has an authority already"):
        Authority.make(tmp_path / "identity", "lab")
    other = Authority.make(tmp_path / "other", "lab")
    (tmp_path / "identity" / "authority.pem").write_text(other.pem)
    with pytest.raises(IdentityError, match="don't belong together"):
        Authority(tmp_path / "identity")


@pytest.mark.parametrize("kept", [0, 40, -1])
def test_a_line_that_a_power_cut_tore_was_given_to_nobody(authority: Authority, tmp_path: Path, kept: int) -> None:
    first = authority.issue_device("lab", "pi-1", csr())
    path = tmp_path / "identity" / "register.jsonl"
    whole = path.read_bytes()
    authority.issue_device("lab", "pi-2", csr())
    path.write_bytes(path.read_bytes()[: len(whole) + kept] if kept >= 0 else path.read_bytes()[:-1])

    again = Authority(tmp_path / "identity")

    assert ([i.pem for i in again.of_device("pi-1")], again.of_device("pi-2")) == ([first], [])
    again.issue_device("lab", "pi-3", csr())
    assert len(Authority(tmp_path / "identity").of_device("pi-3")) == 1


def test_a_register_that_is_missing_is_an_error_and_not_made_anew(authority: Authority, tmp_path: Path) -> None:
    path = tmp_path / "identity" / "register.jsonl"
    path.unlink()
    with pytest.raises(StorageError, match="is missing"):
        Authority(tmp_path / "identity")
    assert not path.exists()


@pytest.mark.parametrize("line", [b"nonsense\n", b"{}\n", b'{"issued": {"pem": "x"}}\n'])
def test_a_damaged_register_is_an_error(authority: Authority, tmp_path: Path, line: bytes) -> None:
    with (tmp_path / "identity" / "register.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(FedpruneError, match=r"register\.jsonl is damaged"):
        Authority(tmp_path / "identity")


_APPEND = """
import sys
from pathlib import Path
from fedprune.security.register import Register
register = Register(Path(sys.argv[1]), lambda _: None)
for i in range(20):
    with register.held():
        register.append({"issued": f"{sys.argv[2]}-{i}"})
"""


def test_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "register.jsonl"
    processes = [subprocess.Popen([sys.executable, "-c", _APPEND, str(path), name]) for name in "ab"]
    assert [p.wait(60) for p in processes] == [0, 0]
    seen: list[str] = []
    Register(path, lambda entry: seen.append(entry["issued"]))

    assert sorted(seen) == sorted(f"{n}-{i}" for n in "ab" for i in range(20))


def test_one_process_sees_what_another_revoked_before_it_issues(authority: Authority, tmp_path: Path) -> None:
    request = csr()
    pem = authority.issue_device("lab", "pi-1", request)
    Authority(tmp_path / "identity").revoke(serial_of(pem))
    with pytest.raises(IdentityError, match="revoked"):
        authority.issue_device("lab", "pi-1", request)


def test_lines_of_another_copy_are_added_all_or_none(authority: Authority) -> None:
    serial = serial_of(authority.issue_device("lab", "pi-1", csr()))
    before = authority.lines()
    revoked = json.dumps({"revoked": {"serial": f"{serial:x}", "at": BUILT}})
    with pytest.raises(StorageError, match="a shared line of the register is damaged"):
        authority.adopt([revoked, "{}"])
    assert not authority.is_revoked(serial)
    assert authority.lines() == before
    authority.adopt([revoked])
    assert authority.is_revoked(serial)


def test_nothing_is_appended_by_who_does_not_hold_the_register(tmp_path: Path) -> None:
    register = Register(tmp_path / "register.jsonl", lambda _: None)
    with pytest.raises(StorageError, match="not held"):
        register.append({})


def test_the_time_floor_only_rises_survives_a_restart_and_stays_below_the_certificate_s_end(tmp_path: Path) -> None:
    path, latest = tmp_path / "time", BUILT + 100 * DAY
    time = TrustedTime(path, lambda: latest)
    assert time.floor == BUILT
    time.learn(0)
    time.learn(BUILT + 5)
    assert time.floor == BUILT + 5
    assert not path.exists()  # a few seconds are not worth a write
    time.learn(BUILT + 3 * DAY)
    time.learn(BUILT + 2 * DAY)
    assert time.floor == TrustedTime(path, lambda: latest).floor == BUILT + 3 * DAY
    time.learn(2**40)
    assert time.floor == latest
    assert TrustedTime(path, lambda: BUILT + 4 * DAY).floor == BUILT + 4 * DAY


@pytest.mark.parametrize("content", [b"", b'{"floor": "x"}'])
def test_a_damaged_time_counts_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "time").write_bytes(content)
    assert TrustedTime(tmp_path / "time", lambda: 2**40).floor == BUILT


def test_what_the_signed_list_has_stays_revoked_when_the_register_lost_it(authority: Authority, tmp_path: Path) -> None:
    request = csr()
    serial = serial_of(authority.issue_device("lab", "pi-1", request))
    register, crl = (tmp_path / "identity" / name for name in ("register.jsonl", "crl.pem"))
    before = register.read_bytes()
    authority.revoke_device("pi-1")
    authority.issue_device("lab", "pi-2", csr())
    register.write_bytes(before + register.read_bytes()[len(before) :][:20])  # as a disk that loses writes leaves it

    again = Authority(tmp_path / "identity")

    assert again.is_revoked(serial)
    assert [r.serial_number for r in x509.load_pem_x509_crl(crl.read_bytes())] == [serial]
    crl.unlink()
    assert Authority(tmp_path / "identity").is_revoked(serial)  # the register has it again
    with pytest.raises(IdentityError, match="is revoked"):
        again.issue_device("lab", "pi-1", request)


def test_a_list_that_another_has_signed_revokes_nothing(authority: Authority, tmp_path: Path) -> None:
    serial = serial_of(authority.issue_device("lab", "pi-1", csr()))
    other = Authority.make(tmp_path / "other", "lab")
    with other._register.held():
        other._register.append({"revoked": {"serial": f"{serial:x}", "at": 0}})
        other._list.write(other._revoked)
    (tmp_path / "identity" / "crl.pem").write_bytes((tmp_path / "other" / "crl.pem").read_bytes())
    assert not Authority(tmp_path / "identity").is_revoked(serial)
