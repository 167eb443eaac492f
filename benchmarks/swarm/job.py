"""The job that a swarm works on: a small net for the demo's digits, whose weights are a file of 103 kB."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fedprune.core.rng import keyed_generator
from fedprune.model.recipe import Recipe
from fedprune.planning.cost_prediction import predict_costs
from fedprune.planning.profile_store import find_profile
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.digits import deal_digits

_REFERENCE = 256
"""Samples for which training times are predicted."""

# Channels keep their order, so that whole submodels are as the model is; and every update counts in full, because the
# next model is compared with the mean of all updates.
FLEET = """\
[job]
name = "swarm"
rounds = {rounds}
devices = {devices}
density = 1.0
scorer = "ordered"
deadline_s = 3600
move_limit = 0
weight_limit = 0

[model]
path = "model.onnx"

[evaluation]
data = "evaluation.npz"

[server]
site = "{site}"
broker = "{broker}"
state = "state"
max_devices = {devices}
pulls = {pulls}
"""

ENGINES = """\
database = "{database}"
blobs = "s3://{bucket}/swarm"
uploads = "s3"
"""
"""Where a PostgreSQL server and a bucket do what the state folder does otherwise."""


def small_cnn() -> bytes:
    """A net of 25,730 numbers, two convolutions and two linear layers, for 8×8 images, as an ONNX file."""
    chance = keyed_generator(0, "swarm", "model")
    shapes = {
        "conv1.weight": (16, 1, 3, 3), "conv1.bias": (16,), "conv2.weight": (32, 16, 3, 3), "conv2.bias": (32,),
        "fc1.weight": (40, 512), "fc1.bias": (40,), "fc2.weight": (10, 40), "fc2.bias": (10,),
    }  # fmt: skip
    values = {
        n: (chance.standard_normal(s) / math.sqrt(math.prod(s[1:]))).astype(np.float32) for n, s in shapes.items()
    }
    nodes = [
        helper.make_node("Conv", ["x", "conv1.weight", "conv1.bias"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "conv2.weight", "conv2.bias"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "fc1.weight", "fc1.bias"], ["f"], transB=1),
        helper.make_node("Relu", ["f"], ["g"]),
        helper.make_node("Gemm", ["g", "fc2.weight", "fc2.bias"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "swarm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(v, n) for n, v in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    raw: bytes = model.SerializeToString()
    return raw


def write_job(folder: Path, devices: int, rounds: int, broker: str, site: str, pulls: int, more: str = "") -> Path:
    """Write a job's files into a folder; `more` are further settings of the server. Returns the path of the
    `fleet.toml`."""
    (folder / "model.onnx").write_bytes(small_cnn())
    hand = deal_digits(["one"])
    np.savez(folder / "evaluation.npz", x=hand.x, y=hand.y)
    path = folder / "fleet.toml"
    path.write_text(FLEET.format(rounds=rounds, devices=devices, broker=broker, site=site, pulls=pulls) + more)
    return path


def seconds_per_sample(profiles: list[str]) -> dict[str, float]:
    """What training on one sample takes on each kind of board, as the planner predicts it."""
    architecture = import_onnx(small_cnn(), "swarm").architecture
    return {
        name: predict_costs(architecture, architecture.sizes, find_profile(name), Recipe(), _REFERENCE).train_s
        / _REFERENCE
        for name in profiles
    }
