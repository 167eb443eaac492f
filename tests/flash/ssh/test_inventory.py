"""Inventories, journals and claims: what is refused before anything is sent, and what a kill may not undo."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import ConfigError, ExitCode, JoinError, StorageError
from fedprune.security.joining import Claim
from fedprune_flash import BoardSettings
from fedprune_flash.cli import main as cli
from fedprune_flash.ssh.connection import ssh_command
from fedprune_flash.ssh.inventory import BoardRow, read_inventory
from fedprune_flash.ssh.journal import Claims, Journal, read_claims
from support.paths import ROOT

pytestmark = pytest.mark.soak

DOCS = ROOT / "docs"
GOOD = {"device": "attic", "host": "attic.local", "board": "raspberry-pi-5"}


def claims(count: int) -> list[str]:
    return [Claim.make(bytes(12)).text for _ in range(count)]


def test_the_inventory_in_the_docs_is_one(tmp_path: Path) -> None:
    text = (DOCS / "flash-a-raspberry-pi.md").read_text()
    (example,) = re.findall(r"    \[defaults\]\n(?:(?:    .*)?\n)+", text)
    lines = [line[4:] for line in example.splitlines()]
    (tmp_path / "boards.toml").write_text("\n".join(line for line in lines if not line.startswith("key = ")))
    rows = read_inventory(tmp_path / "boards.toml")
    assert [row.device for row in rows] == ["attic", "cellar", "bench"]
    assert {row.user for row in rows} == {"ann", "nvidia"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"host": "-oProxyCommand=reboot"}, "host"),
        ({"host": "a b"}, "host"),
        ({"host": "a;reboot"}, "host"),
        ({"host": "ann@attic"}, "host"),
        ({"host": ""}, "host"),
        ({"host": 5}, "host: expected a text"),
        ({"port": 0}, "port"),
        ({"port": 65_536}, "port"),
        ({"port": "22"}, "port"),
        ({"port": True}, "port"),
        ({"user": "-l"}, "user"),
        ({"user": "a b"}, "user"),
        ({"user": "$(reboot)"}, "user"),
        ({"device": "all"}, "device"),
        ({"device": "a/b"}, "device"),
        ({"board": "raspberry-pi-6"}, "board"),
        ({"key": 'a"b'}, "key"),
        ({"key": "a\nb"}, "key"),
        ({"root": "relative"}, "root"),
        ({"root": "/a/../b"}, "root"),
        ({"root": "/a;b"}, "root"),
    ],
    ids=str,
)
def test_values_are_checked_before_anything_is_sent(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BoardRow(**{**GOOD, **changes})  # type: ignore[arg-type]
    assert words in str(caught.value)


@given(st.text(max_size=40))
def test_whatever_a_host_is_called_it_is_no_option(text: str) -> None:
    try:
        row = BoardRow("attic", text, "raspberry-pi-5")
    except ConfigError:
        return
    words = ssh_command(row, accept_new=False, length=1)
    assert words[-3:-1] == ["--", text]
    assert re.fullmatch(r"[A-Za-z0-9_:][A-Za-z0-9._:%-]*", text)
    assert "StrictHostKeyChecking=yes" in words


def test_new_hosts_are_believed_only_if_the_operator_says_so() -> None:
    row = BoardRow("attic", "fe80::1%eth0", "raspberry-pi-5", port=2222, user="ann")
    for accept, word in ((False, "yes"), (True, "accept-new")):
        words = ssh_command(row, accept_new=accept, length=1)
        assert f"StrictHostKeyChecking={word}" in words
        assert "BatchMode=yes" in words
        assert words[1:4] == ["-T", "-p", "2222"]
        assert {"ForwardAgent=no", "ForwardX11=no", "ClearAllForwardings=yes"} <= set(words)
        assert words[words.index("-l") + 1] == "ann"


def test_a_port_of_the_users_own_configuration_counts(tmp_path: Path) -> None:
    """As ssh itself reads it: what a command line says goes before any file."""
    (tmp_path / "config").write_text("Host attic\n  Port 2200\n  ForwardAgent yes\n  ForwardX11 yes\n")

    def understood(**changes: Any) -> list[str]:
        words = ssh_command(BoardRow(**{**GOOD, "host": "attic", **changes}), accept_new=False, length=1)
        command = [ssh, "-G", "-F", str(tmp_path / "config"), *words[1:]]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    ssh = shutil.which("ssh")
    if ssh is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must have ssh")
        pytest.skip("ssh is not installed")
    assert {"port 2200", "forwardagent no", "forwardx11 no"} <= set(understood())
    assert "port 2222" in understood(port=2222)
    assert "port 22" in understood(port=22)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "1 to 1000 tables"),
        ("board = 3", "1 to 1000 tables"),
        ("[[board]]\ndevice = 'a'\nhost = 'a'", "has no board"),
        ("[defaults]\nhost = 'a'\n[[board]]", "unknown key 'host'"),
        ("[[board]]\n" * 1001, "1 to 1000 tables"),
        ("[[", "not TOML"),
    ],
)
def test_a_file_that_is_no_inventory_is_one_line(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "boards.toml").write_text(text)
    code = cli.main(["ssh", str(tmp_path / "boards.toml"), "--kit", "none", "--dry-run"])
    error = capsys.readouterr().err
    assert code == ExitCode.CONFIG
    assert words in error
    assert error.count("\n") == 1


HEAD = "[defaults]\nboard = 'raspberry-pi-5'\n{defaults}\n\n[[board]]\ndevice = 'attic'\nhost = 'a'\n\n"


@pytest.mark.parametrize(
    ("row", "defaults", "said"),
    [
        ("[[board]]\n# one\ndevice = 'b'\n  host = 'a b'", "", "12:3: board 'b': host: expected a host's name"),
        ("[[board]]\ndevice = 'all'\nhost = 'b'", "", "10:1: board 'all': device: expected"),
        ("[[board]]\ndevice = 'b'\nhost = 'b'\nport = 0", "", "12:1: board 'b': port: expected"),
        ("[[board]]\ndevice = 'b'\nhost = 'b'\nboard = 'x'", "", "12:1: board 'b': board: "),
        ("[[board]]\ndevice = 'b'\nhost = 'b'\nserver = 'mqtts://a:b@h'", "", "12:1: board 'b': server"),
        ("[[board]]\ndevice = 'b'\nhost = 'b'\nport = 1\nserver = 'mqtts://h:0'", "", "13:1: board 'b': port of"),
        ("[[board]]\ndevice = 'b'\nhost = 'b'\nserver = 'mqtt://h'", "", "9:3: board 'b': a broker without TLS"),
        ("[[board]]\ndevice = 'b'\nhost = 'b'\njoin = 'h'", "", "12:1: board 'b': join"),
        ("[[board]]\ndevice = 'b'\nhost = 'b'\nsite = 'a b'", "", "12:1: board 'b': site"),
        ("[[board]]\ndevice = 'b'\nhost = 'b'\ndata = '/a/../b'", "", "12:1: board 'b': data"),
        ("[[board]]\ndevice = 'b'\nhost = 'b'\nkey = 'none'", "", "12:1: board 'b': key: there is no file"),
        ("[[board]]\ndevice = 'b'\nhost = 'b'", "known_hosts = 'none'", "3:1: board 'attic': known_hosts: there is no"),
        ("[[board]]\ndevice = 'b'\nhots = 'b'", "", "11:1: board 'b': unknown key 'hots' (did you mean 'host'?)"),
        ("[[board]]\nhost = 'b'", "", "9:3: board '' has no device"),
        ("[[board]]\nhost = 'b'\ndevice = 'attic'", "", "11:1: two boards with the device 'attic'"),
        ("[[board]]\nhost = 'a'\ndevice = 'b'", "", "10:1: two boards with the address 'a:22'"),
        ("", "user = '-l'", "3:1: board 'attic': user: expected a user's name"),
        ("[[board]]\nhost = 'b'\ndevice = 'b'\nportt = 5", "key = 'none'", "12:1: board 'b': unknown key 'portt'"),
        ("[[board]]\nhost = 'b'\ndevice = 'attic'", "key = 'none'", "11:1: two boards with the device 'attic'"),
        ("", "hots = 'x'", "3:1: defaults: unknown key 'hots'"),
        ("[bords]", "", "9:2: unknown table 'bords'"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path: Path, row: str, defaults: str, said: str) -> None:
    path = tmp_path / "boards.toml"
    path.write_text(HEAD.format(defaults=defaults) + row)
    with pytest.raises(ConfigError) as caught:
        read_inventory(path)
    assert str(caught.value).startswith(f"{path}:{said}")
    assert "a:b@" not in str(caught.value)


def test_what_a_board_is_told_is_the_kits_unless_it_says_otherwise() -> None:
    kit = BoardSettings("mqtts://one", "any", "lab", "/srv/x.npz", join="mqtts://one:9")
    assert BoardRow(**GOOD).told(kit) == BoardSettings(
        "mqtts://one", "attic", "lab", "/srv/x.npz", join="mqtts://one:9"
    )
    own = BoardRow(**GOOD, server="mqtts://two", site="home").told(kit)
    assert (own.server, own.site, own.data) == ("mqtts://two", "home", "/srv/x.npz")


def test_a_claim_is_given_once_and_to_the_same_board_again(tmp_path: Path) -> None:
    texts = claims(3)
    first = Claims(Journal(tmp_path / "journal"), texts)
    assert [first.claim("attic"), first.claim("cellar"), first.claim("attic")] == [texts[0], texts[1], texts[0]]
    journal = Journal(tmp_path / "journal")  # after a kill
    again = Claims(journal, texts)
    assert again.claim("attic") == texts[0]
    journal.handed("attic")
    assert again.claim("attic") == texts[2], "a board that was set up anew gets a new one"
    with pytest.raises(JoinError, match="no claim left"):
        again.claim("shed")
    assert texts[0] not in (tmp_path / "journal").read_text()
    assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o600


def test_a_journal_that_was_read_before_another_run_ended_is_read_again(tmp_path: Path) -> None:
    texts = claims(2)
    late = Journal(tmp_path / "journal")
    first = Journal(tmp_path / "journal")
    with first.alone():
        assert Claims(first, texts).claim("attic") == texts[0]
        first.handed("attic")
        with pytest.raises(StorageError, match="another run"), late.alone():
            pass
    with late.alone():
        assert Claims(late, texts).claim("cellar") == texts[1]


def test_two_inventories_share_a_file_of_claims(tmp_path: Path) -> None:
    texts, used = claims(3), tmp_path / "claims.used"
    one, other = (Claims(Journal(tmp_path / name), texts, used=used) for name in ("a", "b"))
    assert [one.claim("attic"), other.claim("attic"), one.claim("shed")] == texts
    assert not any(text in used.read_text() for text in texts)
    assert used.stat().st_mode & 0o777 == 0o600
    with pytest.raises(JoinError, match="no claim left"):
        other.claim("shed")
    (tmp_path / "a").unlink()  # a kill came after the claim was taken, and before the journal was written
    again = Claims(Journal(tmp_path / "a"), texts, used=used)
    assert [again.claim("shed"), again.claim("attic")] == [texts[2], texts[0]]
    used.write_text('{"used": 3}')
    with pytest.raises(StorageError, match="is damaged"):
        Claims(Journal(tmp_path / "c"), texts, used=used).claim("loft")


def test_runs_at_once_get_claims_of_their_own(tmp_path: Path) -> None:
    texts, found = claims(24), list[str]()

    def give(run: int) -> None:
        pool = Claims(Journal(tmp_path / f"journal {run}"), texts, used=tmp_path / "claims.used")
        found.extend(pool.claim(f"b{number}") for number in range(4))

    threads = [threading.Thread(target=give, args=(run,)) for run in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(texts)


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2}', '{"version": 1, "boards": {"a": {"used": [1]}}}', "\0"])
def test_a_damaged_journal_is_not_taken_for_an_empty_one(text: str, tmp_path: Path) -> None:
    (tmp_path / "journal").write_text(text)
    with pytest.raises(StorageError, match="is damaged or of another version"):
        Journal(tmp_path / "journal")


@pytest.mark.parametrize("text", ["FP1-OBKTJ3AI", "hello", "\xff"])
def test_lines_that_are_no_claims_are_named(text: str, tmp_path: Path) -> None:
    good = claims(1)[0]
    (tmp_path / "claims").write_text(f"\n{good}\n{text}\n", encoding="latin-1")
    with pytest.raises(JoinError, match="line 3"):
        read_claims(tmp_path / "claims")
    (tmp_path / "claims").write_text(f"{good}\n{good}\n")
    with pytest.raises(JoinError, match="twice"):
        read_claims(tmp_path / "claims")
    (tmp_path / "claims").write_text(f"{good.lower()}\n\n")
    assert read_claims(tmp_path / "claims") == (good,)
