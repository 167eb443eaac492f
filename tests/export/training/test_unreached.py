"""Tensors that no gradient reaches are named, with what keeps it from them, where a bundle is made and verified."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core.errors import ModelError
from fedprune.model.features import Features
from fedprune_export.cli.main import main
from fedprune_export.importing import import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.training.step_graph import training_graph, unreached_notes

F32 = np.dtype(np.float32)


def random(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def net(*, decides: bool) -> bytes:
    """Features `w` that a layer `v` follows. A gate of the tensor `u` only decides; without it the features do."""
    graph = Graph(inputs=[Port("image", F32, ("N", 6))])
    graph.initializers = {"w": random(6, 5), "v": random(5, 3)}
    hidden = graph.emit("MatMul", "image", "w")
    if decides:
        graph.initializers["u"] = random(6, 5)
        opens = graph.emit("Greater", graph.emit("MatMul", "image", "u"), graph.scalar(0))
        graph.nodes[-1].name = "opens"
        hidden = graph.emit("Mul", hidden, graph.emit("Cast", opens, attrs={"to": 1}))
    else:
        hidden = graph.emit("Round", hidden)
        graph.nodes[-1].name = "whole"
    graph.outputs = [Port(graph.emit("MatMul", hidden, "v"), F32, ("N", 3))]
    return graph.to_bytes()


def test_a_tensor_of_which_only_a_decision_is_made_is_named() -> None:
    (note,) = unreached_notes(training_graph(import_onnx(net(decides=True), "net"), Features()).metadata)
    assert note.endswith("reaches them: u, behind node opens (Greater).")


def test_the_export_and_its_verification_name_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.onnx").write_bytes(net(decides=False))
    main([str(tmp_path / "net.onnx"), "--target", "raspberry-pi-5", "--out", str(tmp_path / "bundle")])
    assert "note: Never trained, because no gradient reaches them: w, behind node whole (Round)." in (
        capsys.readouterr().out
    )
    main(["verify", str(tmp_path / "bundle")])
    assert "a step moves 1 tensor. Never trained, because no gradient reaches them: w" in capsys.readouterr().out


def test_the_error_of_a_model_that_never_trains_names_it() -> None:
    graph = Graph(inputs=[Port("image", F32, ("N", 6))], initializers={"w": random(6, 3)})
    graph.outputs = [Port(graph.emit("Round", graph.emit("MatMul", "image", "w")), F32, ("N", 3))]
    graph.nodes[-1].name = "whole"
    with pytest.raises(ModelError, match=r"no trained tensor .*node whole \(Round\)"):
        training_graph(import_onnx(graph.to_bytes(), "net"), Features())
