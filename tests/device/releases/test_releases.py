"""Releases: what is refused before anything of it is unpacked, and what a wheel may hold."""

import json
import os
import stat
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import ExitCode, ReleaseError, StorageError
from fedprune.releases.release import (
    FILES,
    MANIFEST,
    SIGNATURE,
    Release,
    ReleaseFile,
    read_release,
    rewrite_release,
    sign_manifest,
    verified_release,
)
from fedprune.security.keys import SigningKey, VerifyingKey
from fedprune.wire.fleet_messages import MAX_MANIFEST_BYTES
from fedprune_device.launcher.launcher import SlotExit, launch
from fedprune_device.launcher.state import STABLE, STAGED, TRIAL
from fedprune_device.releases.installer import ReleaseInstaller, packages_on_board
from fedprune_device.releases.wheel import Wheel, contents_digest
from support.fakes.runtime_releases import KEY, PUBLIC, make_release, make_wheel, source, versions_in

pytestmark = pytest.mark.board

APP = ReleaseFile("app-7-py3-none-any.whl", "ab" * 32, 10)
GOOD = Release(7, "0.7.0", "cp311", "aarch64", "app:main", 1000, (APP,), "cd" * 32, system=("numpy",))


@pytest.fixture
def board(copy_board: Callable[..., Path]) -> ReleaseInstaller:
    return ReleaseInstaller(copy_board(), PUBLIC)


FILE = {"name": "a.whl", "sha256": "ab" * 32, "size": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"number": 2**31},
        {"entry": "os;:main"},
        {"system": "numpy"},
        {"files": [FILE, FILE]},
        {"files": [{**FILE, "name": "../a.whl"}]},
        {"files": [{**FILE, "name": f"{i}.whl", "sha256": f"{i:064x}"} for i in range(65)]},
        {"files": [{"name": f"{i}.whl", "sha256": f"{i:064x}", "size": 2**30} for i in range(3)]},
    ],
    ids=str,
)
def test_a_manifest_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    body = json.dumps({**json.loads(GOOD.to_bytes()), **changes}).encode()
    with pytest.raises(ReleaseError, match="manifest"):
        Release.from_bytes(body)


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_one_changed_byte_of_manifest_or_signature_is_noticed(at: int, change: int) -> None:
    manifest = GOOD.to_bytes()
    signature = sign_manifest(manifest, KEY)
    assert verified_release(manifest, signature, PUBLIC) == GOOD
    both = bytearray(manifest + signature)
    both[at % len(both)] ^= change
    with pytest.raises(ReleaseError, match="signature"):
        verified_release(bytes(both[: len(manifest)]), bytes(both[len(manifest) :]), PUBLIC)


def test_a_signature_for_another_purpose_is_worth_nothing() -> None:
    manifest = GOOD.to_bytes()
    other_key = SigningKey.make()
    for signature in (
        KEY.sign(b"fedprune bundle 1\n" + manifest),
        KEY.sign(manifest),
        sign_manifest(manifest, other_key),
        b"",
    ):
        with pytest.raises(ReleaseError, match="signature"):
            verified_release(manifest, signature, PUBLIC)
    with pytest.raises(ReleaseError, match=f"key {PUBLIC.fingerprint} alone"):
        verified_release(b" " * (MAX_MANIFEST_BYTES + 1), sign_manifest(b" " * (MAX_MANIFEST_BYTES + 1), KEY), PUBLIC)


def test_openssl_agrees_on_signatures(tmp_path: Path) -> None:
    secret, public, raw, message, signature = (
        tmp_path / n for n in ("key.pem", "public.pem", "raw", "message", "made")
    )

    def openssl(*arguments: object) -> int:
        return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, check=False).returncode

    assert openssl("genpkey", "-algorithm", "ed25519", "-out", secret) == 0
    secret.chmod(0o600)
    assert openssl("pkey", "-in", secret, "-pubout", "-out", public) == 0
    assert openssl("pkey", "-in", secret, "-pubout", "-outform", "DER", "-out", raw) == 0
    key, verifying = SigningKey.load(secret), VerifyingKey(raw.read_bytes()[-32:])
    message.write_bytes(b"fedprune release 1\n" + GOOD.to_bytes())
    signature.write_bytes(sign_manifest(GOOD.to_bytes(), key))
    verify = ("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", message, "-sigfile", signature)
    assert openssl(*verify) == 0
    assert openssl("pkeyutl", "-sign", "-inkey", secret, "-rawin", "-in", message, "-out", signature) == 0
    assert verified_release(GOOD.to_bytes(), signature.read_bytes(), verifying) == GOOD


