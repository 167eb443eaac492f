import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core import atomic_file
from fedprune.core.errors import EngineError
from fedprune_device.engines.engine_cache import CachedEngine, EngineCache

pytestmark = pytest.mark.board

SECONDS = st.none() | st.floats(0, sys.float_info.max)


@settings(max_examples=30)
@given(st.builds(CachedEngine, st.just("k"), SECONDS, SECONDS, st.booleans(), st.integers(0, 1000), st.text()))
def test_what_is_kept_is_known(record: CachedEngine) -> None:
    with tempfile.TemporaryDirectory() as root:
        EngineCache(Path(root)).write_record(record)
        assert EngineCache(Path(root)).read_record("k") == record
        assert EngineCache(Path(root)).read_record("other") == CachedEngine("other")


@pytest.mark.parametrize(
    "wrong",
    [
        *({"failures": value} for value in ("2", 10**400, None)),
        *({"refit_s": math.nan}, {"refits": 0}, {"reason": 3}, []),
    ],
)
def test_what_is_no_record_is_not_known(tmp_path: Path, wrong: Any) -> None:
    body = {**asdict(CachedEngine("k", failures=5)), **wrong} if isinstance(wrong, dict) else wrong
    atomic_file.write_document(tmp_path / "record.json", body)
    assert EngineCache(tmp_path).read_record("k") == CachedEngine("k")


LOADS = """
import sys
from pathlib import Path
from fedprune_device.engines.engine_cache import EngineCache
with EngineCache(Path(sys.argv[1])).mark_loading("e" * 64):
    print("loading", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another(root: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, in the middle of loading the engine."""
    command = [sys.executable, "-c", LOADS, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "loading\n"
        yield process
        process.kill()


def test_two_processes_may_load_an_engine_at_once(tmp_path: Path) -> None:
    cache, loaded = EngineCache(tmp_path), []
    with another(tmp_path) as process:
        with cache.mark_loading("e" * 64):
            loaded.append("beside it")
        # This one's end says nothing of the other: that may still come to its end by it.
        process.kill()
        process.wait()
    with pytest.raises(EngineError, match="ended the process before"), cache.mark_loading("e" * 64):
        loaded.append("after its end")
    with cache.mark_loading("f" * 64):
        loaded.append("another engine")
    assert loaded == ["beside it", "another engine"]


def test_making_an_engine_clears_away_what_a_build_left_and_nothing_of_a_process_that_loads(tmp_path: Path) -> None:
    left, live = tmp_path / ".engine.plan.partial", tmp_path / ".loading.json.partial"
    for path in (left, live):
        path.touch()
    with EngineCache(tmp_path).lock_for_build():
        assert (left.exists(), live.exists()) == (False, True)


def test_loading_that_comes_to_an_end_leaves_no_marker(tmp_path: Path) -> None:
    with another(tmp_path) as process:
        process.communicate("")
        assert process.returncode == 0
    with EngineCache(tmp_path).mark_loading("e" * 64):
        assert atomic_file.read_document(tmp_path / "loading.json") == {"sha256": "e" * 64}
    assert not (tmp_path / "loading.json").exists()
