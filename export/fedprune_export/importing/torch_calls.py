"""Replaces calls of torch's functions that its exporter can't write, or writes in a form that can't be cut or trained.

A module is run with the same replacements when its training mode is compared with evaluation (`torch_training_mode`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

# The least value of SELU, −λα, to which alpha dropout sets numbers (Klambauer et al. 2017, arXiv:1706.02515).
_SELU_MINIMUM = -1.0507009873554805 * 1.6732632423543772

# Functions of recurrent layers. With several layers they drop outputs of each layer but the last.
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def replace_calls(torch: Any) -> Any:
    """A torch function mode in which the calls are replaced."""
    functional = torch.nn.functional
    answers: dict[Any, Callable[..., Any]] = {
        functional.alpha_dropout: _alpha_dropout,
        functional.feature_alpha_dropout: _alpha_dropout,
        functional.embedding_bag: _embedding_bag,
        functional.instance_norm: _instance_norm,
        functional.rrelu: _randomised_relu,
        **dict.fromkeys((getattr(torch, name) for name in _RECURRENT), _recurrent),
    }

    class Mode(torch.overrides.TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            answer = answers.get(func)
            return func(*args, **(kwargs or {})) if answer is None else answer(torch, func, *args, **(kwargs or {}))

    return Mode()


def _bind_arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _alpha_dropout(torch: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Set numbers to the least value m of SELU instead of 0, and keep mean and variance: with a dropout D by the ratio
    p, y = k · (D(x − m) + m), k = √((1 − p) / (1 + p · m²)). In evaluation k is 1."""
    arguments = _bind_arguments(func, args, kwargs)
    x, ratio, minimum = arguments["input"], arguments["p"], _SELU_MINIMUM
    if not arguments["training"]:
        return x
    drop = torch.dropout if func is torch.nn.functional.alpha_dropout else torch.feature_dropout
    # A draw is 0 or 1 and its mean ½, so that 4 · draw · (1 − draw) is 1 in evaluation alone.
    draw = torch.dropout(x.new_full((1,) * x.ndim, 0.5), 0.5, True)
    scale = math.sqrt((1 - ratio) / (1 + ratio * minimum**2))
    out = (drop(x - minimum, ratio, True) + minimum) * (scale + (1 - scale) * 4 * draw * (1 - draw))
    return x.copy_(out) if arguments["inplace"] else out


def _embedding_bag(torch: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Bags [n, width] of identifiers [n, length] by lookups and reductions: the exporter writes a loop over samples.

    Flat identifiers with offsets stay as they are: their bags differ in length from sample to sample.
    """
    arguments = _bind_arguments(func, args, kwargs)
    ids, weight, padding, mode = (arguments[name] for name in ("input", "weight", "padding_idx", "mode"))
    if ids.dim() != 2 or arguments["offsets"] is not None or arguments["max_norm"] is not None:
        return func(*args, **kwargs)
    rows = torch.nn.functional.embedding(ids, weight)
    if arguments["per_sample_weights"] is not None:
        rows = rows * arguments["per_sample_weights"].unsqueeze(-1)
    if padding is None:
        return {"sum": rows.sum, "mean": rows.mean, "max": rows.amax}[mode](1)
    # Padding counts neither in a mean nor for a maximum; a bag of nothing else is 0.
    counts = (ids != padding % weight.shape[0]).unsqueeze(-1)
    if mode == "max":
        largest = torch.where(counts, rows, -math.inf).amax(1)
        return torch.where(counts.any(1), largest, 0.0)
    total = (rows * counts).sum(1)
    return total if mode == "sum" else total / counts.sum(1).clamp(min=1)


def _instance_norm(torch: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
    """An instance norm by running statistics is a batch norm; the exporter would tile them for every sample."""
    arguments = _bind_arguments(func, args, kwargs)
    if arguments.pop("use_input_stats"):
        return func(*args, **kwargs)
    return torch.nn.functional.batch_norm(training=False, **arguments)


def _randomised_relu(torch: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
    """A leaky ReLU whose slopes are drawn, for which the exporter knows no operator."""
    arguments = _bind_arguments(func, args, kwargs)
    x, bounds = arguments["input"], (arguments["lower"], arguments["upper"])
    slopes = torch.empty_like(x).uniform_(*bounds) if arguments["training"] else sum(bounds) / 2
    out = torch.where(x < 0, x * slopes, x)
    return x.copy_(out) if arguments["inplace"] else out


def _recurrent(torch: Any, func: Any, x: Any, states: Any, weights: Any, *options: Any) -> Any:
    """The layers of a recurrent network one by one, with dropouts between them, which the exporter may leave out."""
    # Packed sequences have another order of arguments; they can't be exported.
    if len(options) != 6 or isinstance(options[0], (list, tuple)):
        return func(x, states, weights, *options)
    biases, layers, dropout, training, both_directions, batch_first = options
    if layers == 1 or not dropout or not training:
        return func(x, states, weights, biases, layers, 0.0, training, both_directions, batch_first)
    directions, count, last_states = 2 if both_directions else 1, len(weights) // layers, []
    is_lstm = isinstance(states, (list, tuple))
    for layer in range(layers):
        own = slice(layer * directions, (layer + 1) * directions)
        first = [s[own] for s in states] if is_lstm else states[own]
        own_weights = weights[layer * count : (layer + 1) * count]
        x = torch.dropout(x, dropout, True) if layer else x
        x, *last = func(x, first, own_weights, biases, 1, 0.0, training, both_directions, batch_first)
        last_states.append(last)
    return (x, *(torch.cat(parts) for parts in zip(*last_states, strict=True)))