def test_an_earlier_release_comes_again_under_a_higher_number_and_no_other(tmp_path: Path) -> None:
    old = make_release(tmp_path / "old", 3)
    before, _, _ = read_release(old, PUBLIC)
    renewed = rewrite_release(tmp_path / "new", old, KEY, number=9, created="2026-02-02T00:00:00Z")
    assert renewed == replace(before, number=9, created="2026-02-02T00:00:00Z")
    assert read_release(tmp_path / "new", PUBLIC)[0] == renewed
    for number in (3, 2):
        with pytest.raises(ReleaseError, match="expected above 3"):
            rewrite_release(tmp_path / "no", old, KEY, number=number, created="")
    with pytest.raises(ReleaseError, match="signature"):
        rewrite_release(tmp_path / "no", old, SigningKey.make(), number=9, created="")
    victim = old / FILES / before.files[0].sha256
    content = victim.read_bytes()
    for damage in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), None):
        victim.unlink() if damage is None else victim.write_bytes(damage)
        with pytest.raises(ReleaseError, match=before.files[0].name):
            rewrite_release(tmp_path / "no", old, KEY, number=9, created="")


def test_a_release_goes_into_the_slot_that_does_not_run_and_waits_there(
    board: ReleaseInstaller, tmp_path: Path
) -> None:
    folder = source(make_release(tmp_path / "two", 2))
    release = board.stage(folder)
    state = board.home.load()
    assert (state.phase, state.stable, state.highest) == (STAGED, "a", 2)
    assert board.home.checked_record("b").version == 2
    assert (versions_in(board.home.root / "a"), versions_in(board.home.root / "b")) == (
        {"VERSION = 1"},
        {"VERSION = 2"},
    )
    assert (board.home.root / "b" / "library" / "__init__.py").is_file(), "what lies under purelib goes to the root"
    assert board.stage(folder) == release
    board.arm(2, 60)
    board.arm(9, 90)
    state = board.home.load()
    assert (state.phase, state.left, state.seconds) == (TRIAL, 2, 60)
    with pytest.raises(StorageError, match="on trial"):
        board.stage(source(make_release(tmp_path / "three", 3)))


def test_a_newer_release_takes_the_place_of_a_staged_one(board: ReleaseInstaller, tmp_path: Path) -> None:
    board.stage(source(make_release(tmp_path / "two", 2)))
    board.stage(source(make_release(tmp_path / "three", 3)))
    state = board.home.load()
    assert (state.phase, state.highest, board.home.checked_record("b").version) == (STAGED, 3, 3)
    with pytest.raises(ReleaseError, match="above 3") as caught:
        board.stage(source(tmp_path / "two"))
    assert caught.value.exit_code == ExitCode.RELEASE


def test_a_slot_that_serves_since_the_other_was_found_damaged_is_not_written(
    board: ReleaseInstaller, tmp_path: Path
) -> None:
    board.stage(source(make_release(tmp_path / "two", 2)))
    board.home.save(board.home.load().commit())
    release = source(make_release(tmp_path / "three", 3))

    def fall_back(sha256: str) -> Path:
        (board.home.root / "b/app/part.py").write_text("VERSION = 9\n")
        launch(board.home, ["run"], lambda *_: SlotExit("", 0))
        return release.path(sha256)

    with pytest.raises(StorageError, match="slot a serves now"):
        board.stage(replace(release, path=fall_back))
    assert board.home.checked_record(board.home.load().stable).version == 1


def unchanged(board: ReleaseInstaller) -> bool:
    state = board.home.load()
    return (state.phase, state.highest, list((board.home.root / "b").iterdir())) == (STABLE, 1, [])


