"""Layers whose weights are copies of an embedding's table, as exporters write tied ones, train with it."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import import_onnx
from support.oracles.cutting import distance, outputs

WORDS, WIDTH = 9, 4


def model_bytes(product: str, weight: np.ndarray, table: np.ndarray) -> bytes:
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]> net (int64[N,5] ids) => (float[N,{WORDS}] y) {{
            rows = Gather(table, ids) h = ReduceMean<axes=[1], keepdims=0>(rows) {product} }}"""
    )
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in (("table", table), ("weight", weight)))
    raw: bytes = model.SerializeToString()
    return raw


@pytest.mark.parametrize("is_turned", [True, False])
@pytest.mark.parametrize("is_copy", [True, False])
def test_a_copy_of_a_table_is_the_table(is_turned: bool, is_copy: bool) -> None:
    table = np.random.default_rng(0).standard_normal((WORDS, WIDTH)).astype(np.float32)
    weight = table if is_copy else table + np.float32(1e-3)
    product = "y = MatMul(h, weight)" if is_turned else "y = Gemm<transB=1>(h, weight)"
    raw = model_bytes(product, weight.T if is_turned else weight, table)
    model = import_onnx(raw, "net")
    ids = np.random.default_rng(1).integers(0, WORDS, (3, 5))
    assert distance(outputs(model.graph, ids), OnnxSession(raw).run({"ids": ids})["y"]) < 1e-6
    assert [t.name for t in model.architecture.tensors] == (["table"] if is_copy else ["table", "weight"])
    assert any("weight of table" in note for note in model.notes) == is_copy


def test_fresh_tables_of_equal_numbers_stay_apart() -> None:
    table = np.zeros((WORDS, WIDTH), np.float32)
    assert len(import_onnx(model_bytes("y = MatMul(h, weight)", table.T, table), "net").architecture.tensors) == 2
