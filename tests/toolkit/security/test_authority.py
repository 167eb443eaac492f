"""The authority, with openssl as the judge of what it issues."""

import re
import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fedprune.core.errors import IdentityError, ProtocolError
from fedprune.security import authority as subject
from fedprune.security.authority import Authority
from fedprune.security.certificates import common_name, make_request, make_tls_key, read_certificate
from fedprune.security.trusted_time import BUILD_TIME, TrustedTime

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


def openssl_verify(authority: Authority, pem: str, *options: str, ok: bool = True) -> str:
    path = authority.crl_path.parent / "leaf.pem"
    path.write_text(pem)
    arguments = ("-CAfile", authority.crl_path.parent / subject.AUTHORITY_CERTIFICATE_FILE, "-x509_strict", *options)
    return openssl("verify", *arguments, path, ok=ok)


def serial_of(pem: str) -> int:
    return read_certificate(pem, "certificate").serial_number


def test_openssl_verifies_a_device_s_certificate_as_a_client_s_and_not_as_a_server_s(authority: Authority) -> None:
    pem = authority.issue_device("lab", "pi-1", csr())

    openssl_verify(authority, pem, "-purpose", "sslclient")
    assert "unsuitable certificate purpose" in openssl_verify(authority, pem, "-purpose", "sslserver", ok=False)
    text = openssl("x509", "-in", authority.crl_path.parent / "leaf.pem", "-noout", "-text")
    assert re.search(r"Subject: CN ?= ?pi-1\n", text)
    assert "URI:fedprune://lab/pi-1" in text
    assert "Not Before: Jan  1 00:00:00 1970 GMT" in text
    assert "CA:FALSE" in text
    assert "prime256v1" in text


def test_openssl_verifies_a_broker_s_certificate_for_its_hosts_alone(authority: Authority) -> None:
    pem = authority.issue_broker(["broker.example", "192.0.2.7", "::1"], csr("x"))

    for host_options in (("-verify_hostname", "broker.example"), ("-verify_ip", "192.0.2.7"), ("-verify_ip", "::1")):
        openssl_verify(authority, pem, "-purpose", "sslserver", *host_options)
    assert "hostname mismatch" in openssl_verify(authority, pem, "-verify_hostname", "other.example", ok=False)
    assert "unsuitable" in openssl_verify(authority, pem, "-purpose", "sslclient", ok=False)


def test_a_board_in_1970_and_one_in_2050_believe_the_authority(authority: Authority) -> None:
    pem = authority.issue_broker(["broker.example"], csr("x"))

    openssl_verify(authority, pem, "-attime", "60")
    assert "has expired" in openssl_verify(authority, pem, "-attime", str(BUILD_TIME + 20 * 365 * DAY), ok=False)


def test_openssl_believes_the_list_of_the_revoked_and_follows_it(authority: Authority) -> None:
    good, bad = (authority.issue_device("lab", name, csr(name)) for name in ("pi-1", "pi-2"))
    ca = authority.crl_path.parent / subject.AUTHORITY_CERTIFICATE_FILE
    crl = ("-crl_check", "-CRLfile", str(authority.crl_path))
    openssl_verify(authority, bad, *crl)  # an empty list is one, too

    authority.write_revocation_list({serial_of(bad): BUILD_TIME})

    assert "verify OK" in openssl("crl", "-in", authority.crl_path, "-CAfile", ca, "-noout")
    text = openssl("crl", "-in", authority.crl_path, "-noout", "-text")
    assert f"{serial_of(bad):X}" in text.replace("Serial Number: 0", "Serial Number: ")
    openssl_verify(authority, good, *crl)
    assert "certificate revoked" in openssl_verify(authority, bad, *crl, ok=False)
    for at in ("60", str(BUILD_TIME + 10 * 365 * DAY)):  # neither too new for a broker in 1970 nor ever out of date
        assert "CRL" not in openssl_verify(authority, good, *crl, "-attime", at, ok=at == "60")


