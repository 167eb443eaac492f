from __future__ import annotations

import numpy as np
import pytest

from fedprune.core.errors import EngineError
from fedprune_device.engines.cuda import Cuda, Stream
from support.fakes.engine_board import EngineBoard

pytestmark = pytest.mark.board


def test_the_real_library_has_these_functions_and_says_what_is_wrong() -> None:
    try:
        found = Cuda()
    except EngineError:
        pytest.skip("CUDA's runtime library can't be had here")
    device, wrong = None, ""
    try:
        device = found.device()
    except EngineError as error:
        wrong = str(error)
    if device is None:
        assert wrong.startswith("no NVIDIA GPU can be used on this machine (")
        assert "unknown" not in wrong
    else:
        assert 0 < device.memory_free <= device.memory_total
        stream = Stream(found)
        sent, back = np.arange(7, dtype=np.float32), np.zeros(7, np.float32)
        address = stream.memory("x", sent.nbytes)
        stream.put(address, sent)
        stream.get(back, address)
        stream.wait()
        np.testing.assert_array_equal(back, sent)


def test_memory_is_kept_and_made_anew_where_it_is_too_small(board: EngineBoard) -> None:
    stream = Stream(Cuda())
    first = stream.memory("x", 64)
    assert stream.memory("x", 32) == first
    assert stream.memory("y", 32) != first
    large = np.arange(1000, dtype=np.float64)
    stream.put(stream.memory("x", large.nbytes), large)
    back = np.zeros_like(large)
    stream.get(back, stream.memory("x", large.nbytes))
    stream.wait()
    np.testing.assert_array_equal(back, large)
    stream.close()
    stream.close()
