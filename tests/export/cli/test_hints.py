"""Each hint of an import, a plan, a bundle or a server's configuration that names a command or an option is followed on
the same input: it helps, and what comes out computes what the file does. A hint without a case fails, by its place."""

import fcntl
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static

import fedprune_export as fx
from fedprune import Strategy
from fedprune.jobs.job import Job
from fedprune.planning import profile_store
from fedprune.planning.probe_report import ProbeReport
from fedprune.runtime.bundle import open_bundle
from fedprune.runtime.session import OnnxSession
from fedprune_export.ir.graph import Graph, Port
from fedprune_server.storage.storage import Storage
from support import hints
from support.fakes.recorded_job import JOB, play_job
from support.oracles.cutting import distance

pytestmark = pytest.mark.torch

SELF = __name__
F32 = np.dtype(np.float32)
SAMPLES = np.random.default_rng(1).random((32, 6), np.float32)


def net(build: Callable[[Graph], str], *outputs: str, shape: tuple[int | str, ...] = (6,), **tensors: Any) -> bytes:
    """A model of `image` with tensors of these shapes or values, that ends in what is built, or in these outputs."""
    rng = np.random.default_rng(0)
    graph = Graph(inputs=[Port("image", F32, ("N", *shape))])
    for name, value in tensors.items():
        drawn = isinstance(value, tuple)
        graph.initializers[name] = 0.4 * rng.standard_normal(value).astype(np.float32) if drawn else value
    last = build(graph)
    proto = onnx.load_model_from_string(graph.to_bytes())
    names = outputs or (last,)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    feed = rng.random((9, *(size if isinstance(size, int) else 8 for size in shape)), np.float32)
    found = OnnxSession(proto.SerializeToString()).run({"image": feed})
    del proto.graph.output[:]
    for name in names:
        kind, dims = onnx.helper.np_dtype_to_tensor_dtype(found[name].dtype), found[name].ndim * [None]
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, dims))
    raw: bytes = proto.SerializeToString()
    return raw


def layers(g: Graph) -> str:
    return g.emit("MatMul", g.emit("Relu", g.emit("MatMul", "image", "w"), out="h"), "v", out="l")


def shares(g: Graph) -> str:
    powers = g.emit("Exp", layers(g))
    return g.emit("Div", powers, g.emit("ReduceSum", powers, g.ints(1)), out="p")


def pooled(g: Graph) -> str:
    places = g.emit("ReduceMean", g.emit("Conv", "image", "w"), attrs={"axes": [2, 3], "keepdims": 0})
    return g.emit("MatMul", places, "v", out="l")


def normed(g: Graph) -> str:
    return g.emit("MatMul", g.emit("LayerNormalization", g.emit("MatMul", "image", "w"), "s"), "v", out="l")


def wide(g: Graph) -> str:
    rows = g.emit("BatchNormalization", g.emit("MatMul", "image", "w"), "s", "o", "m", "one")
    return g.emit("MatMul", g.emit("Relu", rows), "v", out="l")


def detector(g: Graph) -> str:
    raw = g.emit("MatMul", g.emit("Reshape", g.emit("MatMul", "image", "w"), g.ints(0, 5, 8)), "v", out="raw")
    corners, classes = g.emit_many(
        "Split",
        g.emit("Transpose", raw, attrs={"perm": [0, 2, 1]}, out="raw7"),
        g.ints(4, 3),
        outputs=2,
        attrs={"axis": 1},
    )
    boxes = g.emit("Transpose", corners, attrs={"perm": [0, 2, 1]})
    return g.emit("NonMaxSuppression", boxes, g.emit("Sigmoid", classes), g.ints(4), out="chosen")


def cached(g: Graph) -> str:
    """Attention whose cache is an output, too."""
    made = g.emit_many("Attention", "image", "q", "b", outputs=2, attrs={"num_heads": 2}, domain="com.microsoft")
    g.emit("Identity", made[1], out="cache")
    return g.emit("MatMul", made[0], "v", out="l")


def stacked(g: Graph) -> str:
    rows = g.emit("MatMul", g.emit("Unsqueeze", "image", g.ints(1, 2)), "s")
    return g.emit("ReduceSum", rows, g.ints(1, 2), attrs={"keepdims": 0}, out="l")


