"""Exports the dropouts of torch modules, and notes everything else of training mode that an export loses.

A module is exported in evaluation mode, in which a dropout does nothing. Therefore every call of a dropout is replaced
by an operator of our own, with the ratio that the same call has in training mode: `nn.Dropout` and its kinds for
channels, `F.dropout`, dropout of the weights of attention, and modules for stochastic depth of timm and torchvision.

The module is run once in training mode to find the other differences: operators that draw random numbers, and buffers
that change (but for those of batch norms, which training measures). They aren't exported; notes say so.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from fedprune.core.errors import error_reason
from fedprune.core.text import first_few

# Axes on which the mask of a function of `torch.nn.functional` has its own numbers; empty for all.
_MASK_AXES: dict[str, tuple[int, ...]] = {
    "dropout": (),
    **dict.fromkeys(("dropout1d", "dropout2d", "dropout3d"), (0, 1)),
}

# Axes of a value without a batch, whose first axis is channels. `dropout2d` takes a value of three axes as a batch.
_UNBATCHED_NDIM = {"dropout1d": 2, "dropout3d": 4}

# Stands for an axis that no value has: the whole batch is dropped together, as torchvision's mode "batch" does.
#
# The exported axes are bits of a seed of 64 (`onnx_translations`). Without any the mask would differ on all axes:
# this bit is above those of all axes, and stands for none.
WHOLE_BATCH_AXIS = 31


class TrainingMode(NamedTuple):
    """A module's behaviour in training mode.

    Attributes:
        calls: The name and ratio of every call of a dropout; None if they are unknown.
        notes: Sentences on behaviour that training here lacks.
    """

    calls: Sequence[tuple[str, float]] | None
    notes: Sequence[str]


def record_training_mode(torch: Any, module: Any, samples: Sequence[Any]) -> TrainingMode:
    """Run a module in both modes and record what differs; module, buffers and random generator stay unchanged."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    named_buffers = ((s, name, buffer) for s in module.modules() for name, buffer in s._buffers.items())
    buffers = [(s, name, buffer, buffer.clone()) for s, name, buffer in named_buffers if buffer is not None]
    try:
        # A run in training mode draws random numbers and changes buffers: both are restored.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            module.eval()
            evaluation = _record_calls(torch, module, samples)
            module.train()
            training = _record_calls(torch, module, samples)
            changed_buffers = _changed_buffers(torch, module, buffers)
    except Exception as error:  # noqa: BLE001  the user's code, which may take labels, too, in training mode
        note = (
            f"The module can't be run in torch's training mode ({error_reason(error)}): boards train with its dropouts,"
            " but without whatever else it does in that mode alone."
        )
        return TrainingMode(None, [note])
    finally:
        with torch.no_grad():
            for submodule, name, tensor, value in buffers:
                submodule._buffers[name] = tensor
                tensor.copy_(value)
        for submodule, mode in modes:
            submodule.training = mode
    # A module that takes another path in training mode: its ratios belong to calls that the export doesn't meet.
    same_path = [name for name, _ in evaluation.calls] == [name for name, _ in training.calls]
    notes = [
        f"Random numbers of torch's training mode ({names}) in {modules}: boards train without them, as in evaluation."
        for names, modules in _group_modules(training.random)
    ]
    notes += [
        f"Buffers that torch's training mode changes ({names}) in {modules}: here they stay, and are used, as in "
        "evaluation."
        for names, modules in _group_modules(changed_buffers)
    ]
    if evaluation.active:
        notes.append(
            f"Dropout of {first_few(list(dict.fromkeys(evaluation.active)), max_names=3)} is always on in torch, also "
            "in evaluation; here it drops numbers while boards train, and none in predictions."
        )
    return TrainingMode(training.calls if same_path else None, notes)


def _changed_buffers(torch: Any, module: Any, buffers: Sequence[tuple[Any, str, Any, Any]]) -> dict[str, list[str]]:
    """Names of buffers that a run has changed, by the module that has them; without those of batch norms."""
    module_labels = {id(submodule): _module_label(name, submodule) for name, submodule in module.named_modules()}
    changed: dict[str, list[str]] = {}
    for submodule, name, _, before in buffers:
        now = submodule._buffers.get(name)
        if isinstance(submodule, torch.nn.modules.batchnorm._BatchNorm) or now is None:
            continue
        # A buffer may be replaced by one of another shape.
        if now.shape != before.shape or not torch.equal(now, before):
            changed.setdefault(module_labels[id(submodule)], []).append(name)
    return changed


