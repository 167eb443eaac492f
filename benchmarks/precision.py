"""Lower precision beside float32: `FEDPRUNE_DATA=... python -m benchmarks.precision`.

A ResNet-20 is trained on CIFAR-10 with torch, for minutes rather than to its best, and lowered as a board does it: by
graphs alone, with ranges measured on training samples. Then every precision predicts the test samples, and latencies
are measured in turn, so that neighbours on the machine hit all alike.
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import in_turns, parser, save, setting

Array = npt.NDArray[Any]

FOLDER = Path("build/precision")
BATCHES = (1, 32)
TURNS = 200
EPOCHS = 9
BATCH = 128
RATE = 0.4
PEER, PEER_FILE = "int8 by onnxruntime's quantiser", "peer.onnx"


def data() -> dict[str, Array]:
    """CIFAR-10 as a board has it: channels first, scaled to about one."""
    with np.load(Path(os.environ["FEDPRUNE_DATA"]) / "cifar10.npz") as file:
        out = {n: file[n] for n in ("x_train", "y_train", "x_test", "y_test")}
    for name in ("x_train", "x_test"):
        x = out[name].transpose(0, 3, 1, 2).astype(np.float32) / 255
        out[name] = np.ascontiguousarray((x - 0.5) / 0.25)
    return out


def train(samples: dict[str, Array], epochs: int) -> Any:
    """A ResNet-20 with a one-cycle schedule, flips and shifts, in bfloat16 where that is faster."""
    import torch
    from torch.nn.functional import cross_entropy, pad

    from support.nets.small_nets import ResNet20

    torch.manual_seed(0)
    net = ResNet20().train().to(memory_format=torch.channels_last)
    x, y = torch.from_numpy(samples["x_train"]), torch.from_numpy(samples["y_train"].astype(np.int64))
    decayed = [p for p in net.parameters() if p.ndim > 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": [p for p in net.parameters() if p.ndim < 2]}]
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9, nesterov=True)
    per_epoch = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * per_epoch, pct_start=0.25)
    for epoch in range(epochs):
        began, total = time.monotonic(), 0.0
        order = torch.randperm(len(x))
        for rows in order[: per_epoch * BATCH].split(BATCH):
            part = pad(x[rows], (4, 4, 4, 4))
            top, left = (int(v) for v in torch.randint(0, 9, (2,)))
            part = part[:, :, top : top + 32, left : left + 32]
            flips = torch.rand(len(part)) < 0.5
            part = torch.where(flips[:, None, None, None], part.flip(3), part)
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(net(part.contiguous(memory_format=torch.channels_last)).float(), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1}: loss {total / per_epoch:.3f}, {time.monotonic() - began:.0f} s", flush=True)
    return net.eval().to(memory_format=torch.contiguous_format)


def trained(samples: dict[str, Array], epochs: int) -> Any:
    """The trained net; a later run takes what an earlier one has trained."""
    import torch

    from support.nets.small_nets import ResNet20

    path = FOLDER / f"resnet20-{epochs}.pt"
    if not path.exists():
        net = train(samples, epochs)
        FOLDER.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
    net = ResNet20()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def make(folder: Path, model: Any, widths: tuple[int, ...], x: Array) -> dict[str, dict[str, Any]]:
    """The files of all precisions, made as a board makes them; what is in each."""
    from fedprune.core import tensorfile
    from fedprune.model.selection import Selection
    from fedprune.runtime.precision import lowered_weights
    from fedprune.runtime.precision_files import PRECISIONS, weights_file
    from fedprune_export.bundles.inference import inference_model
    from fedprune_export.precision import lower

    tensors = Selection.of(model.architecture, widths).gather(model.tensors)
    (folder / "inference.onnx").write_bytes(inference_model(model, widths))
    (folder / "weights.safetensors").write_bytes(tensorfile.encode(tensors))
    found: dict[str, dict[str, Any]] = {"float32": {"bytes": (folder / "weights.safetensors").stat().st_size}}
    for precision in PRECISIONS:
        lowered = lower(model, widths, precision)
        for name, raw in lowered.files.items():
            (folder / name).write_bytes(raw)
        began = time.perf_counter()
        raw = lowered_weights(folder, precision, tensors, x)
        found[precision] = {
            "bytes": len(raw),
            "prepare_seconds": time.perf_counter() - began,
            "stays_float32": list(lowered.float32_nodes),
        }
        (folder / weights_file(precision)).write_bytes(raw)
    return found


def peer(folder: Path, model: Any, x: Array) -> dict[str, Any]:
    """What onnxruntime's own quantiser makes of the model, on a machine that has onnx: the same types and samples."""
    from onnxruntime import quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Samples(ort.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._parts = iter([{"x": p} for p in np.array_split(x[:256], 8)])

        def get_next(self) -> dict[str, Array] | None:
            return next(self._parts, None)

    (folder / "whole.onnx").write_bytes(model.graph.to_bytes())
    quant_pre_process(str(folder / "whole.onnx"), str(folder / "ready.onnx"))
    types = {"activation_type": ort.QuantType.QUInt8, "weight_type": ort.QuantType.QInt8, "per_channel": True}
    options = {"quant_format": ort.QuantFormat.QDQ, "extra_options": {"CalibMovingAverage": True}}
    ort.quantize_static(str(folder / "ready.onnx"), str(folder / PEER_FILE), Samples(), **types, **options)
    return {"bytes": (folder / PEER_FILE).stat().st_size}


def score(session: Any, x: Array) -> Array:
    """Logits of all samples."""
    return np.concatenate([session.run({"x": x[s : s + 500]})["logits"] for s in range(0, len(x), 500)])


def measure(samples: dict[str, Array], epochs: int) -> list[dict[str, Any]]:
    """A row per precision."""
    from fedprune.runtime.precision_files import graph_file
    from fedprune.runtime.session import OnnxSession
    from fedprune_export.importing import export_torch, import_onnx

    model = import_onnx(export_torch(trained(samples, epochs), name="resnet20"), "resnet20")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make(folder, model, model.architecture.sizes, samples["x_train"])
        made[PEER] = peer(folder, model, samples["x_train"])
        files = {p: graph_file(p) for p in made} | {"float32": "inference.onnx", PEER: PEER_FILE}
        sessions = {p: OnnxSession(folder / file) for p, file in files.items()}
        outputs = {p: score(s, samples["x_test"]) for p, s in sessions.items()}
        times = {}
        for batch in BATCHES:
            runs = {p: partial(session.run, {"x": samples["x_test"][:batch]}) for p, session in sessions.items()}
            times[batch] = in_turns(runs, TURNS, 3, time.perf_counter)
    whole = outputs["float32"].argmax(1)
    for precision, about in made.items():
        decided = outputs[precision].argmax(1)
        row: dict[str, Any] = {"precision": precision, **about}
        row["accuracy"] = float(np.mean(decided == samples["y_test"]))
        row["same"] = float(np.mean(decided == whole))
        for batch in BATCHES:
            mine, base = np.array(times[batch][precision]), np.array(times[batch]["float32"])
            row[f"batch_{batch}"] = {
                "seconds": float(np.median(mine)),
                "times_float32": [float(q) for q in np.quantile(base / mine, (0.25, 0.5, 0.75))],
            }
        rows.append(row)
    return rows


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--epochs", type=int, default=EPOCHS)
    options = command.parse_args()
    about = {**setting("onnxruntime", "onnx", "torch"), "epochs": options.epochs}
    save(options.out or "precision", {**about, "rows": measure(data(), options.epochs)})


if __name__ == "__main__":
    main()
