"""The command that brings the list of revoked certificates to the broker: when it runs, and when it runs again."""

import logging
import os
import shlex
import signal
from pathlib import Path

import pytest

from fedprune.core.errors import ConfigError
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.maintenance.connection_checks import CheckedSite, check_revocations
from fedprune_server.messaging.broker import revocations
from fedprune_server.messaging.broker.revocations import (
    RevocationCommandError,
    deliver_list,
    is_list_delivered,
    list_delivery,
)
from support.waiting import until


def command(text: str) -> str:
    return shlex.join(["sh", "-c", text])


@pytest.fixture
def crl(tmp_path: Path) -> Path:
    (tmp_path / "identity").mkdir()
    path = tmp_path / "identity" / "crl.pem"
    path.write_text("first")
    return path


def test_each_list_is_given_once_also_after_a_restart(crl: Path, tmp_path: Path) -> None:
    record = tmp_path / "told"
    append = command(f'cat "$FEDPRUNE_CRL" >> {record}; echo >> {record}')
    with list_delivery(append, tmp_path, crl):
        until(lambda: is_list_delivered(tmp_path, crl))
        crl.write_text("second")
        until(lambda: is_list_delivered(tmp_path, crl))
    crl.write_text("third")  # by a command while no server runs
    for _ in range(2):
        with list_delivery(append, tmp_path, crl):
            until(lambda: is_list_delivered(tmp_path, crl))
    assert record.read_text().split() == ["first", "second", "third"]


def test_a_command_that_fails_is_told_and_tried_again(
    crl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(revocations, "FIRST_RETRY_S", 0.05)
    ready = tmp_path / "ready"
    with list_delivery(command(f"echo no way there; test -e {ready}"), tmp_path, crl):
        until(lambda: "exit code 1: no way there" in caplog.text)
        assert not is_list_delivered(tmp_path, crl)
        ready.touch()
        until(lambda: is_list_delivered(tmp_path, crl))
    assert "was given the list" in caplog.text


def test_a_command_that_is_missing_or_hangs_is_an_error(
    crl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocations, "COMMAND_TIMEOUT_S", 0.2)
    for text in ("/no/such/program", "sleep 60"):
        with pytest.raises(RevocationCommandError, match="on_revocation"):
            deliver_list(text, tmp_path, crl)
    assert not is_list_delivered(tmp_path, crl)


def test_a_command_that_leaves_a_process_behind_has_succeeded(crl: Path, tmp_path: Path) -> None:
    # The process in the background holds the command's standard output.
    deliver_list(command(f"sleep 600 & echo $! > {tmp_path}/pid"), tmp_path, crl)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert is_list_delivered(tmp_path, crl)


def test_the_doctor_says_that_the_broker_has_an_older_list(crl: Path, tmp_path: Path) -> None:
    assert list(check_revocations(CheckedSite(folder=tmp_path))) == []  # no command does that here
    deliver_list("true", tmp_path, crl)
    assert list(check_revocations(CheckedSite(folder=tmp_path))) == []
    crl.write_text("second")
    assert [a.kind for a in check_revocations(CheckedSite(folder=tmp_path))] == ["revocations"]


def test_the_doctor_says_that_the_command_never_worked_until_there_is_none(crl: Path, tmp_path: Path) -> None:
    with list_delivery("/no/such/program", tmp_path, crl):
        assert [a.kind for a in check_revocations(CheckedSite(folder=tmp_path))] == ["revocations"]
    with list_delivery("off", tmp_path, crl):
        assert list(check_revocations(CheckedSite(folder=tmp_path))) == []


@pytest.mark.parametrize("wrong", ["", "  ", "a 'b"])
def test_what_is_no_command_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="on_revocation"):
        ServerConfig(on_revocation=wrong)
