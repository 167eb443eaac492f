from __future__ import annotations

import onnx

from fedprune_export.importing.graph_writer import Names


def test_many_names_of_one_stem_are_unique_and_short() -> None:
    taken = onnx.helper.make_tensor_value_info("place_7", onnx.TensorProto.FLOAT, [])
    names = Names(onnx.GraphProto(input=[taken]))
    fresh = {names.fresh("place") for _ in range(20_000)}
    assert len(fresh - {"place_7"}) == 20_000
    assert max(map(len, fresh)) < 12