def _group_modules(names: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Group modules that have the same names; returns these names and the modules, as text."""
    modules_by_names: dict[str, list[str]] = {}
    for module, place_names in names.items():
        modules_by_names.setdefault(", ".join(place_names), []).append(module)
    return [(joined_names, first_few(where, max_names=3)) for joined_names, where in modules_by_names.items()]


def _module_label(name: str, submodule: Any) -> str:
    return f"{name or 'the module'} ({type(submodule).__name__})"


@contextmanager
def export_dropouts(torch: Any, module: Any, mode: TrainingMode) -> Iterator[None]:
    """Export dropouts as a custom operator (`onnx_translations`) while a module is exported."""
    dropouts = _ExportedCalls(torch, mode.calls)
    # torch.export may run the forward several times, and every run begins with the first call.
    hook = module.register_forward_pre_hook(lambda *_: dropouts.restart())
    try:
        with dropouts.answer_calls(module):
            yield
    finally:
        hook.remove()


class _DropoutCalls:
    """Replaces calls of dropouts by the custom operator; the ratio is that of the call's arguments.
    Subclasses override `ratio`: one records it, one replaces it."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        functional = torch.nn.functional
        self._functions = {getattr(functional, name): name for name in _MASK_AXES}
        self._answers = {
            **dict.fromkeys(self._functions, self._functional_dropout),
            functional.scaled_dot_product_attention: self._attention,
            functional.multi_head_attention_forward: self._multi_head_attention,
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
        return _dropout_operator(self.torch)(x, float(ratio), list(axes)) if ratio else x

    def _functional_dropout(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = _bind_arguments(func, args, kwargs)
        x, name = arguments["input"], self._functions[func]
        axes = (0,) if x.ndim == _UNBATCHED_NDIM.get(name) else _MASK_AXES[name]
        out = self._drop(x, self.ratio(name, arguments["p"], on=arguments["training"]), axes)
        return x.copy_(out) if arguments.get("inplace") and out is not x else out

    def _stochastic_depth(self, submodule: Any, x: Any) -> Any:
        axes = (WHOLE_BATCH_AXIS,) if getattr(submodule, "mode", "row") == "batch" else (0,)
        return self._drop(x, self.ratio("depth", _depth_ratio(submodule), on=submodule.training), axes)

    def _multi_head_attention(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """`nn.MultiheadAttention` calls a function of its own, which in turn calls functions that are replaced."""
        arguments = _bind_arguments(func, args, kwargs)
        ratio = self.ratio("heads", arguments["dropout_p"], on=arguments["training"])
        inner_calls = _DropoutCalls(self.torch)  # they take the ratio of their arguments, which this call sets
        del inner_calls._answers[func]
        with inner_calls.mode():
            return func(**{**arguments, "dropout_p": ratio, "training": ratio > 0})

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


class _RecordedCalls(_DropoutCalls):
    """Calls of one run, in which nothing is dropped.

    Attributes:
        calls: The name of each and the ratio by which it drops numbers in this mode.
        active: The modules in which a call drops any.
        random: Other operators that drew random numbers, by module.
    """

    def __init__(self, torch: Any) -> None:
        super().__init__(torch)
        self.calls: list[tuple[str, float]] = []
        self.active: list[str] = []
        self.random: dict[str, list[str]] = {}
        self.module_stack: list[str] = []

    def ratio(self, name: str, ratio: float, *, on: bool) -> float:
        self.calls.append((name, ratio if on else 0.0))
        self.active += self.module_stack[-1:] if ratio and on else []
        return 0.0


class _ExportedCalls(_DropoutCalls):
    """Calls with the ratios that they have in training mode; where these are unknown, as their arguments say."""

    def __init__(self, torch: Any, calls: Sequence[tuple[str, float]] | None) -> None:
        super().__init__(torch)
        self._calls, self._next = calls, 0

    def restart(self) -> None:
        """Start again from the first call, since torch may trace the module several times."""
        self._next = 0

    def ratio(self, name: str, ratio: float, *, on: bool) -> float:
        if self._calls is None:
            return ratio
        self._next += 1
        return self._calls[self._next - 1][1]


def _record_calls(torch: Any, module: Any, samples: Sequence[Any]) -> _RecordedCalls:
    record = _RecordedCalls(torch)

    class Random(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if torch.Tag.nondeterministic_seeded in func.tags:
                name = func.overloadpacket.__name__.strip("_")
                if "attention" not in name:  # its weights are answered: nothing of them is dropped
                    names = record.random.setdefault(record.module_stack[-1], [])
                    names += [] if name in names else [name]
            return func(*args, **(kwargs or {}))

    def enter(label: str, *_: Any) -> None:
        record.module_stack.append(label)

    def leave(*_: Any) -> None:
        record.module_stack.pop()

    hooks = []
    for name, submodule in module.named_modules():
        hooks.append(submodule.register_forward_pre_hook(functools.partial(enter, _module_label(name, submodule))))
        hooks.append(submodule.register_forward_hook(leave))
    try:
        with record.answer_calls(module), Random():
            module(*samples)
    finally:
        for hook in hooks:
            hook.remove()
    return record


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
    """The operator that stands for a dropout in an export: its input, with the ratio and the axes of the mask."""

    def dropout(x: torch.Tensor, ratio: float, axes: Sequence[int]) -> torch.Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    dropout.__annotations__ = {"x": torch.Tensor, "ratio": float, "axes": Sequence[int], "return": torch.Tensor}
    operator = torch.library.custom_op("fedprune::dropout", dropout, mutates_args=())
    operator.register_fake(lambda x, ratio, axes: x.new_empty(x.shape))
    return operator


def onnx_translations(torch: Any, operators: Any) -> dict[Any, Any]:
    """Write the operator as a Dropout with its axes as bits of the seed, which `extract_mask_axes` reads."""
    _dropout_operator(torch)

    def dropout(x: Any, ratio: float, axes: Sequence[int]) -> Any:
        return operators.Dropout(x, operators.Constant(value_float=ratio), seed=sum(1 << axis for axis in axes))[0]

    return {torch.ops.fedprune.dropout.default: dropout}


def extract_mask_axes(nodes: Sequence[Any]) -> dict[str, list[int]]:
    """The axes of the masks of dropouts by the name of the node, where these aren't all; taken out of the nodes."""
    axes: dict[str, list[int]] = {}
    for node in nodes:
        seed = next((a for a in node.attribute if a.name == "seed"), None)
        if node.op_type != "Dropout" or seed is None:
            continue
        node.attribute.remove(seed)
        if seed.i:
            axes[node.name] = [axis for axis in range(WHOLE_BATCH_AXIS) if seed.i >> axis & 1]
    return axes
