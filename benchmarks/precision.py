"""Lower precision beside float32: `FEDPRUNE_DATA=... python benchmarks/precision.py`.

A ResNet-20 is trained on CIFAR-10 with torch, for minutes rather than to its best, and lowered as a board does it: by
graphs alone, with ranges measured on training samples. Then every precision predicts the test samples, and latencies
are measured in turn, so that neighbours on the machine hit all alike.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from synthetic_nets import setting, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

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
            "stays_float32": list(lowered.stays),
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
    from fedprune.runtime.session import Session
    from fedprune_export.importing import export_torch, import_onnx

    model = import_onnx(export_torch(trained(samples, epochs), name="resnet20"), "resnet20")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make(folder, model, model.architecture.sizes, samples["x_train"])
        made[PEER] = peer(folder, model, samples["x_train"])
        files = {p: graph_file(p) for p in made} | {"float32": "inference.onnx", PEER: PEER_FILE}
        sessions = {p: Session(folder / file) for p, file in files.items()}
        outputs = {p: score(s, samples["x_test"]) for p, s in sessions.items()}
        times: dict[int, dict[str, list[float]]] = {b: {p: [] for p in sessions} for b in BATCHES}
        for batch in BATCHES:
            x = samples["x_test"][:batch]
            for turn in range(TURNS + 3):
                for precision, session in sessions.items():
                    began = time.perf_counter()
                    session.run({"x": x})
                    if turn >= 3:
                        times[batch][precision].append(time.perf_counter() - began)
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


def ways(samples: dict[str, Array], epochs: int) -> list[dict[str, Any]]:
    """int8 by several ways to choose a range; the first is what boards do."""
    from fedprune.core import tensorfile
    from fedprune.runtime.precision import prepare
    from fedprune.runtime.session import Session
    from fedprune_export.importing import export_torch, import_onnx
    from fedprune_export.ir.graph import Port
    from fedprune_export.precision import lower
    from fedprune_export.precision.folding import fold
    from fedprune_export.precision.quantisation import planned, settle
    from fedprune_export.precision.weight_prep import Pair

    model = import_onnx(export_torch(trained(samples, epochs), name="resnet20"), "resnet20")
    pair = Pair(model, model.architecture.sizes)
    fold(pair)
    settle(pair)
    values = planned(pair).values
    graph = model.graph.copy()
    free = {v: ("N", *map(str, range(len(pair.shape(v) or ()) - 1))) for v in values}
    graph.outputs = [Port(v, np.dtype(np.float32), free[v]) for v in values if v != "x"]
    session = Session(graph.to_bytes())
    parts = [{"x": p, **session.run({"x": p})} for p in np.array_split(samples["x_train"][:256], 8)]
    lowered = lower(model, model.architecture.sizes, "int8")
    prepared, rows = Session(lowered.prepare), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "int8.onnx").write_bytes(lowered.graph)
        for title, choose in WAYS.items():
            ranges = np.array([choose([p[v] for p in parts]) for v in values], np.float32)
            made = prepare(prepared, model.tensors, ranges)
            (folder / "int8.safetensors").write_bytes(tensorfile.encode(made))
            decided = score(Session(folder / "int8.onnx"), samples["x_test"]).argmax(1)
            rows.append({"way": title, "accuracy": float(np.mean(decided == samples["y_test"]))})
    return rows


def _mean(parts: list[Array]) -> tuple[float, float]:
    return float(np.mean([p.min() for p in parts])), float(np.mean([p.max() for p in parts]))


def _widest(parts: list[Array]) -> tuple[float, float]:
    return float(min(p.min() for p in parts)), float(max(p.max() for p in parts))


def _quantile(parts: list[Array]) -> tuple[float, float]:
    low, high = np.quantile(np.concatenate([p.ravel() for p in parts]), (1e-3, 1 - 1e-3))
    return float(low), float(high)


def _least_error(parts: list[Array]) -> tuple[float, float]:
    """The part of the widest range with the least squared error of what is rounded to it."""
    numbers = np.concatenate([p.ravel() for p in parts])
    numbers = numbers[:: max(1, len(numbers) // 200_000)]
    low, high = min(float(numbers.min()), 0.0), max(float(numbers.max()), 0.0)

    def error(share: float) -> float:
        scale = max(share * (high - low) / 255, 1e-12)
        zero = np.round(-share * low / scale)
        return float(np.mean((numbers - scale * (np.clip(np.round(numbers / scale) + zero, 0, 255) - zero)) ** 2))

    best = min((1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5), key=error)
    return best * low, best * high


WAYS = {
    "mean over batches of the least and the largest number": _mean,
    "the least and the largest number of all": _widest,
    "99.9% of all numbers": _quantile,
    "least squared error": _least_error,
}


def page(about: dict[str, Any], rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """The tables."""
    lines = []
    for r in rows:
        cells = [r["precision"], f"{r['accuracy']:.2%}", f"{r['same']:.2%}", f"{r['bytes']:,}"]
        for batch in BATCHES:
            low, median, high = r[f"batch_{batch}"]["times_float32"]
            cells += [f"{1000 * r[f'batch_{batch}']['seconds']:.3g} ms", f"{median:.2f} ({low:.2f} to {high:.2f})"]
        prepared = r.get("prepare_seconds")
        cells.append("–" if prepared is None else f"{prepared:.2f} s")
        lines.append(f"| {' | '.join(cells)} |")
    by = {r["precision"]: r for r in rows}
    lost = 100 * (by["float32"]["accuracy"] - by["int8"]["accuracy"])
    faster = [by["int8"][f"batch_{b}"]["times_float32"][1] for b in BATCHES]
    met = lost <= 1 and min(faster) > 1
    table = "\n".join(lines)
    ways_table = "\n".join(f"| {o['way']} | {o['accuracy']:.2%} |" for o in others)
    return f"""# Lower precision

