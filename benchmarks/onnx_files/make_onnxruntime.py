"""Files that tools made of other files: `python -m benchmarks.onnx_files.make_onnxruntime`.

onnxruntime's optimiser at its levels, its optimiser of transformers and its quantiser; the converter to float16;
onnx-simplifier; weights in files of their own; older opsets by onnx's version converter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.onnx_files.shelf import Made, Shelf, count_norms, inputs_of, installed, open_shelf

Tool = Callable[[Path, Path, dict[str, Any]], None]


def optimise(level: str, source: Path, target: Path, _: dict[str, Any]) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}")
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def optimise_transformer(model_type: str, source: Path, target: Path, _: dict[str, Any]) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    optimize_model(str(source), model_type, num_heads=2, hidden_size=16).save_model_to_file(str(target))


def quantise(form: str, source: Path, target: Path, inputs: dict[str, Any], **options: Any) -> None:
    from onnxruntime import quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = target.with_suffix(".ready")
    if form == "dynamic":
        ort.quantize_dynamic(source, target, **options)
        return

    class Samples(ort.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            sizes = [i.type.tensor_type.shape.dim[0].dim_value or 2 for i in onnx.load(source).graph.input]
            # All samples: ranges of a part of them would clip the rest.
            starts = range(0, len(next(iter(inputs.values()))), sizes[0])
            self._parts = iter([{n: v[i : i + sizes[0]] for n, v in inputs.items()} for i in starts])

        def get_next(self) -> dict[str, Any] | None:
            return next(self._parts, None)

    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    types = {"activation_type": ort.QuantType.QUInt8, "weight_type": ort.QuantType.QInt8}
    ort.quantize_static(
        str(ready), str(target), Samples(), quant_format=getattr(ort.QuantFormat, form), **types, **options
    )
    ready.unlink()


def to_float16(source: Path, target: Path, _: dict[str, Any], *, keep: bool = False) -> None:
    from onnxconverter_common import float16

    onnx.save(float16.convert_float_to_float16(onnx.load(source), keep_io_types=keep), target)


def simplify(source: Path, target: Path, _: dict[str, Any]) -> None:
    import onnxsim

    model, is_equal = onnxsim.simplify(onnx.load(source))
    if not is_equal:
        raise RuntimeError("onnx-simplifier's model computes something else")
    onnx.save(model, target)


def externalise(source: Path, target: Path, _: dict[str, Any]) -> None:
    # Shapes stay in the file, since onnxruntime reads them while it loads it.
    onnx.save(
        onnx.load(source), target, save_as_external_data=True, location=f"{target.stem}.weights", size_threshold=128
    )


def convert_version(opset: int, source: Path, target: Path, _: dict[str, Any]) -> None:
    onnx.save(onnx.version_converter.convert_version(onnx.load(source), opset), target)


SIMPLER = [("simplified", simplify, "float32", "onnxsim")]
FLOAT16 = [("float16", to_float16, "float16", "onnxconverter-common")]
KEPT16 = [("float16io", partial(to_float16, keep=True), "float16", "onnxconverter-common")]
EXTERNAL = [("external", externalise, "float32", "onnx")]
QDQ = [("qdq", partial(quantise, "QDQ"), "int8", "onnxruntime")]
CHANNELS = [("qdq-channels", partial(quantise, "QDQ", per_channel=True), "int8", "onnxruntime")]
QOPERATOR = [("qoperator", partial(quantise, "QOperator"), "int8", "onnxruntime")]
DYNAMIC = [("dynamic", partial(quantise, "dynamic"), "int8", "onnxruntime")]


def _levels(*levels: str) -> list[tuple[str, Any, str, str]]:
    return [(f"ort-{level}", partial(optimise, level), "float32", "onnxruntime") for level in levels]


def _transformer(kind: str) -> list[tuple[str, Any, str, str]]:
    return [("ort-transformer", partial(optimise_transformer, kind), "float32", "onnxruntime")]


def _opsets(*opsets: int) -> list[tuple[str, Any, str, str]]:
    return [(f"opset{n}", partial(convert_version, n), "float32", "onnx") for n in opsets]


# Files of make_torch, and what tools make of each: a name, the tool, how precisely it computes, and its package.
FILES: dict[str, list[tuple[str, Any, str, str]]] = {
    "resnet-legacy-17-training": [*_levels("basic", "extended", "all"), *SIMPLER, *EXTERNAL, *QDQ],
    "resnet-legacy-11": [*_opsets(13, 21), *FLOAT16, *KEPT16, *CHANNELS],
    "resnet-legacy-17-batch1": [*QDQ],
    "tv_mobilenet_v2-legacy-11": [*_levels("extended"), *QDQ],
    "tv_mobilenet_v3-legacy-13": [*_levels("extended"), *SIMPLER],
    "tv_shufflenet_v2-legacy-11": [*SIMPLER],
    "tv_swin-legacy-17-batch1": [*SIMPLER],
    "yolov8-legacy-17-batch1": [*SIMPLER, *QDQ],
    "unet-legacy-11": [*CHANNELS, *FLOAT16],
    "lstm-legacy-11": [*DYNAMIC, *_levels("extended")],
    "gru-legacy-13": [*KEPT16],
    "mlp-dynamo-18": [*QOPERATOR],
    "mlp-legacy-17-training": [*DYNAMIC],
    "squeezenet-legacy-11-batch1-softmax": [*_opsets(10)],
    "bert_words-legacy-17": [*_levels("basic", "extended"), *_transformer("bert"), *DYNAMIC, *FLOAT16],
    "bert-legacy-14": [*_transformer("bert")],
    "gpt2-dynamo-18": [*_transformer("gpt2"), *_levels("extended")],
    "hf_vit-dynamo-18": [*_transformer("vit"), *EXTERNAL],
    "vit-legacy-14": [*_levels("extended")],
    "conformer-legacy-17": [*_levels("extended")],
}

# Weights in blocks of channels, which onnxruntime writes for one kind of processor; and scales of channels in a file of
# opset 11, which onnxruntime doesn't run either. Operators on integers are refused, too.
REFUSED = ("resnet-legacy-17-training-ort-all", "resnet-legacy-11-qdq-channels", "unet-legacy-11-qdq-channels")


def main() -> None:
    shelf: Shelf = open_shelf(__doc__, "onnxruntime")
    for base, tools in FILES.items():
        if not (shelf.folder / f"{base}.json").exists():
            print(f"SKIPPED: files of {base}, which is not there", file=sys.stderr)
            continue
        for suffix, tool, rounding, package in tools:
            if (found := installed(package)) is None:
                print(f"SKIPPED: {base}-{suffix}: {package} is not installed", file=sys.stderr)
                continue
            shelf.add(f"{base}-{suffix}", partial(_make, shelf, base, tool, rounding, f"{package} {found}"))


def _make(shelf: Shelf, base: str, tool: Tool, rounding: str, by: str, path: Path) -> Made:
    facts, arrays = shelf.facts(base), shelf.arrays(base)
    inputs = inputs_of(arrays)
    tool(shelf.folder / f"{base}.onnx", path, inputs)
    facts.exporter, facts.rounding = f"{facts.exporter}; {by}", rounding
    facts.refused = path.stem in REFUSED or path.stem.endswith("qoperator")
    # A step's reference holds while norms are folded, or not, as in the file that it was made with.
    if rounding != "float32" or count_norms(shelf.folder / f"{base}.onnx") != count_norms(path):
        if onnx.load(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16:
            inputs = {name: x.astype(np.float16) if x.dtype.kind == "f" else x for name, x in inputs.items()}
        arrays = {f"in.{name}": x for name, x in inputs.items()}
    return facts, arrays


if __name__ == "__main__":
    main()
