import logging
import threading
from pathlib import Path

import pytest

from fedprune.core.disk import has_lock_holder
from fedprune.core.errors import StorageError
from fedprune_server.engine.state_folder import StateFolder
from fedprune_server.storage.folder_layout import MODEL_FILE
from fedprune_server.storage.folder_lock import LOCK_FILE, folder_lock
from support.waiting import until


def test_who_comes_second_is_told_and_the_lock_ends_with_its_block(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        assert has_lock_holder(tmp_path / LOCK_FILE)
        with pytest.raises(StorageError, match=str(tmp_path)), folder_lock(tmp_path):
            raise AssertionError("two have it")
        assert has_lock_holder(tmp_path / LOCK_FILE)
    assert not has_lock_holder(tmp_path / LOCK_FILE)


def test_a_standby_waits_as_long_as_it_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    has = threading.Event()

    def stand_by() -> None:
        with folder_lock(tmp_path, standby=True):
            has.set()

    with folder_lock(tmp_path):
        thread = threading.Thread(target=stand_by)
        thread.start()
        until(lambda: "standing by" in caplog.text)
        assert not has.is_set()
    assert has.wait(10)
    thread.join(10)


def test_a_folder_that_is_none_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="none"), folder_lock(tmp_path / "none"):
        raise AssertionError("there is no folder")


def test_a_new_state_folder_and_its_blobs_are_closed_to_other_users(tmp_path: Path) -> None:
    with StateFolder(tmp_path / "state") as folder:
        folder.store.put(b"an update")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / "blobs").stat().st_mode & 0o777 == 0o700


@pytest.mark.timeout(60)
def test_a_device_as_the_model_of_a_state_folder_is_refused(tmp_path: Path) -> None:
    with StateFolder(tmp_path / "state") as folder:
        (tmp_path / "state" / MODEL_FILE).symlink_to("/dev/zero")
        with pytest.raises(StorageError, match="not a regular file"):
            folder._check_foreign_model(b"")