@pytest.mark.parametrize(
    ("changes", "message"), [({"unpacked": 100}, "unpacked"), ({"contents": "ab" * 32}, "not those of the release")]
)
def test_what_a_release_unpacks_to_is_what_it_says(
    board: ReleaseInstaller, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = make_release(tmp_path / "two", 2)
    manifest = replace(Release.from_bytes((folder / MANIFEST).read_bytes()), **changes).to_bytes()
    (folder / MANIFEST).write_bytes(manifest)
    (folder / SIGNATURE).write_bytes(sign_manifest(manifest, KEY))
    with pytest.raises(ReleaseError, match=message):
        board.stage(source(folder))
    assert unchanged(board)


def test_a_release_that_the_launcher_would_not_start_is_refused_before_it_is_pulled(
    board: ReleaseInstaller, tmp_path: Path
) -> None:
    other_key = SigningKey.make()
    folder = source(make_release(tmp_path / "two", 2, key=other_key))
    updater = ReleaseInstaller(board.home.root, other_key.verifying_key)
    for refuse in (updater.examine, updater.stage):
        with pytest.raises(ReleaseError, match=PUBLIC.fingerprint):
            refuse(folder)
        assert unchanged(board)
    assert list((board.home.root / "incoming").iterdir()) == []
    (board.home.root / "server.pub").write_text("no key")
    with pytest.raises(ReleaseError, match="holds no key"):
        updater.examine(folder)
    (board.home.root / "server.pub").write_text(other_key.verifying_key.hex)
    updater.stage(folder)


def test_packages_of_the_board_are_never_hidden(board: ReleaseInstaller, tmp_path: Path) -> None:
    assert packages_on_board(["numpy", "no_such_package"]) == {"numpy"}
    folder = make_release(tmp_path / "two", 2)
    wheel = make_wheel(tmp_path / "numpy-9-py3-none-any.whl", {"numpy/__init__.py": "VERSION = 2\n"})
    from fedprune.releases.release import write_release

    wheels = [wheel, *(folder / "wheels").iterdir()]
    contents = contents_digest(Wheel(path, path.name) for path in wheels)

    def release(files: tuple[ReleaseFile, ...]) -> Release:
        return replace(Release.from_bytes((folder / MANIFEST).read_bytes()), files=files, contents=contents)

    write_release(folder, release, wheels, KEY)
    with pytest.raises(ReleaseError, match="numpy"):
        ReleaseInstaller(board.home.root, PUBLIC, keep=("numpy", "tensorrt")).stage(source(folder))
    assert unchanged(board)
    board.stage(source(folder))


def test_a_file_that_is_not_what_was_signed_is_refused(board: ReleaseInstaller, tmp_path: Path) -> None:
    folder = make_release(tmp_path / "two", 2)
    victim = next((folder / "files").iterdir())
    content = victim.read_bytes()
    for damage in (content[:-1], content + b"x", bytes(len(content)), None):
        victim.unlink() if damage is None else victim.write_bytes(damage)
        with pytest.raises(ReleaseError, match=r"\.whl"):
            board.stage(source(folder))
        assert unchanged(board)
    victim.write_bytes(content)
    board.stage(source(folder))
    assert list((board.home.root / "incoming").iterdir()) == [], "wheels of a folder are unpacked from there"


def test_what_is_no_board_or_no_release_is_said_so(board: ReleaseInstaller, tmp_path: Path) -> None:
    folder = make_release(tmp_path / "two", 2)
    with pytest.raises(StorageError, match="has no runtime"):
        ReleaseInstaller(tmp_path / "nothing", PUBLIC).stage(source(folder))
    (folder / SIGNATURE).unlink()
    with pytest.raises(StorageError, match=r"release\.sig"):
        board.stage(source(folder))
    with pytest.raises(StorageError, match="no release is staged"):
        board.arm()


@pytest.mark.parametrize("name", ["../out.py", "/etc/out.py", "a\\b.py", "a/__pycache__/b.pyc"])
def test_a_name_that_leads_out_of_the_slot_is_refused(tmp_path: Path, name: str) -> None:
    for prefix in ("", "app-1.data/platlib/"):
        with pytest.raises(ReleaseError, match="plain file"):
            Wheel(make_wheel(tmp_path / "w.whl", {prefix + name: "x"}), "w.whl")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_links_doubles_and_damage_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("app/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "l.whl", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ReleaseError, match="plain file"):
        Wheel(tmp_path / "l.whl", "l.whl")
    with pytest.raises(ReleaseError, match="is there twice"):
        Wheel(make_wheel(tmp_path / "d.whl", {"a.py": "1", "a-1.data/purelib/a.py": "2"}), "d.whl")
    for data in (b"", b"PK", os.urandom(200)):
        (tmp_path / "n.whl").write_bytes(data)
        with pytest.raises(ReleaseError, match="is no wheel"):
            Wheel(tmp_path / "n.whl", "n.whl")
    wheel = make_wheel(tmp_path / "h.whl", {"a.py": os.urandom(1000)})
    raw = bytearray(wheel.read_bytes())
    raw[200] ^= 255
    wheel.write_bytes(raw)
    (tmp_path / "out").mkdir()
    with pytest.raises(ReleaseError, match="damaged"):
        list(Wheel(wheel, "h.whl").unpack(tmp_path / "out"))


@given(st.lists(st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=20), max_size=6, unique=True))
def test_whatever_a_wheel_is_made_of_nothing_is_written_outside(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("wheel")
    path, slot = folder / "w.whl", folder / "in" / "slot"
    slot.mkdir(parents=True)
    try:
        make_wheel(path, dict.fromkeys(names, "x"))
        list(Wheel(path, "w.whl").unpack(slot))
    except (
        ReleaseError,
        OSError,
        ValueError,
    ):  # UnicodeEncodeError of a lone surrogate, a file where a folder should be
        pass
    assert {p.name for p in folder.iterdir()} <= {"w.whl", "in"}
    assert [p.name for p in (folder / "in").iterdir()] == ["slot"]