def test_a_server_whose_clock_says_1970_issues_no_certificate_that_is_over(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "identity", "lab", clock=lambda: 0.0)
    issued = read_certificate(authority.issue_device("lab", "pi-1", csr(), days=10), "certificate")

    assert issued.not_valid_after_utc.timestamp() == BUILD_TIME + 10 * DAY


@pytest.mark.parametrize("name", ["fedprune-server", "all", "", "a/b", "+", "#", "..", "x" * 65, "a\nb"])
def test_names_that_mean_something_else_are_not_given_away(authority: Authority, name: str) -> None:
    with pytest.raises((IdentityError, ProtocolError)):
        authority.issue_device("lab", name, csr())


def test_requests_with_other_keys_or_false_signatures_are_refused(authority: Authority) -> None:
    def request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> str:
        signing_request = (
            x509.CertificateSigningRequestBuilder().subject_name(common_name("x")).sign(key, hashes.SHA256())
        )
        return signing_request.public_bytes(serialization.Encoding.PEM).decode()

    for key in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)):
        with pytest.raises(ProtocolError, match="ECDSA on P-256"):
            authority.issue_device("lab", "pi-1", request(key))
    der = bytearray(x509.load_pem_x509_csr(csr().encode()).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = ssl.DER_cert_to_PEM_cert(bytes(der)).replace("CERTIFICATE", "CERTIFICATE REQUEST")
    for wrong in (forged, "", "x" * 10_000, authority.pem):
        with pytest.raises(ProtocolError, match="certificate request"):
            authority.issue_device("lab", "pi-1", wrong)


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
    (tmp_path / "identity" / "authority.pem").write_text(Authority.make(tmp_path / "other", "lab").pem)
    with pytest.raises(IdentityError, match="don't belong together"):
        Authority(tmp_path / "identity")


def test_the_time_floor_only_rises_survives_a_restart_and_stays_below_the_certificate_s_end(tmp_path: Path) -> None:
    path, latest = tmp_path / "time", BUILD_TIME + 100 * DAY
    time = TrustedTime(path, lambda: latest)
    assert time.floor == BUILD_TIME
    time.note_time(0)
    time.note_time(BUILD_TIME + 5)
    assert time.floor == BUILD_TIME + 5
    assert not path.exists()  # a few seconds are not worth a write
    time.note_time(BUILD_TIME + 3 * DAY)
    time.note_time(BUILD_TIME + 2 * DAY)
    assert time.floor == TrustedTime(path, lambda: latest).floor == BUILD_TIME + 3 * DAY
    path.unlink()
    time.note_time(BUILD_TIME + 4 * DAY - 1)
    assert not path.exists()  # it is written once a day at most
    time.note_time(2**40)
    assert time.floor == latest
    assert TrustedTime(path, lambda: BUILD_TIME + 4 * DAY).floor == BUILD_TIME + 4 * DAY


@pytest.mark.parametrize("content", [b"", b'{"floor": "x"}'])
def test_a_damaged_time_counts_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "time").write_bytes(content)
    assert TrustedTime(tmp_path / "time", lambda: 2**40).floor == BUILD_TIME


def test_a_list_of_another_authority_or_of_other_certificates_is_not_taken_for_right(
    authority: Authority, tmp_path: Path
) -> None:
    revoked = {serial_of(authority.issue_device("lab", "pi-1", csr())): BUILD_TIME}
    assert authority.is_list_current({})
    assert not authority.is_list_current(revoked)
    second = Authority.make(tmp_path / "other", "lab")
    second.write_revocation_list(revoked)
    authority.crl_path.write_bytes(second.crl_path.read_bytes())
    assert not authority.is_list_current(revoked)
    authority.write_revocation_list(revoked)
    assert authority.is_list_current(revoked)
    authority.crl_path.unlink()
    assert not Authority(tmp_path / "identity").is_list_current(revoked)