{about["date"]}, {about["cpu"]}, one thread, Python {about["python"]}, onnxruntime {about["onnxruntime"]}, numpy
{about["numpy"]}. `FEDPRUNE_DATA=... python benchmarks/precision.py`

ResNet-20 with batch norms, {about["epochs"]} epochs on CIFAR-10 (minutes, not its best), on the 10,000 test
samples. Ranges of activations come from 256 training samples. int8 loses {lost:.2f} points and is {faster[0]:.2f} and
{faster[1]:.2f} times as fast as float32: the bar (at most one point, faster) is {"met" if met else "NOT met"}.

*same*: test samples decided as by float32. *faster*: float32's time over this one's within a turn, median and quartiles
of {TURNS} turns. *prepared*: what a board does after a round, with the measuring of ranges.

The last row is onnxruntime's `quantize_static`, which needs onnx and so no board has, with the same types and samples.

| precision | accuracy | same | bytes | batch 1 | faster | batch 32 | faster | prepared |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
{table}

onnxruntime folds norms by itself when it loads float32, so that `folded` is as fast. It has no float16 kernels for most
operators of this processor and computes them in float32: float16 halves the file here, and is not faster. The machine
had other work to do meanwhile (load {about["load"]}); ratios within a turn are hit less than times.

## Ranges of activations

int8 by how ranges are chosen; boards do the first. One that leaves out a thousandth of the numbers is worse, the others
are alike, and the first needs no memory of what it has seen.

| range | accuracy |
|---|---:|
{ways_table}
"""


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    samples = data()
    rows, others = measure(samples, arguments.epochs), ways(samples, arguments.epochs)
    about = {**setting("onnxruntime", "onnx", "torch"), "epochs": arguments.epochs}
    write("precision", {**about, "rows": rows, "ranges": others}, page(about, rows, others))


if __name__ == "__main__":
    main()
