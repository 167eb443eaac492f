"""Defines options of commands, and reads the model, the recipe and the probe that they name."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import fedprune_export as fx
from fedprune.core.cli import recipe_setting
from fedprune.core.errors import ConfigError, ProfileError, UsageError, did_you_mean
from fedprune.core.json_file import read_json
from fedprune.model.features import CUSTOM_LOSS, METRICS_OF, labels_of
from fedprune.model.losses import LOSSES
from fedprune.model.recipe import LIST_SETTINGS, Recipe
from fedprune.planning.probe_report import ProbeReport
from fedprune.runtime.precision_files import PRECISIONS
from fedprune.updates import Codec
from fedprune_export.model_options import LOSS_OF_LABELS

MODEL_HELP = (
    "model.onnx, a folder in the layout of the Hugging Face hub, package.module:factory of a torch module, or timm:NAME"
)


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of local training, which `read_recipe` reads."""
    group = parser.add_argument_group("training")
    group.add_argument("--recipe", type=Path, metavar="FILE", help="local training as JSON; the options below win")
    group.add_argument(
        "--labels",
        choices=tuple(LOSS_OF_LABELS),
        help="kind of labels, which chooses the loss: the number of a class, a 0 or 1 per class, or values",
    )
    group.add_argument(
        "--label-smoothing", type=float, metavar="SHARE", help="label smoothing of cross_entropy: 0 to below 1"
    )
    group.add_argument("--huber-delta", type=float, metavar="D", help="error from which the huber loss is linear")
    group.add_argument(
        "--freeze", action="append", metavar="PATTERN", help="tensors that aren't trained, such as 'stem.*'; repeatable"
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        type=recipe_setting(LIST_SETTINGS),
        metavar="KEY=VALUE",
        help="any other setting of the recipe, such as lr=0.01 or ordered_dropout=0.25,0.5; repeatable",
    )


def read_model(
    arguments: argparse.Namespace, source: str | None = None, name: str | None = None, recipe: Recipe | None = None
) -> fx.Model:
    """Import the model that a command line names: `source`, or `arguments.model`.

    `name` is its name if the command line has none: an architecture is only equal under the same name. Nor is it under
    another loss, so `recipe` is that of the training, where it is known.
    """
    options = {choice.name: getattr(arguments, choice.name) for choice in fields(fx.ImportChoices)}
    options |= {name: custom_graph(arguments, name) for name in ("loss", "metric")}
    options["loss"] = options["loss"] or (recipe.loss if recipe else arguments.loss)
    choices = {name: value for name, value in options.items() if value is not None}
    return fx.load(source or arguments.model, name=arguments.name or name, **choices)


def parse_precisions(text: str) -> tuple[str, ...]:
    """Names of lower precisions, separated by commas, each once."""
    names = tuple(dict.fromkeys(comma_separated_names(text)))
    for name in names:
        if name not in PRECISIONS:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(PRECISIONS)}, got {name!r}")
    return names


def read_probe(arguments: argparse.Namespace) -> ProbeReport | None:
    """A board's probe report, if the command line names one."""
    if arguments.probe is None:
        return None
    try:
        return ProbeReport.from_dict(read_json(arguments.probe, ConfigError))
    except ProfileError as error:
        raise ProfileError(f"{arguments.probe}: {error}") from error


def custom_graph(arguments: argparse.Namespace, name: str) -> str | None:
    """The user's own `loss` or `metric` that the command line names; None for a built-in one, or none."""
    text: str | None = getattr(arguments, name, None)
    built_in = [n for n in (LOSSES if name == "loss" else METRICS_OF["own"]) if n != CUSTOM_LOSS]
    if text is None or text in built_in:
        return None
    # Otherwise a misspelt built-in name would be looked up as a file or a module.
    if ":" not in text and not text.endswith(".onnx"):
        raise UsageError(
            f"--{name}",
            expected=f"{', '.join(built_in)}, package.module:function, or a file .onnx",
            got=repr(text) + did_you_mean(text, built_in),
        )
    return text


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe of a command line: the file's settings, overridden by the options."""
    body: Any = {} if arguments.recipe is None else read_json(arguments.recipe, ConfigError)
    if not isinstance(body, dict):
        raise ConfigError(f"{arguments.recipe}", expected="an object of recipe settings", got=type(body).__name__)
    loss = CUSTOM_LOSS if custom_graph(arguments, "loss") is not None else arguments.loss
    metric = CUSTOM_LOSS if custom_graph(arguments, "metric") is not None else arguments.metric
    if loss and arguments.labels and labels_of(loss) != arguments.labels:
        raise UsageError(
            f"--loss {arguments.loss} compares with labels of another kind",
            expected="no --labels" if loss == CUSTOM_LOSS else f"--labels {labels_of(loss)}",
            got=arguments.labels,
        )
    # A loss of the file that suits the labels stays, such as huber for values.
    if arguments.labels and not arguments.loss and labels_of(str(body.get("loss", Recipe.loss))) != arguments.labels:
        body["loss"] = LOSS_OF_LABELS[arguments.labels]
    for key, value in (
        ("loss", loss),
        ("metric", metric),
        ("label_smoothing", arguments.label_smoothing),
        ("huber_delta", arguments.huber_delta),
    ):
        if value is not None:
            body[key] = value
    if arguments.freeze:
        body["frozen"] = arguments.freeze
    # Last: --set wins over every other option.
    body.update(arguments.set)
    try:
        return Recipe.from_dict(body)
    except ConfigError as error:
        raise ConfigError(str(error) if arguments.recipe is None else f"{arguments.recipe}: {error}") from error


def comma_separated_names(text: str) -> tuple[str, ...]:
    """Names of an option, separated by commas."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def parse_density(text: str) -> float | None:
    """A kept share, or None for `auto`."""
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, or auto, got {text!r}")
    return value


def parse_codec(text: str) -> str:
    """A codec of weights and updates."""
    try:
        Codec.parse(text, "")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"expected {error.expected}, got {text!r}") from error
    return text
