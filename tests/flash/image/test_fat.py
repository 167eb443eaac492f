from __future__ import annotations

from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ImageError
from fedprune_flash.image.fat import Fat
from fedprune_flash.image.partitions import Region
from support.processes.disk_images import fsck_fat, make_fat, mcopy, mlist, mtype, run

WHEN = datetime(2026, 11, 21, 1, 2, 4)
KINDS = {12: (2048, 4), 16: (16_384, 2), 32: (40_960, 1)}


def opened(path: Path) -> tuple[Fat, Region]:
    file = path.open("r+b")
    try:
        region = Region(file, 0, path.stat().st_size, "boot")
        return Fat(region, WHEN), region
    except ImageError:
        file.close()
        raise


def close(fat: Fat, region: Region) -> None:
    fat.flush()
    region._file.close()


@pytest.fixture(params=sorted(KINDS))
def volume(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kilobytes, per_cluster = KINDS[request.param]
    return make_fat(tmp_path / f"fat{request.param}", kilobytes, request.param, per_cluster)


def test_what_mtools_wrote_is_read(volume: Path, tmp_path: Path) -> None:
    folder = tmp_path / "overlays"
    folder.mkdir()
    names = {"config.txt", "UPPER.TXT", "Mixed.Txt", "a long name.with.dots", "ünï.txt", "x" * 200}
    for name in names:
        (folder / name).write_text(name * 300)
    mcopy(volume, [folder])
    fat, region = opened(volume)
    assert {e.name for e in fat.listing("OVERLAYS")} == names
    for name in names:
        assert fat.read(f"overlays/{name}").decode() == name * 300
    assert fat.find("overlays/config.txt/x") is None
    assert fat.find("nothing/here") is None
    with pytest.raises(ImageError, match="at most 10 bytes"):
        fat.read("overlays/config.txt", 10)
    close(fat, region)
    fsck_fat(volume)


def test_a_full_disk_is_said_and_what_was_there_stays(volume: Path, tmp_path: Path) -> None:
    fat, region = opened(volume)
    fat.write("before", b"kept")
    close(fat, region)
    fat, region = opened(volume)
    with pytest.raises(ImageError, match="is full"):
        fat.write("much", b"x" * (fat.free + 1))
    region._file.close()
    fsck_fat(volume)
    assert (mlist(volume), mtype(volume, "before")) == ({"before"}, b"kept")
    fat, region = opened(volume)
    fat.write("all", b"x" * fat.free)
    assert fat.free == 0
    with pytest.raises(ImageError, match="full"):
        fat.make_folder("no more")
    close(fat, region)
    fsck_fat(volume)


def test_many_files_make_a_folder_grow_and_the_root_of_small_ones_full(volume: Path) -> None:
    fat, region = opened(volume)
    names = [f"a longer name for file number {i}.txt" for i in range(150)]
    for name in names:
        fat.write(f"sub/{name}", name.encode())
    close(fat, region)
    fsck_fat(volume)
    assert mlist(volume) == {"sub/", *(f"sub/{n}" for n in names)}
    run("mdel", "-i", volume, *(f"::sub/{name}" for name in names[::2]))
    fat, region = opened(volume)
    for name in names[:40:2]:
        fat.write(f"sub/{name}", b"again")
    close(fat, region)
    fsck_fat(volume)
    assert len(mlist(volume)) == 1 + 75 + 20
    if fat.bits != 32:
        fat, region = opened(volume)
        with pytest.raises(ImageError, match="root folder"):
            _fill_root(fat)
        region._file.close()


def _fill_root(fat: Fat) -> None:
    for number in range(1000):
        fat.write(f"LONG NAME {number}", b"")


@pytest.mark.parametrize("name", ["", "a:b", "a/..", "a.", "x" * 256])
def test_names_that_fat_forbids_are_refused(tmp_path: Path, name: str) -> None:
    volume = make_fat(tmp_path / "fat", 2048, 12, 4)
    fat, region = opened(volume)
    with pytest.raises(ImageError):
        fat.write(name, b"x")
    region._file.close()


_LETTERS = st.sampled_from("abcXYZ019 ._-~+'éß中")
_NAMES = st.text(_LETTERS, min_size=1, max_size=40).map(lambda s: s.strip(". ")).filter(bool)
_SIZES = st.one_of(st.integers(0, 3), st.integers(500, 5000), st.integers(20_000, 60_000))
_FOLDERS = st.sampled_from(["", "sub", "sub/Deeper one"])
_CHANGES = st.lists(st.tuples(_FOLDERS, _NAMES, _SIZES), max_size=25)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bits=st.sampled_from([12, 16, 32]), changes=_CHANGES)
def test_any_changes_leave_what_mtools_and_fsck_agree_with(bits: int, changes: list[tuple[str, str, int]]) -> None:
    with TemporaryDirectory() as folder:
        path = make_fat(Path(folder) / "fat", *(KINDS[bits][0], bits, KINDS[bits][1]))
        expected: dict[str, tuple[str, bytes]] = {}
        fat, region = opened(path)
        for number, (above, name, size) in enumerate(changes):
            whole = f"{above}/{name}".strip("/")
            key = "".join(c.upper() if len(c.upper()) == 1 else c for c in whole)
            content = bytes([number % 256]) * size
            fat.write(whole, content)
            expected[key] = (expected.get(key, (whole, b""))[0], content)
        close(fat, region)
        fsck_fat(path)
        again, region = opened(path)
        found = {n for n in mlist(path) if not n.endswith("/")}
        assert found == {name for name, _ in expected.values()}
        for name, content in expected.values():
            assert again.read(name) == content
            assert mtype(path, name) == content
        region._file.close()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_system_is_an_error_and_nothing_else(data: st.DataObject, base: bytes) -> None:
    raw = bytearray(base)
    for _ in range(data.draw(st.integers(1, 12))):
        where = data.draw(st.one_of(st.integers(0, 90), st.integers(512, 9000), st.integers(0, len(raw) - 1)))
        raw[where] = data.draw(st.integers(0, 255))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "fat"
        path.write_bytes(raw)
        try:
            fat, region = opened(path)
        except ImageError:
            return
        try:
            for entry in fat.listing():
                if entry.folder:
                    fat.listing(entry.name)
                else:
                    fat.read(entry.name)
            fat.write("new/file", b"x" * 3000)
            fat.flush()
        except ImageError:
            pass
        finally:
            region._file.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = make_fat(tmp_path_factory.mktemp("base") / "fat", 256, 12, 1)
    fat, region = opened(path)
    fat.write("cmdline.txt", b"x" * 3000)
    fat.write("folder/with a long name", b"y" * 5000)
    close(fat, region)
    return path.read_bytes()
