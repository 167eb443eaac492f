"""The choices of a model's import, declared once: Python's, those of `fleet.toml`, and options of every command that
takes a model.

This module imports nothing of onnx, for which help texts must not wait.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from fedprune.core.cli import positive_integer, recipe_setting, setting_of
from fedprune.core.disk import read_file
from fedprune.core.errors import ConfigError, ModelError, path_remedy
from fedprune.core.json_file import read_json
from fedprune.core.settings import bounded
from fedprune.model.features import CUSTOM_LOSS, METRICS_OF
from fedprune.model.losses import LOSSES

# Which option comes first where channels can be cut in two ways: whole heads and groups, or positions within all.
Prefer = Literal["coarse", "fine"]
Base = Literal["float16", "int8"]
# The usual loss of each kind of labels, for users who know their labels and not the losses.
LOSS_OF_LABELS = {"classes": "cross_entropy", "multi": "bce", "values": "mse"}
# More than any model's outputs have; the import checks it against the model.
MAX_AXIS = 8


def _shown_choices(names: Iterable[str]) -> str:
    """The names of built-in losses or metrics, for a help text."""
    return ", ".join(name for name in names if name != CUSTOM_LOSS)


def parse_shape(text: str) -> tuple[int | str, ...]:
    """Sizes of an option, separated by commas or ×; one may be the bounds of a length, such as 400:16000."""
    try:
        return tuple(n if ":" in n else positive_integer(n) for n in text.replace("x", ",").split(","))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"expected sizes of 1 or more, such as 3,32,32, got {text!r}") from error


def read_names(path: str) -> list[str]:
    """Tensor names of a file: a JSON list, or one per line; a line that begins with `#` is a comment."""
    try:
        text = read_file(Path(path)).decode("utf-8")
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}", hint=path_remedy(error)) from error
    except ValueError as error:
        raise ConfigError(f"{path} is no text ({error})") from error
    if text.lstrip().startswith("["):
        names = read_json(Path(path), ConfigError)
        if not all(isinstance(n, str) for n in names):
            raise ConfigError(path, expected="a list of tensor names")
    else:
        names = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not names:
        raise ModelError(f"{path} names no tensor", expected="at least one trainable tensor")
    return list(names)


class _CollectPairs(argparse.Action):
    """Collect the pairs of a repeated option KEY=VALUE in a mapping."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: object = None) -> None:
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), values[0]: values[1]})


def _choice(default: Any, text: str, *, within: tuple[int, int] | None = None, **option: Any) -> Any:
    """A choice with its description; `option` is what argparse takes for its option."""
    metadata = {"text": text, "option": option}
    return field(default=default, metadata=metadata) if within is None else bounded(default, *within, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ImportChoices:
    """A user's choices for an import; the texts of its fields describe them. Those that shape the graph are stored in
    the model's file.

    In Python `loss` and `metric` may also be torch functions or modules, `lora` a `Lora`. A loss of your own gives one
    number per sample [n]; labels are like outputs, unless its attributes `target_shape` (of one sample) and
    `target_dtype` ("int64") say otherwise. The numbers of a metric of your own per sample [n] are averaged; or they are
    rows [n, k] and its attribute `value` is a function of their sums [k]. More is better.
    """

    input_shape: Sequence[int | str] | None = _choice(
        None,
        "One sample's shape, for a torch module that doesn't state it, or an ONNX file with free sizes; `LEAST:MOST` "
        "for a length that varies.",
        metavar="C,H,W",
        type=parse_shape,
    )
    fix: Mapping[str, float] | None = _choice(
        None,
        "Inputs that are replaced by a constant of their type and shape before anything else, such as `sr=16000`; "
        "the option is repeatable.",
        metavar="NAME=VALUE",
        action=_CollectPairs,
        type=recipe_setting(()),
    )
    token_ids: bool = _choice(
        False,
        "A torch module takes whole numbers (token ids, int64), if its `input_dtype` doesn't say so.",
        action="store_true",
    )
    output: str | None = _choice(
        None,
        "The output of an ONNX file from which the model is trained, or a value within it; what follows it stays for "
        "predictions, if it has no weights.",
        metavar="NAME",
    )
    class_axis: int | None = _choice(
        None,
        "The axis of the outputs [n, ...] that the classes are on, 1 to the last, or -1 for the last; by default that "
        "of the last layer's channels. Losses get the classes on axis 1; predictions keep the file's layout, too.",
        metavar="AXIS",
        type=setting_of(int),
        within=(-MAX_AXIS, MAX_AXIS),
    )
    parameters: Sequence[str] | None = _choice(
        None,
        "Names of the trainable tensors of an ONNX file, by default those that it lists, or all that are used as "
        "weights; the option names a file with one per line, or a JSON list.",
        metavar="FILE",
        type=read_names,
    )
    prefer: Prefer | None = _choice(
        None,
        "Where channels can be cut in two ways: whole heads or groups (`coarse`), or a part of each (`fine`).",
        choices=get_args(Prefer),
    )
    loss: str | Any | None = _choice(
        None,
        f"What training minimises (by default cross_entropy): {_shown_choices(LOSSES)}, or one of your own: "
        "`package.module:function` of outputs and labels, or an ONNX file. A `fleet.toml` names built-in ones in "
        '`[job.recipe]`, and here one of your own, with `recipe.loss = "custom"`.',
        metavar="LOSS",
    )
    metric: str | Any | None = _choice(
        None,
        f"The metric besides accuracy and loss: {_shown_choices(METRICS_OF['own'])}, or one of your own, given as a "
        "loss is, in a `fleet.toml` as well; a higher value is better.",
        metavar="METRIC",
    )
    lora: str | Any | None = _choice(
        None,
        "Adapters to train; the weights are frozen: `RANK` for all linear layers but the last, or "
        "`RANK:PATTERN,PATTERN` of names of linear layers' weights.",
        metavar="RANK[:PATTERN,...]",
    )
    base: Base | None = _choice(
        None,
        "The precision in which frozen weights are stored, sent and loaded: `float16`, or `int8` with one scale per "
        "output channel.",
        choices=get_args(Base),
    )


def option_of(choice: Field[Any]) -> dict[str, Any]:
    """What argparse takes to add the option of a choice; without it, the value is None."""
    text = choice.metadata["text"].replace("%", "%%").replace("`", "").removesuffix(".")
    return {"help": text[0].lower() + text[1:], "default": None, **choice.metadata["option"]}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model's import, which `options.read_model` reads."""
    group = parser.add_argument_group("the model")
    group.add_argument("--name", help="the model's name (default: that of the file or factory)")
    for choice in fields(ImportChoices):
        group.add_argument(f"--{choice.name.replace('_', '-')}", **option_of(choice))
