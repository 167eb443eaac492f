"""The console's process with TLS, by a certificate of the server's own authority."""

import datetime as dt
import logging
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedprune.core.errors import ConfigError
from fedprune.security.certificates import common_name
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.monitoring.alert_rules import evaluate_alerts
from fedprune_server.monitoring.site_facts import site_facts
from fedprune_server.monitoring.situation import Situation
from fedprune_server.web.process import ConsoleProcess, ConsoleStart
from fedprune_server.web.start_checks import check_tls
from fedprune_server.web.state.status_writer import STATUS_FILE, StatusWriter
from support.waiting import until


def settings(folder: Path, certificate: Path, key: Path) -> ConsoleStart:
    return ConsoleStart("127.0.0.1", 0, str(folder), *(str(certificate), str(key)), "all", (), False, os.getpid())


@pytest.mark.system
def test_it_speaks_tls_and_nothing_else(tmp_path: Path) -> None:
    with IdentityFolder.make(tmp_path / "state", "lab") as identity:
        certificate, key, authority = identity.listener_files("web", ["127.0.0.1"])
    StatusWriter(tmp_path / STATUS_FILE).close()
    process = ConsoleProcess(settings(tmp_path, certificate, key))
    trusted = ssl.create_default_context(cafile=authority)
    try:
        until(lambda: process.turn(0.0) or process.url)
        assert process.url.startswith("https://127.0.0.1:")
        with urllib.request.urlopen(process.url + "login", timeout=10, context=trusted) as answer:  # noqa: S310
            cookies = answer.headers.get_all("set-cookie")
        assert cookies
        assert all(c.startswith("__Host-fedprune") and "; Secure" in c and "HttpOnly" in c for c in cookies)
        with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
            urllib.request.urlopen(process.url + "healthz", timeout=10, context=ssl.create_default_context())  # noqa: S310
        received = b""
        with socket.create_connection(("127.0.0.1", int(process.url.split(":")[2].strip("/"))), 10) as plain:
            plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            try:
                received = plain.recv(100)
            except ConnectionResetError:
                received = b""
        assert b"HTTP" not in received
    finally:
        process.stop()


def test_a_child_that_cannot_use_its_key_says_which_and_ends(tmp_path: Path) -> None:
    with IdentityFolder.make(tmp_path / "state", "lab") as identity:
        certificate, _, _ = identity.listener_files("web", ["127.0.0.1"])
    key = tmp_path / "other.key"
    key.write_text("no key")
    StatusWriter(tmp_path / STATUS_FILE).close()
    command = [sys.executable, "-m", "fedprune_server.web.child"]
    done = subprocess.run(
        command, input=settings(tmp_path, certificate, key).to_json(), capture_output=True, timeout=60
    )
    (line,) = done.stderr.decode().splitlines()
    assert (done.returncode, line.startswith("the console ends: ")) == (1, True)
    assert str(key) in line


def test_a_server_refuses_a_key_that_is_none_and_a_certificate_that_has_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key.write_bytes(private.private_bytes(*plain))
    config = ServerConfig(state=tmp_path, console="8470", console_certificate=certificate, console_key=key)
    now = dt.datetime.now(dt.timezone.utc)
    server = {"console": "8470", "console_certificate": str(certificate)}

    def alert_kinds() -> list[tuple[str, str]]:
        facts = replace(site_facts(tmp_path, server), disk=None)
        return [(a.kind, a.severity) for a in evaluate_alerts(Situation(tmp_path, site=facts), time.time())]

    for since, days, sound, severities in (
        (-60, 60, True, []), (-60, 20, True, ["warning"]), (-60, -1, False, ["critical"]), (1, 60, True, ["critical"]),
    ):  # fmt: skip
        builder = x509.CertificateBuilder().subject_name(common_name("console")).issuer_name(common_name("console"))
        builder = builder.not_valid_before(now + dt.timedelta(days=since)).serial_number(7)
        builder = builder.not_valid_after(now + dt.timedelta(days=days)).public_key(private.public_key())
        certificate.write_bytes(builder.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        assert alert_kinds() == [("certificate", severity) for severity in severities]
        assert site_facts(tmp_path, {**server, "console": "off"}).certificates == ()
        caplog.clear()
        if sound:
            with caplog.at_level(logging.ERROR):
                check_tls(config)
            warnings = [f"console_certificate: {certificate} counts from" in message for message in caplog.messages]
            assert warnings == [True] * (since > 0)  # the clock may be wrong: it is said, and fleets train
            continue
        with pytest.raises(ConfigError, match=str(certificate)) as no:
            check_tls(config)
        assert (no.value.path, no.value.exit_code) == (("server", "console_certificate"), 14)
    key.write_text("no key")
    with pytest.raises(ConfigError, match=str(key)):
        check_tls(config)
    key.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        check_tls(config)
    certificate.write_text("none")
    with pytest.raises(ConfigError, match=str(certificate)):
        check_tls(config)
    assert alert_kinds() == [("certificate", "critical")]
