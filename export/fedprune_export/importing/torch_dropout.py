"""Exports the dropouts of torch modules.

A module is exported in evaluation mode, in which a dropout does nothing. Therefore every call of a dropout is replaced
by an operator of our own, with the ratio that the same call has in training mode (`torch_training_mode`): `nn.Dropout`
and its kinds for channels, alpha dropout, `F.dropout`, dropout of the weights of attention and between the layers of
recurrent networks, and modules for stochastic depth of timm and torchvision.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import onnx

from fedprune.model.random_inputs import MASK, Draw
from fedprune_export.ir.dropout import DRAWS_KEY, DROPOUT_AXES_KEY

# Axes on which the mask of a function of `torch.nn.functional` has its own numbers; empty for all.
_MASK_AXES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("dropout", "alpha_dropout"), ()),
    **dict.fromkeys(("dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"), (0, 1)),
}

# The least value of SELU, −λα, to which alpha dropout sets numbers (Klambauer et al. 2017, arXiv:1706.02515).
_SELU_MINIMUM = -1.0507009873554805 * 1.6732632423543772

# Functions of recurrent layers. With several layers they drop outputs of each layer but the last.
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")

# Axes of a value without a batch, whose first axis is channels. `dropout2d` takes a value of three axes as a batch.
_UNBATCHED_NDIM = {"dropout1d": 2, "dropout3d": 4}

# Stands for an axis that no value has: the whole batch is dropped together, as torchvision's mode "batch" does.
#
# The exported axes are bits of a seed (`onnx_translations`). Without any the mask would differ on all axes: this bit is
# above those of all axes, and stands for none.
WHOLE_BATCH_AXIS = 31


class DropoutCall(NamedTuple):
    """A call of a dropout: its kind, the ratio by which it drops numbers in a mode, and the module that calls it."""

    name: str
    ratio: float
    module: str


class DropoutCalls:
    """Replaces calls of dropouts by the custom operator; the ratio is that of the call's arguments.
    Subclasses override `ratio`: one records it, one replaces it."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        functional = torch.nn.functional
        self._functions = {getattr(functional, name): name for name in _MASK_AXES}
        self._answers: dict[Any, Callable[..., Any]] = {
            **dict.fromkeys(self._functions, self._functional_dropout),
            functional.scaled_dot_product_attention: self._attention,
            functional.multi_head_attention_forward: self._multi_head_attention,
            functional.instance_norm: self._instance_norm,
            functional.rrelu: self._randomised_relu,
            **dict.fromkeys((getattr(torch, name) for name in _RECURRENT), self._recurrent),
        }

    def ratio(self, name: str, ratio: float, *, on: bool) -> float:
        """The ratio to export for a call with this ratio; `on` is whether its arguments switch it on."""
        return ratio if on else 0.0

    @contextmanager
    def answer_calls(self, module: Any) -> Iterator[None]:
        """Replace all calls, also those of modules for stochastic depth, which call no dropout in evaluation mode."""
        submodules = [
            (submodule, vars(submodule).get("forward")) for submodule in module.modules() if _depth_ratio(submodule)
        ]
        for submodule, _ in submodules:
            submodule.forward = functools.partial(self._stochastic_depth, submodule)
        try:
            with self.mode():
                yield
        finally:
            for submodule, own_forward in submodules:
                del submodule.forward
                if own_forward is not None:  # else its class has it
                    submodule.forward = own_forward

    def mode(self) -> Any:
        """A torch function mode that replaces the calls."""
        answers = self._answers

        class Mode(self.torch.overrides.TorchFunctionMode):  # type: ignore[misc, name-defined]
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                answer = answers.get(func)
                return func(*args, **(kwargs or {})) if answer is None else answer(func, *args, **(kwargs or {}))

        return Mode()

    def _drop(self, x: Any, ratio: float, axes: Sequence[int]) -> Any:
        return self._mask(x, ratio, 1 / (1 - ratio) if ratio < 1 else 0.0, axes) if ratio else x

    def _mask(self, x: Any, ratio: float, kept: float, axes: Sequence[int]) -> Any:
        """Multiply by a mask while training: 0 for the share `ratio` of its numbers, else `kept`."""
        return _dropout_operator(self.torch)(x, float(ratio), float(kept), list(axes))

    def _alpha_drop(self, x: Any, ratio: float, axes: Sequence[int]) -> Any:
        """Set numbers to the least value m of SELU instead of 0, and keep mean and variance: with a mask of 0 and 1,
        y = a · (mask · (x − m) + (1 − ratio) · m), a = 1 / √((1 − ratio) · (1 + ratio · m²))."""
        if not ratio or ratio >= 1:
            return self._drop(x, ratio, axes)
        minimum = _SELU_MINIMUM
        scale = 1 / math.sqrt((1 - ratio) * (1 + ratio * minimum**2))
        # In evaluation both masks are 1, so that y = x.
        shift = self._mask(x.new_full((1,) * x.ndim, minimum), 0.0, scale * (1 - ratio), ())
        return self._mask(x - minimum, ratio, scale, axes) + shift

    def _functional_dropout(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = _bind_arguments(func, args, kwargs)
        x, name = arguments["input"], self._functions[func]
        axes = (0,) if x.ndim == _UNBATCHED_NDIM.get(name) else _MASK_AXES[name]
        drop = self._alpha_drop if "alpha" in name else self._drop
        out = drop(x, self.ratio(name, arguments["p"], on=arguments["training"]), axes)
        return x.copy_(out) if arguments.get("inplace") and out is not x else out

    def _stochastic_depth(self, submodule: Any, x: Any) -> Any:
        axes = (WHOLE_BATCH_AXIS,) if getattr(submodule, "mode", "row") == "batch" else (0,)
        return self._drop(x, self.ratio("depth", _depth_ratio(submodule), on=submodule.training), axes)

    def _multi_head_attention(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """`nn.MultiheadAttention` calls a function of its own, which in turn calls functions that are replaced."""
        arguments = _bind_arguments(func, args, kwargs)
        ratio = self.ratio("heads", arguments["dropout_p"], on=arguments["training"])
        inner_calls = DropoutCalls(self.torch)  # they take the ratio of their arguments, which this call sets
        del inner_calls._answers[func]
        with inner_calls.mode():
            return func(**{**arguments, "dropout_p": ratio, "training": ratio > 0})

    def _instance_norm(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """An instance norm by running statistics is a batch norm; the exporter would tile them for every sample."""
        arguments = _bind_arguments(func, args, kwargs)
        if arguments.pop("use_input_stats"):
            return func(*args, **kwargs)
        return self.torch.nn.functional.batch_norm(training=False, **arguments)

    def _randomised_relu(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """A leaky ReLU whose slopes are drawn, for which the exporter knows no operator."""
        arguments = _bind_arguments(func, args, kwargs)
        x, bounds = arguments["input"], (arguments["lower"], arguments["upper"])
        slopes = self.torch.empty_like(x).uniform_(*bounds) if arguments["training"] else sum(bounds) / 2
        out = self.torch.where(x < 0, x * slopes, x)
        return x.copy_(out) if arguments["inplace"] else out

    def _recurrent(self, func: Any, x: Any, states: Any, weights: Any, *options: Any) -> Any:
        """The layers of a recurrent network one by one, with dropouts between them."""
        # Packed sequences have another order of arguments; they can't be exported.
        if len(options) != 6 or isinstance(options[0], (list, tuple)):
            return func(x, states, weights, *options)
        biases, layers, dropout, training, both_directions, batch_first = options
        directions = 2 if both_directions else 1
        ratio = self.ratio("recurrent", dropout, on=training) if layers > 1 else 0.0
        if not ratio:
            return func(x, states, weights, biases, layers, 0.0, training, both_directions, batch_first)
        count, last_states = len(weights) // layers, []
        is_lstm = isinstance(states, (list, tuple))
        for layer in range(layers):
            own = slice(layer * directions, (layer + 1) * directions)
            first = [s[own] for s in states] if is_lstm else states[own]
            own_weights = weights[layer * count : (layer + 1) * count]
            x, *last = func(x, first, own_weights, biases, 1, 0.0, training, both_directions, batch_first)
            last_states.append(last)
            x = self._drop(x, ratio, ()) if layer < layers - 1 else x
        return (x, *(self.torch.cat(parts) for parts in zip(*last_states, strict=True)))

    def _attention(
        self,
        func: Any,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Any:
        ratio = self.ratio("attention", dropout_p, on=True)
        if not ratio:
            return func(query, key, value, attn_mask=attn_mask, dropout_p=0.0, is_causal=is_causal, **kwargs)
        torch, scale = self.torch, kwargs.get("scale")
        if kwargs.get("enable_gqa"):
            copies = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(copies, -3), value.repeat_interleave(copies, -3)
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self._drop(scores.softmax(-1), ratio, ()) @ value


class _ExportedCalls(DropoutCalls):
    """Calls with the ratios that they have in training mode; where these are unknown, as their arguments say."""

    def __init__(self, torch: Any, calls: Sequence[DropoutCall] | None) -> None:
        super().__init__(torch)
        self._calls, self._next = calls, 0

    def restart(self) -> None:
        """Start again from the first call, since torch may trace the module several times."""
        self._next = 0

    def ratio(self, name: str, ratio: float, *, on: bool) -> float:
        if self._calls is None:
            return ratio
        self._next += 1
        return self._calls[self._next - 1].ratio


@contextmanager
def export_dropouts(torch: Any, module: Any, calls: Sequence[DropoutCall] | None) -> Iterator[None]:
    """Export dropouts as a custom operator (`onnx_translations`) while a module is exported; `calls` are those of
    training mode, None if they are unknown."""
    dropouts = _ExportedCalls(torch, calls)
    # torch.export may run the forward several times, and every run begins with the first call.
    hook = module.register_forward_pre_hook(lambda *_: dropouts.restart())
    try:
        with dropouts.answer_calls(module):
            yield
    finally:
        hook.remove()


def _bind_arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _depth_ratio(submodule: Any) -> float:
    """The ratio of a module for stochastic depth, by the names that timm, transformers and torchvision give it; 0 of
    others, and where the rest isn't scaled up."""
    kind = type(submodule).__name__
    ratio = submodule.drop_prob if kind.endswith("DropPath") and hasattr(submodule, "drop_prob") else 0.0
    ratio = submodule.p if kind == "StochasticDepth" and hasattr(submodule, "p") else ratio
    return float(ratio or 0.0) if getattr(submodule, "scale_by_keep", True) else 0.0


@functools.cache
def _dropout_operator(torch: Any) -> Any:
    """The operator that stands for a dropout in an export: its input, with the numbers and the axes of the mask."""

    def dropout(x: torch.Tensor, ratio: float, kept: float, axes: Sequence[int]) -> torch.Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    numbers = {"ratio": float, "kept": float, "axes": Sequence[int]}
    dropout.__annotations__ = {"x": torch.Tensor, **numbers, "return": torch.Tensor}
    operator = torch.library.custom_op("fedprune::dropout", dropout, mutates_args=())
    operator.register_fake(lambda x, ratio, kept, axes: x.new_empty(x.shape))
    return operator


def onnx_translations(torch: Any, operators: Any) -> dict[Any, Any]:
    """Write the operator as a Dropout, with what ONNX has no field for in its seed, which `extract_masks` reads."""
    _dropout_operator(torch)

    def dropout(x: Any, ratio: float, kept: float, axes: Sequence[int]) -> Any:
        kept_bits = int.from_bytes(struct.pack("<f", kept), "little")
        seed = sum(1 << axis for axis in axes) + (kept_bits << 32)
        return operators.Dropout(x, operators.Constant(value_float=ratio), seed=seed)[0]

    return {torch.ops.fedprune.dropout.default: dropout}


def extract_masks(proto: onnx.ModelProto) -> dict[str, str]:
    """Metadata on the masks of dropouts, which is taken out of the nodes: on which axes a mask differs, if not on all,
    and its numbers, if these aren't 0 and 1 / (1 − ratio)."""
    constants = {o: n.attribute[0].f for n in proto.graph.node if n.op_type == "Constant" for o in n.output}
    axes: dict[str, list[int]] = {}
    draws: dict[str, Any] = {}
    for node in proto.graph.node:
        seed = next((a for a in node.attribute if a.name == "seed"), None)
        if node.op_type != "Dropout" or seed is None:
            continue
        node.attribute.remove(seed)
        ratio = float(f"{constants[node.input[1]]:.6g}")
        kept = struct.unpack("<f", (seed.i >> 32).to_bytes(4, "little"))[0]
        if kept != struct.unpack("<f", struct.pack("<f", Draw.dropout(ratio).second))[0]:
            draws[node.name] = Draw(MASK, ratio, float(f"{kept:.9g}")).to_json()
        if seed.i & (1 << 32) - 1:
            axes[node.name] = [axis for axis in range(WHOLE_BATCH_AXIS) if seed.i >> axis & 1]
    return {key: json.dumps(table) for key, table in ((DROPOUT_AXES_KEY, axes), (DRAWS_KEY, draws)) if table}