def determinant(g: Graph) -> str:
    squares = g.emit("Reshape", layers(g), g.ints(0, 1, 2, 2))
    return g.emit("Mul", g.emit("Det", squares), "s", out="det")


def early(g: Graph) -> str:
    grid = g.emit("Reshape", g.emit("Tanh", layers(g)), g.ints(0, 1, 2, 2))
    picture = g.emit("Reshape", "image", g.ints(0, 1, 2, 3))
    return g.emit("Flatten", g.emit("GridSample", picture, grid), out="seen")


def loss(outputs: int) -> bytes:
    """A loss of one's own: squared distances."""
    g = Graph(inputs=[Port(name, F32, ("N", outputs)) for name in ("outputs", "labels")])
    apart = g.emit("Sub", "outputs", "labels")
    g.outputs = [Port(g.emit("ReduceSum", g.emit("Mul", apart, apart), g.ints(1), attrs={"keepdims": 0}), F32, ("N",))]
    return g.to_bytes()


def closeness(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -(outputs - labels).abs().flatten(1).mean(1)


class Words(torch.nn.Module):
    """A model of token ids that doesn't say so."""

    input_shape = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = torch.nn.Embedding(37, 16), torch.nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out(self.words(x).mean(1))
        return logits


class Tied(torch.nn.Linear):
    """Scores by the table that it multiplies with twice: no layer tells which axis the classes are on."""

    input_shape = (6, 6)

    def __init__(self) -> None:
        super().__init__(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.weight @ x) @ self.weight.T


def shapeless() -> torch.nn.Module:
    return torch.nn.Linear(4, 3)


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self._batches = iter([{"image": SAMPLES}])

    def get_next(self) -> Any:
        return next(self._batches, None)


def quantised() -> bytes:
    Path("float.onnx").write_bytes(net(layers, **DENSE))
    quantize_static("float.onnx", "int8.onnx", Calibration())
    return Path("int8.onnx").read_bytes()


def labelled(y: Any) -> bytes:
    np.savez("labelled.npz", x=SAMPLES, y=y)
    return Path("labelled.npz").read_bytes()


def board(table: str, **settings: Any) -> bytes:
    profile = profile_store.find_profile("raspberry-pi-5")
    changed: Any = {table: replace(getattr(profile, table), **settings)}
    return replace(profile, **changed).to_json().encode()


def busy() -> None:
    """Another export holds the folder's lock until this process ends."""
    Path("b").mkdir()
    fcntl.flock(os.open("b/.bundle.lock", os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)


def strategy(job: Job) -> Strategy:
    return Strategy(inputs="sum")


def planted() -> None:
    """A state folder whose database names a strategy of the user's own."""
    play_job(Path("state"))
    with Storage("sqlite:///state/server.db") as storage:
        settings = storage.settings() or {}
        storage.put_settings(settings | {"job": JOB.to_dict() | {"strategy": f"{SELF}:strategy"}})


DENSE: dict[str, Any] = {"w": (6, 8), "v": (8, 4)}
FILES: Mapping[str, Callable[[], bytes | None]] = {
    "net.onnx": lambda: net(layers, **DENSE),
    "shares.onnx": lambda: net(shares, **DENSE),
    "sigmoid.onnx": lambda: net(lambda g: g.emit("Sigmoid", layers(g), out="p"), **DENSE),
    "squeezed.onnx": lambda: net(
        lambda g: g.emit("Squeeze", g.emit("Sigmoid", layers(g), out="s"), g.ints(1), out="p"), w=(6, 8), v=(8, 1)
    ),
    "two.onnx": lambda: net(layers, "l", "h", **DENSE),
    "whole.onnx": lambda: net(lambda g: g.emit("Cast", layers(g), attrs={"to": 7}, out="whole"), **DENSE),
    "free.onnx": lambda: net(pooled, shape=(3, "H", "W"), w=(8, 3, 3, 3), v=(8, 4)),
    "fixed.onnx": lambda: net(pooled, shape=(3, 8, 8), w=(8, 3, 3, 3), v=(8, 4)),
    "normed.onnx": lambda: net(normed, s=(8,), **DENSE),
    "scaled.onnx": lambda: net(lambda g: g.emit("MatMul", g.emit("Mul", "image", "s"), "v", out="l"), s=(6,), v=(6, 4)),
    "weightless.onnx": lambda: net(lambda g: g.emit("Mul", "image", "s", out="l"), s=(6,)),
    "stacked.onnx": lambda: net(stacked, s=(2, 6, 4)),
    "cancelling.onnx": lambda: net(
        lambda g: g.emit("MatMul", g.emit("MatMul", "image", "w"), "v", out="l"),
        w=300 + SAMPLES[:6, :2],
        v=np.outer([1, -1], [1, 2, 4, 8]).astype(np.float32),
    ),
    "long.onnx": lambda: net(layers, w=(6, 30000), v=(30000, 4)),
    "wide.onnx": lambda: net(
        wide, s=(4000,), o=(4000,), m=(4000,), v=(4000, 4), w=(6, 4000), one=np.ones(4000, np.float32)
    ),
    "det.onnx": lambda: net(determinant, s=(1, 4), **DENSE),
    "early.onnx": lambda: net(early, **DENSE),
    "detector.onnx": lambda: net(detector, w=(6, 40), v=(8, 7)),
    "cached.onnx": lambda: net(cached, "l", "cache", shape=(5, 6), q=(6, 18), b=(18,), v=(6, 4)),
    "quantised.onnx": quantised,
    "loss.onnx": lambda: loss(4),
    "joint.onnx": lambda: loss(12),
    "samples.npz": lambda: labelled(np.arange(32) % 4),
    "values.npz": lambda: labelled(SAMPLES[:, :4]),
    "table.csv": lambda: "".join(
        f"{','.join(map(str, row))}\n" for row in [[*"abcdef", "label"], *([*x, i % 4] for i, x in enumerate(SAMPLES))]
    ).encode(),
    "list.txt": lambda: b"s\n",
    "probe.json": lambda: json.dumps(ProbeReport(4, 10**9, 10**9, 1.0).to_dict()).encode(),
    "small.json": lambda: board("memory", total_bytes=1_103_690_000, reserve_bytes=10**9, training_share=1.0),
    "reserved.json": lambda: board("memory", training_share=0.01),
    "metered.json": lambda: board("link", bytes_per_round=100),
    "full.json": lambda: board("storage", budget_bytes=2**20),
    "busy": busy,
    "state": planted,
}
TO = "--target raspberry-pi-5 --out b"
DATA = {"--data": "samples.npz"}
ENDS: dict[str, str | None] = {"--output": "l", "--loss": "joint.onnx"}
Case = hints.Case
CASES = (
    Case("{}. See `{} --help`", "profiles"),
    Case("See `{} --help`", "verify b --modle net.onnx"),
    Case("See `fedprune-export --help`", "verfy b"),
    Case("operators (`fedprune-export operators` lists them)", f"det.onnx {TO}"),
    Case("Use operators and forms that", f"early.onnx {TO} --opset 15"),
    Case(", or another --opset", f"early.onnx {TO} --opset 15", {"--opset": "18"}),
    Case("Name their logits as the output", f"shares.onnx {TO}"),
    Case("train it with a label per output", f"sigmoid.onnx {TO}"),
    Case("or say which output gives the logits", f"two.onnx {TO}", ENDS),
    *(
        Case("or say which output gives the logits", line, fill, before=f"two.onnx {TO} --loss joint.onnx")
        for line, fill in (
            ("groups two.onnx", ENDS),
            ("verify b --model two.onnx", ENDS | {"--output": None}),
            ("to-onnx two.onnx c.onnx", ENDS),
            ("to-torch two.onnx c.safetensors", ENDS),
            ("to-torch b c.safetensors --into two.onnx", ENDS | {"--output": None}),
        )
    ),
    Case("A detector needs a loss of its own", f"detector.onnx {TO} --loss mse", {"--loss": f"{SELF}:closeness"}),
    Case('Let the model end before it: --output {} (output="{}"), or export', f"squeezed.onnx {TO} --loss mse"),
    Case("Let the model end before it: --output {} (output={})", f"whole.onnx {TO}"),
    Case("or let it end at its logits (--output NAME)", f"cached.onnx {TO} --loss {SELF}:closeness", {"NAME": "l"}),
    Case("or list what is to be trained (--parameters FILE)", f"weightless.onnx {TO}", {"FILE": "list.txt"}),
    Case("--parameters FILE lists what is to be trained", f"scaled.onnx {TO}", {"FILE": "list.txt"}),
    Case("Where the file leaves sizes free", f"free.onnx {TO} --input-shape 3,2300,2300", {"--input-shape": "3,8,8"}),
    Case("Give numbers for them with --input-shape", f"free.onnx {TO}", {"3,H,W": "3,8,8"}),
    Case("Say at the import which axis they are on", f"{SELF}:Tied {TO}"),
    Case("--class-axis {}", f"{SELF}:Tied {TO}"),
    Case("Leave --input-shape (input_shape) out", f"fixed.onnx {TO} --input-shape 3,9,9"),
    Case("If it takes token ids, add --token-ids", f"{SELF}:Words {TO}"),
    Case("Give the module an attribute input_shape", f"{SELF}:shapeless {TO}", {"--input-shape": "4"}),
    Case(
        "Leave --lora (lora=) out",
        f"adapted.onnx {TO} --lora 2:*",
        before="net.onnx --target raspberry-pi-5 --out a --lora 2:* && to-onnx a adapted.onnx",
    ),
    Case("Give adapters, too", f"net.onnx {TO} --base int8", {"--lora": "2:*"}),
    Case("Give it with the model: --loss", f"net.onnx {TO} --set loss=custom", {"--loss": "loss.onnx"}),
    Case(
        "Give it with the model: --metric",
        f"net.onnx {TO} --loss mse --set metric=custom",
        {"--metric": f"{SELF}:closeness"},
    ),
    Case("leave --data (data=) out", f"net.onnx {TO} --loss loss.onnx --data samples.npz"),
    Case(
        "Export once without --data and --precision",
        f"net.onnx {TO} --data table.csv",
        {"OUT": "b", "PATH": "table.csv"},
        in_order=True,
    ),
    Case("random ones: --data gives real ones", f"net.onnx {TO} --precision float16", DATA),
    Case("Leave {} out of --precision", f"cancelling.onnx {TO} --loss mse --precision float16 --data values.npz"),
    Case("Leave int8 out of --precision", f"stacked.onnx {TO} --precision int8 --data samples.npz"),
    Case("Give some with --data", f"net.onnx {TO} --precision int8", DATA),
    Case("with --data they are measured", f"quantised.onnx {TO} --precision int8", DATA),
    Case("Leave --precision (precisions) or --base", f"net.onnx {TO} --lora 2:* --base int8 --precision float16"),
    Case("makes boards predict with 8 bits again", f"quantised.onnx {TO}", DATA),
    Case(
        "Give the model of the export, with the same",
        "verify b --model net.onnx",
        {"--output": "h", "--parameters": None, "--prefer": None},
        before=f"net.onnx {TO} --output h",
    ),
    Case(
        "use --others keep, or leave out --into",
        "to-torch b w.safetensors --into normed.onnx",
        before=f"normed.onnx {TO} --density 0.5",
    ),
    Case(
        "one --target",
        "net.onnx --target raspberry-pi-5,raspberry-pi-4b --out b --probe probe.json",
        {"--target": "raspberry-pi-5"},
    ),
    Case("no --labels", f"net.onnx {TO} --loss loss.onnx --labels classes"),
    Case("--labels {}", f"net.onnx {TO} --loss mse --labels classes"),
    Case("--set accumulate={}", "wide.onnx --target small.json --out b --set batch_size=16"),
    Case("--samples {}", "net.onnx --target small.json --out b --samples 2000000", {}),
    Case("--deadline {0}", f"net.onnx {TO} --deadline 1e-6"),
    Case("--bytes-per-round {0}", f"net.onnx {TO} --bytes-per-round 10"),
    Case("--joules-per-round {0}", f"net.onnx {TO} --joules-per-round 1e-6"),
    Case("a larger share of the board's memory", "net.onnx --target reserved.json --out b"),
    Case("link.bytes_per_round = {}", "net.onnx --target metered.json --out b"),
    Case("storage.budget_bytes = {}", "long.onnx --target full.json --out b"),
    Case("software.tier =", "net.onnx --target jetson-orin-nano --out b --joules-per-round 0.06"),
    Case("trains on: GPU; its processor would take", "net.onnx --target jetson-orin-nano --out b"),
    Case(
        "Give another --out for several targets",
        "net.onnx --target raspberry-pi-5,raspberry-pi-4b --out b",
        {"--out": "c"},
        before=f"net.onnx {TO}",
    ),
    Case("Give another --out.", "net.onnx --target raspberry-pi-5 --out samples.npz/b", {"--out": "c"}),
    Case("Empty it, or give another --out", "net.onnx --target raspberry-pi-5 --out .", {"--out": "c"}),
    Case(
        "Give another --out, or delete the folder",
        "net.onnx --target raspberry-pi-4b --out b",
        {"--out": "c", "--target": None},
        before=f"net.onnx {TO}",
    ),
    Case("Wait until it is done, or give another --out", f"net.onnx {TO} --name busy", {"--out": "c"}),
    Case("--serve-blobs [ADDRESS:]PORT", "fedprune-server config show --uploads https", {"[ADDRESS:]PORT": "8471"}),
    Case("--blobs s3://bucket/prefix", "fedprune-server config show --uploads s3"),
    Case("If this code is yours, add --allow", "fedprune-server export-model --state state --out hub"),
)
HINTS = hints.hints_in(
    "export",
    *(f"toolkit/fedprune/{room}" for room in ("core", "jobs", "model", "planning", "runtime")),
    "server/fedprune_server/config",
)


def test_each_hint_has_a_case() -> None:
    hints.check_all_have_cases(HINTS, CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.hint[:40])
def test_a_hint_helps(
    case: hints.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, make in FILES.items():
        if name in " ".join(filter(None, [case.before, case.line, *case.fill.values()])) and (raw := make()):
            Path(name).write_bytes(raw)
    for line in filter(None, case.before.split(" && ")):
        assert hints.run(line.split(), capsys)[0] == 0
    shown = hints.shown_hint(case, HINTS, capsys)
    ways = list(case.ways(shown))
    assert ways
    for words in ways:
        code, printed = hints.run(words, capsys)
        assert code == 0, f"{shown!r} says {words}: {printed}"
        if words[0].endswith(".onnx") and "," not in words[words.index("--target") + 1]:
            check_bundle(Path(words[0]), words, capsys)
    for name, value in re.findall(r"(\w+)=[\"'](.+?)[\"']", shown):
        fx.load(case.line.split()[0], **{name: value})


def check_bundle(source: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The bundle is sound; if it is whole, its outputs are the file's: the named or only one as logits, or those that
    follow the logits."""
    bundle, output = words[words.index("--out") + 1], words[words.index("--output") + 1] if "--output" in words else ""
    assert hints.run(["verify", bundle], capsys)[0] == 0
    assert hints.run(["to-onnx", bundle, "board.onnx"], capsys)[0] == 0
    proto = onnx.load_model(source)
    names = [o.name for o in proto.graph.output]
    if output and output not in names:
        proto.graph.output.append(onnx.ValueInfoProto(name=output))
    opened = open_bundle(Path(bundle))
    if opened.selection.widths != opened.architecture.sizes:
        return
    # What is stored or computed in 8 bits is near.
    tolerance = 0.2 if "--base" in words or source.stem == "quantised" else 1e-5
    x = np.random.default_rng(2).random((5, *opened.architecture.input_shape), np.float32)
    expected = OnnxSession(proto.SerializeToString()).run({proto.graph.input[0].name: x})
    found = OnnxSession(Path("board.onnx").read_bytes()).run({"x": x})
    logits = found.pop("logits")
    if output or not found:
        rows = np.concatenate([expected[name].reshape(5, -1) for name in ([output] if output else names)], 1)
        assert distance(logits.reshape(5, -1), rows) < tolerance
    for name, value in found.items():
        assert distance(value, expected[name]) < tolerance
