import os
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import IdentityError, ProtocolError, SignatureError, StorageError, StorageFullError
from fedprune.security.keys import SigningKey, VerifyingKey
from support.processes.machine import small_disk

pytestmark = pytest.mark.board

KEY = SigningKey.make()


@given(st.binary(max_size=500))
@settings(deadline=None)
def test_a_signature_is_its_key_s_and_nobody_else_s(data: bytes) -> None:
    signature = KEY.sign(data)

    KEY.verifying_key.verify(signature, data)
    with pytest.raises(SignatureError, match="changed in transit"):
        SigningKey.make().verifying_key.verify(signature, data)
    with pytest.raises(SignatureError):
        KEY.verifying_key.verify(signature, data + b"x")


def test_a_saved_key_is_read_back_by_us_and_by_openssl_and_by_no_other_user(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "device.key"
    KEY.save(path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SigningKey.load(path).verifying_key == KEY.verifying_key
    assert "PRIVATE" not in repr(KEY)
    der = subprocess.run(
        ["openssl", "pkey", "-in", path, "-pubout", "-outform", "DER"], check=True, capture_output=True
    ).stdout
    assert der[-32:] == KEY.verifying_key.raw


def test_a_leftover_that_others_may_read_does_not_open_the_next_key_to_them(tmp_path: Path) -> None:
    path = tmp_path / "device.key"
    (tmp_path / ".device.key.partial").write_bytes(b"")
    (tmp_path / ".device.key.partial").chmod(0o666)
    KEY.save(path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_that_others_may_read_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "device.key"
    KEY.save(path)
    path.chmod(0o640)

    with pytest.raises(IdentityError, match=r"expected mode 0600, got 0640\. chmod 600"):
        SigningKey.load(path)


def test_a_key_that_belongs_to_another_user_is_not_ours_unless_that_is_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "device.key"
    KEY.save(path)
    if os.geteuid() == 0:
        assert SigningKey.load(path).verifying_key == KEY.verifying_key
        os.chown(path, 4712, -1)
        assert SigningKey.load(path).verifying_key == KEY.verifying_key  # root reads any user's
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)

    with pytest.raises(IdentityError, match=f"user {owner}"):
        SigningKey.load(path)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_file_that_is_no_key_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "device.key"
    path.write_bytes(content)
    path.chmod(0o600)

    with pytest.raises(IdentityError, match=r"device\.key"):
        SigningKey.load(path)


def test_a_key_of_another_kind_a_link_a_folder_and_nothing_are_refused(tmp_path: Path) -> None:
    ec_key_path, link, path = tmp_path / "other.key", tmp_path / "link.key", tmp_path / "device.key"
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", ec_key_path],
        check=True,
        capture_output=True,
    )
    ec_key_path.chmod(0o600)
    KEY.save(path)
    link.symlink_to(path)

    with pytest.raises(IdentityError, match="expected an Ed25519 key"):
        SigningKey.load(ec_key_path)
    for file, kind in ((link, "a link"), (tmp_path, "not a regular file")):
        with pytest.raises(StorageError, match=kind):
            SigningKey.load(file)
    with pytest.raises(IdentityError, match="missing"):
        SigningKey.load(tmp_path / "none")


def test_verifying_keys_travel_as_hex_and_people_compare_fingerprints() -> None:
    key = KEY.verifying_key

    assert VerifyingKey.from_hex(key.hex) == key
    assert len(key.fingerprint) == 24
    assert key.fingerprint.replace("-", "").startswith(key.id.hex())


@pytest.mark.parametrize("wrong", [None, "", "ab", "AB" * 32])
def test_what_is_no_verifying_key_is_named(wrong: object) -> None:
    with pytest.raises(ProtocolError, match="expected 64 hex digits"):
        VerifyingKey.from_hex(wrong)


def test_a_full_disk_leaves_the_old_key(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "16k") as folder:
        KEY.save(folder / "device.key")
        filler = (folder / "filler").open("wb", buffering=0)
        with filler, suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        with pytest.raises(StorageFullError, match="No space"):
            SigningKey.make().save(folder / "device.key")

        assert SigningKey.load(folder / "device.key").verifying_key == KEY.verifying_key
