import numpy as np
import pytest

from fedprune_device.engines.cuda import Cuda, Stream
from support.fakes.engine_board import EngineBoard

pytestmark = pytest.mark.board


def test_memory_is_kept_and_made_anew_where_it_is_too_small(board: EngineBoard) -> None:
    stream = Stream(Cuda())
    first = stream.buffer_address("x", 64)
    assert stream.buffer_address("x", 32) == first
    assert stream.buffer_address("y", 32) != first
    large = np.arange(1000, dtype=np.float64)
    stream.copy_to_device(stream.buffer_address("x", large.nbytes), large)
    back = np.zeros_like(large)
    stream.copy_from_device(back, stream.buffer_address("x", large.nbytes))
    stream.wait()
    np.testing.assert_array_equal(back, large)
    stream.close()
    stream.close()
